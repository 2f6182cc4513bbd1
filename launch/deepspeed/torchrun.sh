#!/usr/bin/env bash
# Train with DeepSpeed and AGC, started by torchrun: bash launch/deepspeed/torchrun.sh ds_zero2.json [--steps 30]
# NPROC processes (2); on a machine without accelerators say DS_ACCELERATOR=cpu.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
bash launch/setup.sh deepspeed demo
export PATH=$PWD/.venv/bin:$PATH
config=${1:?a JSON of launch/deepspeed, such as ds_zero2.json}
shift
exec torchrun --standalone --nproc-per-node "${NPROC:-2}" "$here/train.py" --config "$here/$config" "$@"
