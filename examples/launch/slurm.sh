#!/bin/bash
#SBATCH --job-name=kd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=4:00:00
set -euo pipefail
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
srun torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID --rdzv-endpoint="$FIRST_NODE:29500" -m limbeck run kd output_dir=/mnt/shared/runs/kd train.bf16=true train.sharding=full
