#!/usr/bin/env bash
# Full fine-tuning of LLaMA-7B in the plain loop: finetune_pp.py, one process. Of 8 A100-80G it takes as many as weights
# and optimizer need (LLaMA-7B: 3), and spreads the layers over them.
#
# Effective batch: 1 process x 16 rows x 8 accumulation steps = 128 rows.
# Memory: 16 bytes a parameter over all GPUs together and 2 for a copy in bf16 (LLaMA-7B: 121 GB), and the activations,
#   8 MB a token (16 rows of 512 tokens: 65 GB).
# Predicted by tools/plan.py, not measured: 64 GB a GPU (nvidia-smi: 73), 14 s a step.
#   python tools/plan.py --model llama-7b --gpus 3 --strategy pp --rows 16 --accumulation 8 --checkpointing False
# Cost: one GPU works at a time, so more GPUs hold a larger model and are no faster than one.
#
# MODEL DATASET OUTPUT_DIR NUM_GPUS come from the environment (paths as seen from the root of the repository; without
# NUM_GPUS all visible ones may be used), and any flag of the script that is appended wins over those below.
#   MODEL=models/llama-13b NUM_GPUS=4 sh scripts/finetune_pp.sh --num_train_epochs 3
#   USE_CPU=1 sh scripts/finetune_pp.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "$0")/.."

DATASET=${DATASET:-data_sample/tokenized/triage_train}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/finetune_pp}
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
exec "$python" finetune_pp.py \
  --model_path "$MODEL" \
  --dataset_path "$DATASET" \
  --output_dir "$OUTPUT_DIR" \
  --per_device_train_batch_size 16 \
  --gradient_accumulation_steps 8 \
  --learning_rate 2e-5 \
  "$@"
