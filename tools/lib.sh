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

# missing_debian PACKAGE...: prints those Debian packages that are not installed.
missing_debian() {
  local package
  for package; do
    if [[ "$(dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null)" != ii* ]]; then
      echo "$package"
    fi
  done
}

# install_debian PACKAGE...: installs Debian packages, as root or with sudo.
install_debian() {
  local sudo=()
  if [[ $(id -u) != 0 ]]; then
    command -v sudo >/dev/null || die "run as root, or install sudo"
    sudo=(sudo)
  fi
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# bazel_quietly COMMAND ARGS...: runs Bazel; warnings and errors alone go to stderr.
bazel_quietly() {
  local command=$1
  shift
  bazel "$command" --noshow_progress --ui_event_filters=-info,-debug,-stdout "$@" >&2
}

# The folder that tools/install_aarch64 makes, and the flags with which Bazel builds by it.
AARCH64=$SYNCBN_DEPS/aarch64
AARCH64_FLAGS=(
  --config=aarch64 "--repo_env=CC=$AARCH64/gcc"
  "--repo_env=SYNCBN_CUDA_HOST_COMPILER=$AARCH64/gcc" "--repo_env=SYNCBN_CUDA_LIBRARIES=$AARCH64/cuda/nvidia/cu13/lib"
)

# make_once FOLDER STAMP WHAT COMMAND ARGS...: makes an environment by the command, unless that is done; another STAMP is
# another environment. Whoever else wants it in the meantime waits.
make_once() {
  local folder=$1 complete=$1/.complete-$2 what=$3
  shift 3
  [[ -f $complete ]] && return
  mkdir -p "$(dirname "$folder")"
  (
    flock 9
    [[ -f $complete ]] && exit
    say "Making an environment with $what (PyPI)"
    rm -rf "$folder"
    "$@"
    touch "$complete"
  ) 9>"$folder.lock"
}

install_venv() {
  local folder=$1
  shift
  "$PYTHON" -m venv "$folder"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# make_venv NAME PACKAGE...: an environment of $PYTHON with just these packages, made once.
make_venv() {
  local folder=$SYNCBN_DEPS/venvs/$1
  shift
  make_once "$folder" "$(tr ' ' - <<<"$*")" "$*" install_venv "$folder" "$@"
}

# Current versions of the frameworks, which several tests share.
CURRENT_PACKAGES="torch==2.15.0 timm==1.0.31 jax==0.10.2 numpy pytest"
make_current_venv() {
  local packages
  read -ra packages <<<"$CURRENT_PACKAGES"
  make_venv current "${packages[@]}"
}

# make_overlay NAME FOLDER: an environment on top of that one, to install more into.
make_overlay() {
  local python=$SYNCBN_DEPS/venvs/$1/bin/python
  "$python" -m venv --without-pip "$2"
  "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$2/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
}

# install_overlay FOLDER PIP_ARGS...: an environment on top of the current versions of the frameworks.
install_overlay() {
  local folder=$1
  shift
  make_overlay current "$folder"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

ensure_deps() {
  if ! "$(dirname "${BASH_SOURCE[0]}")/install_deps" --check; then
    tools/install_deps
  fi
}

# fingerprint [PYTHON...]: prints a hash of what the outcome of a test depends on: the commit, the working tree's files
# but for those that git ignores, the machine's and the interpreters' packages, and SYNCBN_ variables. Prints nothing
# where git does not know the tree.
fingerprint() {
  git rev-parse --verify --quiet HEAD >/dev/null 2>&1 || return 0
  local python list='import importlib.metadata as m; print(sorted((d.metadata["Name"], d.version) for d in m.distributions()))'
  {
    git rev-parse HEAD
    # A file that is in the index and not in the tree is not in the list.
    git ls-files -z --cached --others --exclude-standard | xargs -0 sha256sum 2>&1 || true
    git ls-files -z --cached --others --exclude-standard | xargs -0 stat -c '%A %N' 2>&1 || true
    cat user.bazelrc 2>/dev/null || true
    dpkg-query --show 2>/dev/null || true
    for python in "$@"; do "$python" -c "$list"; done
    grep -m 1 '^flags' /proc/cpuinfo || true
    env | grep '^SYNCBN_' | sort || true
  } | sha256sum | cut -d ' ' -f 1
}
