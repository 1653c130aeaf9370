#!/usr/bin/env bash
# Looks at the hosts (launch/preflight.py), trains, and starts again after a fault that another start may cure, from the
# newest whole checkpoint that is not damaged (docs/errors.md):
#   bash launch/train.sh --config=FILE --workdir=DIR [--config.key=value ...]
# Run it once per process (pods of Kubernetes, workers of a TPU VM), or once per job with what starts the processes in
# LAUNCHER, such as LAUNCHER="srun --kill-on-bad-exit=1" (launch/slurm.sbatch).
#
# RESTARTS=N    starts again at most N times in a row without a new checkpoint (default 3; 0 leaves it to a scheduler)
# PAUSE=S       seconds before that (default 10)
# DEVICES=N     devices that every process is to have (default: what its launcher gave it; alone, its cards)
# STOP=COMMAND  hands a SIGTERM to this script on to all processes (default: SIGTERM to what it started)
# VENV=DIR      environment in which the package is installed (default .venv of the checkout)
#
# Ends with the training's exit code. What is tried again: 75 (a process is gone or hung), and ends by a signal: 134
# (jax aborts whoever loses the others), 135, 137 (killed: out of memory, or the host), 139, and 253, which srun makes of
# a task that was killed out of memory. A preflight that finds something wrong ends with 2 and is not tried again.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

[ -x "$VENV_PYTHON" ] || die "$VENV_PYTHON is not there; install the package into $VENV (docs/pods.md), or set VENV."
RESTARTS="${RESTARTS:-3}" PAUSE="${PAUSE:-10}" DEVICES="${DEVICES:-0}"
for name in RESTARTS PAUSE DEVICES; do
  [[ "${!name}" =~ ^[0-9]+$ ]] || die "$name is ${!name}; it must be a number from 0 on."
done
read -r -a launcher <<<"${LAUNCHER:-}"

workdir="" previous=""
for argument in "$@"; do
  case "$argument" in --workdir=* | -workdir=*) workdir="${argument#*=}" ;; esac
  case "$previous" in --workdir | -workdir) workdir="$argument" ;; esac
  previous="$argument"
done
[ -n "$workdir" ] || die "--workdir=DIR is missing."
case "$workdir" in \~ | \~/*) workdir="$HOME${workdir:1}" ;; esac # as the training does

newest() { # the newest whole step; "" for none, or a folder that is not one of this host
  local path step newest=""
  for path in "$workdir"/checkpoints/*; do
    step="${path##*/}"
    if [[ "$step" =~ ^[0-9]+$ ]] && { [ -z "$newest" ] || [ "$step" -gt "$newest" ]; }; then newest="$step"; fi
  done
  printf '%s' "$newest"
}

child="" told="" stopped="" by=""
stop() { # a shell that waits in the foreground would not hear a scheduler's signal before the training ends
  stopped="$1"
  [ -n "$child" ] || return
  told="$child"
  if [ -n "$by" ]; then $by; else kill -TERM "$child" 2>/dev/null; fi
}
trap 'stop 143' TERM
trap 'stop 130' INT

start() { # STOP COMMAND: in the background
  by="$1"
  "${@:2}" &
  child=$!
  # A signal before that line has found nobody to tell.
  [ -z "$stopped" ] || [ "$told" = "$child" ] || stop "$stopped"
}

run() { # runs a command in the background, where signals to this script reach it, and returns its exit code
  local code
  [ -z "$stopped" ] || return "$stopped"
  start "${STOP:-}" ${launcher[@]+"${launcher[@]}"} "$VENV_PYTHON" "$@" # bash before 4.4 knows no empty array
  while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break # else a signal ended the wait, not the command
  done
  wait "$child" 2>/dev/null
  code=$?
  child=""
  return "$code"
}

failures=0 before="$(newest)" # the newest step ever seen: a damaged one that is moved away and made again is none
while :; do
  run "$ROOT/launch/preflight.py" "--devices=$DEVICES" "$@"
  code=$?
  if [ "$code" = 0 ]; then
    run -m greedy_distill_jax.train "$@"
    code=$?
  fi
  [ -z "$stopped" ] || exit "$code"
  case "$code" in 75 | 134 | 135 | 137 | 139 | 253) ;; *) exit "$code" ;; esac
  after="$(newest)"
  if [ "${after:--1}" -gt "${before:--1}" ]; then failures=0 before="$after"; fi
  if [ "$failures" -ge "$RESTARTS" ]; then
    say "train.sh: exit code $code; no further start after $failures without a new checkpoint (RESTARTS=$RESTARTS)"
    exit "$code"
  fi
  failures=$((failures + 1))
  say "train.sh: exit code $code; starting again from step ${after:-0} in $PAUSE s ($failures of $RESTARTS)"
  start "" sleep "$PAUSE"
  wait "$child"
  child=""
  [ -z "$stopped" ] || exit "$stopped"
done
