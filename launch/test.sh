#!/usr/bin/env bash
# Runs the test suite (the linters are among the tests) on the CPU. Arguments go to pytest: bash launch/test.sh tests/cli -k help
# TEST_WORKERS=N sets the number of processes (default 2; 0 runs everything in one). TEST_EXTRAS=dev leaves out torch and
# what else tests/parity, tests/weights and tests/text compare with. TEST_CASES=N runs at most N cases of a parametrised
# test.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

extras="${TEST_EXTRAS:-dev,parity}"
case "$extras" in
  # Pinned and first: where the index has a CPU build it has this one, while an open "torch" brings gigabytes of CUDA.
  *parity*) ENV_FIRST="torch==2.13.0" ;;
esac
ensure_env "$extras" scikit-video
cd "$ROOT"
export JAX_PLATFORMS=cpu
start=$SECONDS
status=0

workers="${TEST_WORKERS:-2}"
say "pytest in $workers processes"
# pytest-xdist would run the test that killed a process again, up to eight times; so the suite ends once the other
# process has done what it has begun.
"$VENV_PYTHON" -m pytest -q -n "$workers" --dist loadfile --no-loadscope-reorder --max-worker-restart 0 "$@" || status=$?
say "launch/test.sh: $([ "$status" = 0 ] && echo passed || echo "FAILED with exit code $status") in $((SECONDS - start)) s"
exit "$status"
