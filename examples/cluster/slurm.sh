#!/bin/bash
# sbatch examples/cluster/slurm.sh run.yaml --output /shared/run
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # one torchrun a machine, which starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@180       # three minutes before the end: a checkpoint
#SBATCH --requeue               # a job that was preempted, or lost a machine, goes on from its newest checkpoint
#SBATCH --open-mode=append
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
  --max-restarts 5 --shutdown-timeout 120 -m veneer.cli train "$@"
