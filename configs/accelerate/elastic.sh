#!/bin/bash
# torchrun-elastic: one to four machines with eight GPUs each, that may come and go. On each of them, with the address of
# a machine that stays as the first argument:
#   configs/accelerate/elastic.sh 10.0.0.1:29500 --config configs/train/digits.yaml --output_dir /shared/runs/digits
# A machine that joins or leaves, or a process that dies (at most 10 times), restarts all processes; they resume from the
# newest checkpoint in output_dir, which all machines must see. The global batch is the recipe's (set
# train.global_batch_size, divisible by every number of processes), so samples, noise and learning rates stay the same.
# NPROC processes per machine. After SIGTERM the run is saved and torchrun ends with 1, which it makes of all codes but 0.
ENDPOINT=$1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # torch 2.15 else offers restarted processes the addresses of dead ones
shift
exec torchrun --nnodes "${NNODES:-1:4}" --nproc-per-node "${NPROC:-8}" --max-restarts 10 --shutdown-timeout 240 \
  --rdzv-backend c10d --rdzv-id "${RUN_ID:-finetune}" --rdzv-endpoint "$ENDPOINT" train_unet.py "$@"
