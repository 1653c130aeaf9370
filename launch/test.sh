#!/usr/bin/env bash
# Runs the linter and the whole test suite on the CPU. Arguments go to pytest: bash launch/test.sh -k streaming
# TEST_WORKERS=N sets the number of processes (default: 2, 0 = one process and no xdist).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

ensure_env dev scikit-video
cd "$ROOT"
export JAX_PLATFORMS=cpu
start=$SECONDS

say "ruff"
"$VENV_PYTHON" -m ruff check --quiet .

workers="${TEST_WORKERS:-2}"
say "pytest, $workers processes (the import rules are among the tests)"
status=0
"$VENV_PYTHON" -m pytest -q -n "$workers" --dist loadfile tests "$@" || status=$?
say "launch/test.sh: exit $status after $((SECONDS - start)) s"
exit "$status"
