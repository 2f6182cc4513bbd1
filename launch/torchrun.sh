#!/usr/bin/env bash
# launch/train.py under torchrun. Arguments go to the script (--help lists them).
#
#   bash launch/torchrun.sh                          this machine
#   bash launch/torchrun.sh --steps 30 --config launch/zero/ds_zero3.json
#   NNODES=2 RDZV_ENDPOINT=node0:29400 NPROC=8 bash launch/torchrun.sh       the same line on each of two machines
#
# NPROC            processes on this machine: one per GPU (2)
# NNODES           machines (1)
# RDZV_ENDPOINT    with several: HOST:PORT, a host of the job and a free port of it, the same on every machine
# RDZV_ID          with several: a name of the job, the same on every machine (dist-agc)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh demo

nnodes=${NNODES:-1}
if ((nnodes == 1)); then
  meet=(--rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1) # a free port
else
  meet=(--rdzv-endpoint "${RDZV_ENDPOINT:?HOST:PORT where the machines meet, the same on each}")
  meet+=(--rdzv-id "${RDZV_ID:-dist-agc}")
fi
exec .venv/bin/python -m torch.distributed.run --nnodes "$nnodes" --nproc-per-node "${NPROC:-2}" \
  --rdzv-backend c10d "${meet[@]}" launch/train.py "$@"
