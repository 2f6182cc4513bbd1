#!/usr/bin/env bash
# The whole check, as CI runs it. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
bash tests/run.sh [STAGE ...] [-- PYTEST ARGUMENTS]

Makes the environment if it is missing, runs the stages named (by default all but newest) and stops at the first that
fails.
  lint      ruff check, ruff format --check
  types     pyright over dist_agc, docs/study and tests
  docs      the pages of docs/ built into site/, with every warning an error
  unit      tests of one process, the doctests of dist_agc; as many at once as there are cores, at most 4
  mpi       tests of several processes, under mpirun with 2, 3 and 4 ranks
  coverage  what unit and 2 ranks of mpi have covered, lines and branches together; below 95 % is an error
  composer  tests with MosaicML Composer and the oldest torch, in an environment of its own (.venv-composer, 6 GB)
  newest    tests of two processes and dist-agc check with the newest torch and DeepSpeed that pip finds, in an
            environment of its own (.venv-newest, 6 GB)
What follows -- goes to pytest: bash tests/run.sh unit mpi -- -k dtensor
The last line sums the tests: "N passed, N failed"; a stage that fails without a failed test counts as one.
END
}

stages=""
while (($#)); do
  case $1 in
    -h | --help) usage && exit ;;
    lint | types | docs | unit | mpi | composer | coverage | newest) stages+=" $1" ;;
    --) shift && break ;;
    *) usage >&2 && exit 2 ;;
  esac
  shift
done
pytest_args=("$@")
stages=${stages:- lint types docs unit mpi coverage composer}

passed=0
failed=0
logs=$(mktemp -d)
finish() {
  local status=$?
  if [[ -n ${composer_env-} ]]; then kill "$composer_env" 2>/dev/null || true; fi
  rm -rf "$logs"
  if ((status != 0 && failed == 0)); then failed=1; fi
  echo "tests/run.sh:${stages} took $SECONDS s, exit code $status"
  echo "$passed passed, $failed failed"
}
trap finish EXIT

# Runs tests and adds up what pytest's closing line says (-a: the MPI version that pytest-mpi prints holds a zero byte).
run_tests() {
  local log=$1 line status=0
  shift
  "$@" </dev/null |& tee "$log" || status=$?
  line=$(grep -aE '^(=+ )?[0-9]+ [a-z]+.* in [0-9.]+s' "$log" | tail -n 1 || true)
  passed=$((passed + $(sum_of passed <<<"$line")))
  failed=$((failed + $(sum_of 'failed|error' <<<"$line")))
  return "$status"
}

sum_of() {
  { grep -oE "[0-9]+ ($1)" || true; } | awk '{ sum += $1 } END { print sum + 0 }'
}

# pytest exits 0 when it has skipped every test: nothing shown is not a success.
some_passed() {
  ((passed > 0)) || { echo "no test passed" >&2 && return 1; }
}

lint() {
  python -m ruff check .
  python -m ruff format --check .
}

types() {
  python -m pyright
}

docs() {
  python -m sphinx -W --keep-going -n --quiet -d build/docs docs site
}

unit() {
  # One thread each: those of several tests at once would wait for each other.
  OMP_NUM_THREADS=1 run_tests "$logs/unit" python -m coverage run -m pytest dist_agc docs/study/tests tests \
    --ignore tests/mosaicml --ignore dist_agc/integrations/composer.py --doctest-modules -m "not mpi" --color=no \
    -n logical --maxprocesses 4 --dist worksteal "${pytest_args[@]}"
  some_passed
}

# Rank 0 is read as it comes; the others write into files of their own, shown when the run failed.
as_rank='
if [[ $OMPI_COMM_WORLD_RANK != 0 ]]; then exec >"$0.$OMPI_COMM_WORLD_RANK" 2>&1; fi
exec "$@"
'

ranks() { # ranks N COMMAND...: the tests of several processes, with N of them
  local n=$1 rank log=$logs/mpi$1 status=0 files
  shift
  echo "-- $n ranks"
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
  # The tests see to it that all ranks end alike, so that rank 0 speaks for all.
  # Only the files that have such tests, since to import the others takes a minute; and what costs threads last.
  mapfile -t files < <(grep -rlF pytest.mark.mpi tests --include='test_*.py' --exclude-dir=mpi --exclude-dir=mosaicml)
  run_tests "$log.0" timeout --kill-after=30 2000 mpirun -n "$n" --oversubscribe --bind-to none \
    bash -c "$as_rank" "$log" "$@" -m pytest "${files[@]}" tests/mpi --with-mpi -m mpi -q \
    --color=no -p no:cacheprovider "${pytest_args[@]}" || status=$?
  ((status != 0)) || return 0
  for ((rank = 1; rank < n; rank++)); do
    echo "-- rank $rank of $n"
    tail -n 200 "$log.$rank" || true
  done
  return "$status"
}

mpi() {
  ranks 2 python -m coverage run
  # Without coverage's tracer, which costs a third: they run the same code.
  ranks 3 python
  ranks 4 python
  some_passed
}

newest() {
  bash launch/newest-env.sh
  local PATH=$PWD/.venv-newest/bin:$PATH
  export PYTHONPATH=$PWD
  ranks 2 python
  some_passed
  python -m dist_agc.cli check --nproc 2
}

composer() {
  wait "$composer_env" || { cat "$logs/composer-env" && return 1; }
  run_tests "$logs/composer" bash tests/mosaicml/run.sh "${pytest_args[@]}"
}

coverage() {
  python -m coverage combine --quiet
  python -m coverage report
}

# Mostly waits for the network and the disk, so it is made beside all that comes before its tests.
if [[ " $stages " == *" composer "* ]]; then
  bash launch/composer-env.sh >"$logs/composer-env" 2>&1 &
  composer_env=$!
fi
if [[ $stages != " newest" ]]; then bash launch/setup.sh dev; fi
PATH=$PWD/.venv/bin:$PATH
if [[ $stages == *unit* || $stages == *mpi* ]]; then python -m coverage erase; fi
for stage in $stages; do
  echo "== $stage"
  "$stage"
done
