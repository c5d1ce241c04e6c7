# Shared by the scripts in this folder; to be sourced.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SYNCBN_DEPS="${SYNCBN_DEPS:-$HOME/.cache/syncbn}"
export SYNCBN_DEPS
# Debian's interpreter, for which Debian's torch is built.
PYTHON="${SYNCBN_PYTHON:-/usr/bin/python3}"
export PYTHONDONTWRITEBYTECODE=1

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }

die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# bazel_quietly COMMAND ARGS...: runs Bazel; warnings and errors alone go to stderr.
bazel_quietly() {
  local command=$1
  shift
  bazel "$command" --noshow_progress --ui_event_filters=-info,-debug,-stdout "$@" >&2
}

ensure_deps() {
  if ! "$(dirname "${BASH_SOURCE[0]}")/install_deps" --check; then
    tools/install_deps
  fi
}
