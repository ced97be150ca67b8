#!/usr/bin/env bash
# An adapter on LLaMA-7B in the plain loop: finetune_pp_peft.py, one process, the layers spread over 8 A100-80G.
#
# Effective batch: 1 process x 16 rows x 8 accumulation steps = 128 rows.
# Memory: 2 bytes a parameter of the frozen model over all GPUs together (LLaMA-7B: 13.5 GB, so one GPU holds it, too),
#   16 bytes for each trained one, which are few, and the activations, about 34 x hidden size bytes a layer and token
#   (arXiv:2205.05198; LLaMA-7B: 4.5 MB a token; 16 rows of 512 tokens: 37 GB together).
# Cost: one GPU works at a time, so 8 GPUs hold a larger model and are no faster than one.
#
# MODEL DATASET OUTPUT_DIR NUM_GPUS come from the environment (paths as seen from the root of the repository; without
# NUM_GPUS all visible ones are used), and any flag of the script that is appended wins over those below.
#   MODEL=models/llama-13b NUM_GPUS=4 sh scripts/finetune_pp_peft.sh --peft_mode prefix
#   USE_CPU=1 sh scripts/finetune_pp_peft.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "$0")/.."

DATASET=${DATASET:-data_sample/tokenized/triage_train}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/finetune_pp_peft}
if [ "${USE_CPU:-0}" != 0 ]; then
  MODEL=${MODEL:-models/SmolLM2-135M-Instruct}
  set -- --use_cpu True "$@"
fi
MODEL=${MODEL:-models/llama-7b}
if [ -n "${NUM_GPUS:-}" ]; then  # of those that are visible already, or of all: the script takes what it sees
  visible=${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((NUM_GPUS - 1)))}
  CUDA_VISIBLE_DEVICES=$(echo "$visible" | cut -d, -f"1-$NUM_GPUS")
  export CUDA_VISIBLE_DEVICES
fi
python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python

set -x  # prints the command
exec "$python" finetune_pp_peft.py \
  --model_path "$MODEL" \
  --dataset_path "$DATASET" \
  --output_dir "$OUTPUT_DIR" \
  --peft_mode lora \
  --per_device_train_batch_size 16 \
  --gradient_accumulation_steps 8 \
  --learning_rate 1e-3 \
  "$@"
