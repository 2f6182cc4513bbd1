#!/usr/bin/env bash
# The main job on this machine: train a sharded norm-free ResNet with and without AGC. Arguments go to `dist-agc demo`.
#
#   bash launch/demo.sh                              2 processes, FSDP2, handwritten digits
#   bash launch/demo.sh --nproc 4 --task text
#   bash launch/demo.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh demo
exec .venv/bin/dist-agc demo "$@"
