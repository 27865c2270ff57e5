#!/usr/bin/env bash
# Start train/train.py through accelerate on one machine or several. All that is said of the machines is in the environment.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash train/train.sh [--name value ...]        flags of train/train.py, as --config FILE --data TEXT

On several machines run it on each, with the same flags. From the environment:

  NNODES            machines                                               1
  NODE_RANK         number of this machine, 0 for the first                0
  MASTER_ADDR       address of the first machine, needed for several       127.0.0.1
  MASTER_PORT       a free port on it                                      29500
  NPROC_PER_NODE    processes on each machine         its GPUs, or one process on the CPU
  ACCELERATE_CONFIG file for accelerate, such as configs/accelerate/*.yaml, for how the model is divided
  PYTHON            interpreter                                            python3
  DRY_RUN           set to anything: print the command and do nothing

Under Slurm, one task on each machine:

  export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) NNODES=$SLURM_NNODES
  srun --ntasks-per-node=1 bash -c 'NODE_RANK=$SLURM_NODEID bash train/train.sh --config FILE --data TEXT'

A run that was stopped goes on with --resume. SIGTERM and ctrl-C leave a checkpoint first.
`fairy2i train --help` lists the flags.
TEXT
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
nodes=${NNODES:-1}
rank=${NODE_RANK:-0}
if ((nodes > 1)) && [[ -z "${MASTER_ADDR:-}" ]]; then
    echo "error: MASTER_ADDR is missing: NNODES is $nodes, so the machines must know the address of the first" >&2
    exit 2
fi
if ((rank < 0 || rank >= nodes)); then
    echo "error: NODE_RANK is $rank, but the machines are numbered 0 to $((nodes - 1))" >&2
    exit 2
fi

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
each=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
address=${MASTER_ADDR:-127.0.0.1}
port=${MASTER_PORT:-29500}
if ((nodes * each == 1)) && [[ -z "${ACCELERATE_CONFIG:-}" ]]; then
    launch=("$python") # a signal then comes to the run itself; accelerate would not hand it on to a single process
elif ((gpus == 0 && nodes * each > 1)); then # accelerate would want MPI for that
    launch=("$python" -m torch.distributed.run --nnodes "$nodes" --node_rank "$rank" --nproc_per_node "$each"
        --master_addr "$address" --master_port "$port")
else
    launch=("$python" -m accelerate.commands.launch --num_machines "$nodes" --num_processes $((nodes * each))
        --machine_rank "$rank" --main_process_ip "$address" --main_process_port "$port")
    if [[ -n "${ACCELERATE_CONFIG:-}" ]]; then
        launch+=(--config_file "$ACCELERATE_CONFIG")
    else
        launch+=(--multi_gpu --mixed_precision no --dynamo_backend no) # train.py itself chooses bfloat16
    fi
    if ((gpus == 0)); then launch+=(--cpu); fi
    if ((nodes > 1)); then launch+=(--rdzv_backend static); fi
fi
launch+=("$here/train/train.py" "$@")

if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "${launch[@]}"
    echo
    exit 0
fi
exec "${launch[@]}"
