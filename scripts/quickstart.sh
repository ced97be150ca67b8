#!/usr/bin/env bash
# From a fresh clone to a better model: environment, sample model, data, training, and what it gained.
# Linux, Python 3.11+; 2 CPU cores, 6 GB of memory and 3 GB of disk are enough, a GPU is used if there is one.
# A step whose result is complete is skipped; an interrupted one is done again, and training goes on from its checkpoint.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

model=models/SmolLM2-135M-Instruct
run=outputs/finetune_pp_peft
results=outputs/quickstart

say_how_to_go_on() {
  local status=$?
  if [ "$status" != 0 ]; then
    printf '\nstopped at "%s"; bash scripts/quickstart.sh goes on from there\n' "$step" >&2
  fi
}
trap say_how_to_go_on EXIT
trap 'exit 130' INT  # Ctrl-C, which the program that is running gets, too
trap 'exit 143' TERM

install
python=.venv/bin/python
export TRANSFORMERS_VERBOSITY=${TRANSFORMERS_VERBOSITY:-error} PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}

log "model: $model"
$python tools/get_sample_model.py

# The pairs of answers are what finetune_pp_dpo.py learns from; this script trains on the questions.
for name in triage_train triage_test preference_train preference_test; do
  log "data: data_sample/tokenized/$name"
  case $name in
    triage_*) format=mcq input=data_sample/$name.jsonl ;;
    preference_train) format=preference input=data_sample/preference_zh_en.jsonl ;;
    preference_test) format=preference input=data_sample/preference_zh_en_test.jsonl ;;
  esac
  if [ -f "data_sample/tokenized/$name/ledger.json" ]; then
    echo "already there"
  else
    $python data_sample/tokenize_dataset.py --format "$format" --input "$input" \
      --tokenizer_path "$model" --output "data_sample/tokenized/$name"
  fi
done

log "training: python finetune_pp_peft.py"
if [ -f "$run/run.json" ]; then
  echo "$run is already there"
elif compgen -G "$run/checkpoint-*" >/dev/null; then
  $python finetune_pp_peft.py --resume_from_checkpoint True
else
  $python finetune_pp_peft.py
fi

log "evaluation on questions that training never saw"
[ -f "$results/base.json" ] || $python tools/evaluate.py --output "$results/base.json"
# run.json is a run's last file, so an older result belongs to a former run.
[ "$results/tuned.json" -nt "$run/run.json" ] ||
  $python tools/evaluate.py --peft_path "$run" --output "$results/tuned.json"
# An answer gets its name when all of it is there.
if [ ! -s "$results/base.txt" ]; then
  $python test_sample.py --num_samples 1 --model_path "$model" >"$results/base.tmp"
  mv "$results/base.tmp" "$results/base.txt"
fi
if [ ! "$results/tuned.txt" -nt "$run/run.json" ]; then
  $python test_sample.py --num_samples 1 --peft_path "$run" >"$results/tuned.tmp"
  mv "$results/tuned.tmp" "$results/tuned.txt"
fi
$python tools/show_gain.py "$results" --picture "$results/gain.svg"
log "done in $((SECONDS / 60)) min $((SECONDS % 60)) s; next: python test_sample.py, and README.md for the other strategies"
