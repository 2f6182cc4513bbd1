#!/usr/bin/env bash
# launch/train.py under the DeepSpeed launcher. Arguments go to the script (--help lists them).
#
#   bash launch/deepspeed.sh --config launch/zero/ds_zero3.json
#   HOSTFILE=hosts MASTER_ADDR=node0 bash launch/deepspeed.sh --config ...     several machines, reached by ssh
#
# NPROC          processes on this machine: one per GPU (2)
# HOSTFILE       with several machines: lines of "HOST slots=PROCESSES"
# MASTER_ADDR    with several machines: the first host of HOSTFILE
# MASTER_PORT    a free port there (29500)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh deepspeed demo

# The launcher starts `python` and, on other machines, looks for the same path.
export PATH=$PWD/.venv/bin:$PATH
if [[ -n ${HOSTFILE:-} ]]; then
  where=(--hostfile "$HOSTFILE" --master_addr "${MASTER_ADDR:?the first host of HOSTFILE}")
else
  where=(--num_gpus "${NPROC:-2}" --master_addr 127.0.0.1)
fi
exec deepspeed "${where[@]}" --master_port "${MASTER_PORT:-29500}" --no_local_rank launch/train.py "$@"
