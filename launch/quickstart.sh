#!/usr/bin/env bash
# Trains a small teacher and its streaming student on this machine, streams a video and writes a report.
#   bash launch/quickstart.sh [--workdir DIR] [--clips DIR --captions FILE] [--controls] [--fast] [-h]
# A second run goes on where the first one stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

ensure_env ""
exec "$VENV_PYTHON" -m greedy_distill_jax.quickstart "$@"
