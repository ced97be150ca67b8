#!/usr/bin/env bash
# LoRA on LLaMA-7B from pairs of answers, in the plain loop: finetune_pp_dpo.py, one process. Of 8 A100-80G it takes as
# many as the weights need (LLaMA-7B: one), and spreads the layers over them.
#
# Effective batch: 1 process x 8 rows x 16 accumulation steps = 128 rows, each a prompt with two answers.
# Memory: 2 bytes a parameter of the frozen model over all GPUs together (LLaMA-7B: 13.5 GB), 16 bytes for each trained
#   one, which are few, and the activations, 5.7 MB a token (8 rows, 16 documents of 512 tokens: 47 GB). The reference
#   is the same model without its adapter and takes none.
# Predicted by tools/plan.py, not measured: 62 GB a GPU (nvidia-smi: 69), 36 s a step.
#   python tools/plan.py --gpus 1 --strategy pp+LoRA+DPO --rows 8 --accumulation 16 --checkpointing False
# Cost: one GPU works at a time, so more GPUs hold a larger model and are no faster than one. A step has a third forward
#   of its documents, that of the reference; --precompute_reference True saves it from the second epoch on.
#   No learning rate stands below: the script takes 5e-5 with an adapter and 1e-6 with --lora_used False.
#
# MODEL DATASET OUTPUT_DIR NUM_GPUS come from the environment (paths as seen from the root of the repository; without
# NUM_GPUS all visible ones may be used), and any flag of the script that is appended wins over those below.
#   MODEL=models/llama-13b NUM_GPUS=4 sh scripts/finetune_pp_dpo.sh --loss_type ipo --peft_path outputs/sft
#   USE_CPU=1 sh scripts/finetune_pp_dpo.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "$0")/.."

DATASET=${DATASET:-data_sample/tokenized/preference_train}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/finetune_pp_dpo}
if [ "${USE_CPU:-0}" != 0 ]; then
  MODEL=${MODEL:-models/SmolLM2-135M-Instruct}
  set -- --use_cpu True "$@"
fi
MODEL=${MODEL:-models/llama-7b}
if [ -n "${NUM_GPUS:-}" ]; then  # of those that are visible already, or of all: the script sees no others
  visible=${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((NUM_GPUS - 1)))}
  CUDA_VISIBLE_DEVICES=$(echo "$visible" | cut -d, -f"1-$NUM_GPUS")
  export CUDA_VISIBLE_DEVICES
fi
# Every batch has another length, and memory in fixed segments would be cut into pieces that fit none of them.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python

set -x  # prints the command
exec "$python" finetune_pp_dpo.py \
  --model_path "$MODEL" \
  --dataset_path "$DATASET" \
  --output_dir "$OUTPUT_DIR" \
  --lora_used True \
  --per_device_train_batch_size 8 \
  --gradient_accumulation_steps 16 \
  "$@"
