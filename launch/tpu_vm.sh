#!/usr/bin/env bash
# Installs this checkout on every worker of a TPU VM, and trains there; run it where gcloud is logged in.
#   TPU=NAME ZONE=ZONE bash launch/tpu_vm.sh install
#   TPU=NAME ZONE=ZONE bash launch/tpu_vm.sh train --config=FILE --workdir=DIR [--config.key=value ...]
#   TPU=NAME ZONE=ZONE bash launch/tpu_vm.sh logs
#   TPU=NAME ZONE=ZONE bash launch/tpu_vm.sh stop
# install copies the files that git tracks, with your changes to them. train starts launch/train.sh on all workers, where
# it goes on without this shell; they find each other by the metadata server. logs follows what they say. stop sends
# SIGTERM: the training saves and ends. --workdir is a folder that all of them see (gcsfuse, Filestore).
# PROJECT=NAME chooses the project; RESTARTS, PAUSE, DEVICES and JOIN_TIMEOUT are handed on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

usage="TPU=NAME ZONE=ZONE bash launch/tpu_vm.sh install | train OPTIONS | logs | stop"
[ -n "${TPU:-}" ] && [ -n "${ZONE:-}" ] || die "TPU and ZONE are not both set; $usage"
command -v gcloud >/dev/null 2>&1 || die "gcloud is not there; install the Google Cloud CLI."
where=("$TPU" "--zone=$ZONE" "--worker=all" ${PROJECT:+"--project=$PROJECT"})
folder=greedy_distill_jax
job='^bash [l]aunch/train.sh' # the command line of train.sh, and not of the shell that looks for it

on_all() { gcloud compute tpus tpu-vm ssh "${where[@]}" --command="$1"; }

case "${1:-}" in
  install)
    archive="$(mktemp -d)/$folder.tar.gz"
    trap 'rm -rf "$(dirname "$archive")"' EXIT
    git -C "$ROOT" ls-files -z | tar -C "$ROOT" --null --files-from=- -czf "$archive"
    gcloud compute tpus tpu-vm scp "$archive" "$TPU:$folder.tar.gz" "${where[@]:1}"
    on_all "mkdir -p $folder && tar -xzf $folder.tar.gz -C $folder && cd $folder && \
bash -c 'source launch/_env.sh && ensure_env tpu'"
    ;;
  train)
    shift
    settings=""
    for name in RESTARTS PAUSE DEVICES JOIN_TIMEOUT; do
      [ -z "${!name:-}" ] || settings+="$name=$(printf '%q' "${!name}") "
    done
    on_all "cd $folder || { echo 'install comes first' >&2; exit 2; }; \
if pgrep -f '$job' >/dev/null; then echo 'a training runs here' >&2; exit 2; fi; \
${settings}nohup bash launch/train.sh$(printf ' %q' "$@") >>train.log 2>&1 </dev/null &"
    ;;
  logs) on_all "tail -n 20 -F $folder/train.log" ;;
  stop) on_all "pkill -TERM -f '$job'" ;;
  *) die "'${1:-}' is none of install, train, logs, stop; $usage" ;;
esac
