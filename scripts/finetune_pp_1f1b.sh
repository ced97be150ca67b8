#!/usr/bin/env bash
# A true pipeline of LLaMA-7B over processes: finetune_pp_1f1b.py on one node of 8 A100-80G.
#
# Effective batch: 4 rows x 32 micro-batches = 128 rows, whatever the number of GPUs.
# Memory of a GPU: 16 bytes a parameter of its own layers and 2 for a copy in bf16 (LLaMA-7B: 121 GB / 8), and the
#   activations of at most 8 micro-batches of its layers (LLaMA-7B: 4 rows of 512 tokens: 2 GB a micro-batch).
# Predicted by tools/plan.py, not measured: 32 GB a GPU (nvidia-smi: 38), 2.6 s a step.
#   python tools/plan.py --model llama-7b --strategy 1F1B --rows 4 --accumulation 32 --checkpointing False
# Cost: the bubble, (stages - 1) / (micro-batches + stages - 1) of the time = 7 / 39 = 18 %. Between two stages only one
#   activation of each micro-batch goes there and its gradient back (LLaMA-7B: 34 MB each in float32), so an ordinary
#   network between nodes is enough.
#
# MODEL DATASET OUTPUT_DIR NUM_GPUS come from the environment (paths as seen from the root of the repository), and any
# flag of the script that is appended wins over those below. The last two: CPU processes; one of two nodes.
#   MODEL=models/llama-13b NUM_GPUS=4 sh scripts/finetune_pp_1f1b.sh --lora_used True
#   USE_CPU=1 NUM_GPUS=2 sh scripts/finetune_pp_1f1b.sh
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 sh scripts/finetune_pp_1f1b.sh
# Every node runs it with its own NODE_RANK, the address of the first one and an OUTPUT_DIR that all see, and adds its
# GPUs as stages. A rank that dies ends all others. SIGTERM saves a checkpoint: torchrun waits for it 600 s here, or
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT, where its own 30 s would be too few for a large one.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "$0")/.."

NUM_GPUS=${NUM_GPUS:-8}
NUM_NODES=${NUM_NODES:-1}
DATASET=${DATASET:-data_sample/tokenized/triage_train}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/finetune_pp_1f1b}
if [ "${USE_CPU:-0}" != 0 ]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  MODEL=${MODEL:-models/SmolLM2-135M-Instruct}
  set -- --use_cpu True "$@"
fi
MODEL=${MODEL:-models/llama-7b}
if [ "$NUM_NODES" = 1 ] && [ -z "${MASTER_PORT:-}" ]; then
  rendezvous=(--standalone)  # a free port: another run may hold the usual one
else
  rendezvous=(--nnodes "$NUM_NODES" --node-rank "${NODE_RANK:-0}")
  rendezvous+=(--master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}")
fi
# Every batch has another length, and memory in fixed segments would be cut into pieces that fit none of them.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# torchrun would give each process one thread, too few for an optimizer that is offloaded to the CPU.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + NUM_GPUS - 1) / NUM_GPUS))}
python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python

set -x  # prints the command
exec "$python" -m torch.distributed.run \
  "${rendezvous[@]}" \
  --nproc-per-node "$NUM_GPUS" \
  --shutdown-timeout "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}" \
  finetune_pp_1f1b.py \
  --model_path "$MODEL" \
  --dataset_path "$DATASET" \
  --output_dir "$OUTPUT_DIR" \
  --per_device_train_batch_size 4 \
  --gradient_accumulation_steps 32 \
  "$@"
