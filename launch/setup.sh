#!/usr/bin/env bash
# Makes .venv with dist_agc (editable) and the extras named, at the versions of launch/constraints.txt.
#
#   bash launch/setup.sh                       the demo's environment
#   bash launch/setup.sh dev                   everything the tests need
#   PYTHON=python3.12 bash launch/setup.sh     with another Python than python3
#
# Runs again at no cost: pip is called only when the project's dependencies, the constraints or the extras changed.
# An environment whose making was cut short is made anew. pip's own settings (index, proxy, cache) are respected.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
python=$venv/bin/python
stamp=$venv/.setup-done # what is installed: a key, then the extras
busy=$venv/.setup-busy  # process id of the setup at work; stays behind when that is cut short
log=$venv/setup.log

fail() {
  echo "setup: $*" >&2
  exit 1
}

step() {
  local title=$1
  shift
  echo "setup: $title"
  if ! "$@" >>"$log" 2>&1 </dev/null; then
    tail -n 30 "$log" >&2
    if [[ $title != environment* ]]; then rm -f "$busy"; fi # pip gave up by itself: what is there stays usable
    fail "$title failed (whole log: $log)"
  fi
}

pip_install() {
  "$python" -m pip install --disable-pip-version-check --no-input --constraint launch/constraints.txt "$@"
}

# Its setup script imports torch and so must see this environment. The two operators that it would otherwise compile in the
# middle of a run are compiled here: ranks wait for that compiler, and for ever when a run was ended during it.
install_deepspeed() {
  pip_install setuptools wheel ninja &&
    DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1 DS_BUILD_CPU_ADAM=1 \
      pip_install --no-build-isolation --no-cache-dir deepspeed
}

# For the audit of tests/audit/, apart from all else: torchvision's compiled library is linked to torch for CUDA, and where
# torch is that for CPU, transformers would find a torchvision that cannot be imported. tests/audit/pictures.py can.
install_pictures() {
  local pins
  mapfile -t pins < <(grep -E '^(timm|torchvision)==' launch/constraints.txt)
  pip_install --no-deps --upgrade --target "$venv/pictures" "${pins[@]}"
}

has() { [[ " $1 " == *" $2 "* ]]; } # has "LIST OF WORDS" WORD

wanted=${*:-demo}
for extra in $wanted; do
  grep -qE "^$extra = \[" pyproject.toml || fail "pyproject.toml has no extra named '$extra'"
done

if [[ -e $busy ]]; then
  owner=$(<"$busy")
  ! kill -0 "$owner" 2>/dev/null || fail "another setup is at work (process $owner): wait for it, or end it and delete $venv"
  echo "setup: removing an unfinished $venv"
  rm -rf "$venv"
elif [[ -d $venv ]] && ! "$python" -c '' 2>/dev/null; then
  echo "setup: removing a $venv without a working Python"
  rm -rf "$venv"
fi

# Tool settings at the end of pyproject.toml do not matter here; the folder does, since scripts in .venv hold its path.
key=$({ pwd && sed '/^\[tool\./,$d' pyproject.toml && cat launch/constraints.txt launch/setup.sh; } | sha256sum | cut -c1-16)
installed=""
if [[ -e $stamp ]]; then
  read -r old_key installed <"$stamp"
  missing=0
  for extra in $wanted; do has "$installed" "$extra" || missing=1; done
  if [[ $old_key == "$key" && $missing == 0 ]]; then exit 0; fi
fi
for extra in $installed; do has "$wanted" "$extra" || wanted+=" $extra"; done
if has "$wanted" dev; then # it contains these; noted for the scripts that ask for them
  for extra in accelerate deepspeed demo; do has "$wanted" "$extra" || wanted+=" $extra"; done
fi

if [[ ! -d $venv ]]; then
  base=${PYTHON:-python3}
  command -v "$base" >/dev/null || fail "no $base here: install Python 3.10 or newer, or name one with PYTHON=/path/to/python"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$base" --version 2>&1) is too old: dist_agc needs Python 3.10 or newer; name one with PYTHON=/path/to/python"
  mkdir "$venv"
  echo $$ >"$busy"
  step "environment in $venv ($("$base" --version))" "$base" -m venv "$venv"
fi
echo $$ >"$busy"
rm -f "$stamp"

# torch comes first and by its pin: a range, here or in another package, could bring another build of several gigabytes.
step "$(grep '^torch==' launch/constraints.txt)" pip_install "$(grep '^torch==' launch/constraints.txt)"
if has "$wanted" dev || has "$wanted" deepspeed; then
  step "deepspeed and its CPU operators, compiled" install_deepspeed
fi
step "dist_agc[${wanted// /,}]" pip_install --editable ".[${wanted// /,}]"
if has "$wanted" dev; then
  step "timm and torchvision, apart" install_pictures
fi

echo "$key $wanted" >"$stamp"
rm -f "$busy"
