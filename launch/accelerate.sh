#!/usr/bin/env bash
# launch/train.py under `accelerate launch`. Arguments go to the script (--help lists them).
#
#   bash launch/accelerate.sh
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 NPROC=8 bash launch/accelerate.sh   on node0; NODE_RANK=1 on the other
#
# NPROC          processes on each machine: one per GPU (2)
# NNODES         machines (1)
# NODE_RANK      with several: the number of this machine, from 0
# MASTER_ADDR    with several: the host that is number 0
# MASTER_PORT    a free port there (29500)
#
# `accelerate config` is not read: everything is said here. --multi_gpu means several processes, on CPU too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh accelerate demo

nnodes=${NNODES:-1} nproc=${NPROC:-2}
where=()
if ((nnodes > 1)); then
  where=(--machine_rank "${NODE_RANK:?the number of this machine, from 0}")
  where+=(--main_process_ip "${MASTER_ADDR:?the host that is number 0}")
fi
if ((nnodes * nproc > 1)); then where+=(--multi_gpu); fi
export HF_HOME=${HF_HOME:-$PWD/runs/accelerate} # where no config of the user's lies
exec .venv/bin/accelerate launch --num_machines "$nnodes" --num_processes $((nnodes * nproc)) "${where[@]}" \
  --main_process_port "${MASTER_PORT:-29500}" --mixed_precision no --dynamo_backend no launch/train.py "$@"
