# shellcheck shell=bash
# Sourced by the scripts beside it: `ensure_env EXTRAS` makes .venv at the top of the checkout ready and sets VENV_PYTHON.
# PYTHON=... chooses the interpreter that creates .venv, VENV=... another folder.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
VENV_PYTHON="$VENV/bin/python"

say() { printf '%s\n' "$*" >&2; }

die() {
  say "error: $*"
  exit 2
}

_new_enough() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    _new_enough "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or newer with the venv module; set PYTHON to one."
    printf '%s\n' "$PYTHON"
    return
  fi
  local candidate
  for candidate in python3 python3.12 python3.11 python3.13 python; do
    if command -v "$candidate" >/dev/null 2>&1 && _new_enough "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "no Python 3.11 or newer (with the venv module) found; install one or set PYTHON=/path/to/python3.12."
}

# The stamp says which setup.py, extras and interpreter .venv was installed for.
_stamp_of() {
  "$VENV_PYTHON" - "$ROOT" "$1" <<'PY'
import hashlib, pathlib, sys
root, extras = sys.argv[1:]
setup = (pathlib.Path(root) / "setup.py").read_bytes()
text = setup + f"|{extras}|{sys.version}|{root}".encode()
print(hashlib.sha256(text).hexdigest())
PY
}

# ensure_env EXTRAS [PACKAGE...]: packages are installed after the checkout, without their own requirements;
# those named in ENV_FIRST are installed before it.
ensure_env() {
  local extras="$1" stamp wanted python target
  shift
  if ! _new_enough "$VENV_PYTHON" || ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
    python="$(find_python)" || exit 2
    say "creating $VENV with $("$python" --version 2>&1)"
    rm -rf "$VENV"
    "$python" -m venv "$VENV" || die "$python cannot create $VENV; install its venv module or set PYTHON to another one."
  fi
  stamp="$VENV/installed-${extras:-base}"
  wanted="$(_stamp_of "${ENV_FIRST:-} $extras $*")"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  target="$ROOT${extras:+[$extras]}"
  say "installing greedy_distill_jax${extras:+[$extras]} into $VENV (a few minutes the first time)"
  rm -f "$stamp"
  local start=$SECONDS
  if [ -n "${ENV_FIRST:-}" ]; then
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check $ENV_FIRST ||
      die "pip could not install $ENV_FIRST (its messages are above); run the same command again to go on."
  fi
  "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$target" ||
    die "pip could not install $target (its messages are above); run the same command again to go on."
  if [ $# -gt 0 ]; then
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps "$@" ||
      die "pip could not install $* (its messages are above); run the same command again to go on."
  fi
  printf '%s\n' "$wanted" >"$stamp.tmp" && mv "$stamp.tmp" "$stamp"
  say "installed in $((SECONDS - start)) s"
}
