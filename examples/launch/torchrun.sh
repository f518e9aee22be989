# on each of 2 nodes that share the run directory; FIRST_NODE is the name of the first
torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id=limbeck --rdzv-endpoint="$FIRST_NODE:29500" -m limbeck run kd output_dir=/mnt/shared/runs/kd train.bf16=true train.sharding=full
