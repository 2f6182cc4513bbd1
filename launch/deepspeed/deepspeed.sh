#!/usr/bin/env bash
# Train with DeepSpeed and AGC, started by the DeepSpeed launcher: bash launch/deepspeed/deepspeed.sh ds_zero3.json [--steps 30]
# NPROC processes (2); on a machine without accelerators say DS_ACCELERATOR=cpu. Several hosts: add --hostfile to the call.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
bash launch/setup.sh deepspeed demo
export PATH=$PWD/.venv/bin:$PATH
config=${1:?a JSON of launch/deepspeed, such as ds_zero3.json}
shift
exec deepspeed --num_gpus "${NPROC:-2}" --master_addr 127.0.0.1 "$here/train.py" --config "$here/$config" "$@"
