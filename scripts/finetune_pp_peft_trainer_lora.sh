#!/usr/bin/env bash
# An adapter on LLaMA-7B with FSDP2: finetune_pp_peft_trainer_lora.py on one node of 8 A100-80G.
#
# Effective batch: 8 GPUs x 8 rows x 2 accumulation steps = 128 rows.
# Memory of a GPU: 2 bytes a parameter of the frozen model / GPUs (LLaMA-7B: 13.5 GB / 8 = 1.7 GB), 16 bytes for each
#   trained one / GPUs, which are few, the layer that computes, and the activations, 7.7 MB a token (8 rows of 512
#   tokens: 32 GB).
# Predicted by tools/plan.py, not measured: 35 GB a GPU (nvidia-smi: 41), 1.8 s a step.
#   python tools/plan.py --model llama-7b --strategy FSDP+LoRA --rows 8 --accumulation 2 --checkpointing False
# Cost: each forward and backward gathers every layer twice; gradients of the frozen model are neither made nor sent.
#
# MODEL DATASET OUTPUT_DIR NUM_GPUS come from the environment (paths as seen from the root of the repository), and any
# flag of the script that is appended wins over those below. The last two: CPU processes; one of two nodes.
#   MODEL=models/llama-13b NUM_GPUS=4 sh scripts/finetune_pp_peft_trainer_lora.sh --peft_mode ptuning
#   USE_CPU=1 NUM_GPUS=2 sh scripts/finetune_pp_peft_trainer_lora.sh
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 sh scripts/finetune_pp_peft_trainer_lora.sh
# Every node runs it with its own NODE_RANK, the address of the first one and an OUTPUT_DIR that all see, and multiplies
# the effective batch; on a cluster see scripts/slurm.sbatch. SIGTERM saves a checkpoint: torchrun waits for it 600 s
# here, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT, where its own 30 s would be too few for a large one.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "$0")/.."

NUM_GPUS=${NUM_GPUS:-8}
NUM_NODES=${NUM_NODES:-1}
DATASET=${DATASET:-data_sample/tokenized/triage_train}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/finetune_pp_peft_trainer_lora}
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
  finetune_pp_peft_trainer_lora.py \
  --model_path "$MODEL" \
  --dataset_path "$DATASET" \
  --output_dir "$OUTPUT_DIR" \
  --peft_mode lora \
  --per_device_train_batch_size 8 \
  --gradient_accumulation_steps 2 \
  --learning_rate 1e-3 \
  "$@"
