#!/usr/bin/env bash
# Installs the packages of a directory in a new Debian 12 without anything else, tries them, and purges them:
#
#   packages_test.sh DIRECTORY
#
# As root, with mmdebstrap, openssl and grpcurl (tools/install_deps). It needs Debian's mirror (SYNCBN_DEBIAN_MIRROR;
# default deb.debian.org). tools/build_deb --test calls it. What runs in the new system listens on that system's own
# loopback.
source "$(dirname "$0")/../../tools/lib.sh"

MIRROR=${SYNCBN_DEBIAN_MIRROR:-http://deb.debian.org}
PACKAGES=(syncbn-master libsyncbn1 libsyncbn-dev python3-syncbn)
# The new system has no /dev/pts.
INSTALL=(apt-get install -qq -o Dpkg::Use-Pty=0 --no-install-recommends)

# in_system COMMAND...: runs it in the new system, with processes of its own that end with it.
in_system() {
  unshare --mount --pid --fork --kill-child bash -c '
    mount -t proc proc "$0/proc" && mount -t tmpfs tmpfs "$0/dev/shm" && exec chroot "$0" env -i \
      PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive "$@"' "$root" "$@"
}

# isolated COMMAND...: as in_system, with a loopback interface and no other.
isolated() {
  export -f in_system
  root=$root unshare --net bash -c 'ip link set lo up && in_system "$@"' bash "$@"
}

bootstrap() {
  say "Making a Debian 12 without anything else"
  mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm "$root" \
    "deb $MIRROR/debian bookworm main" "deb $MIRROR/debian bookworm-updates main" \
    "deb $MIRROR/debian-security bookworm-security main"
  mkdir "$root/test"
}

install_packages() {
  say "Installing ${PACKAGES[*]}"
  cp "$directory"/*.deb "$root/test"
  # mmdebstrap leaves no lists of packages behind.
  in_system sh -ec "apt-get update -qq && ${INSTALL[*]} /test/*.deb >/dev/null"
  in_system test -f /lib/systemd/system/syncbn-master.service
  in_system test -L /etc/systemd/system/multi-user.target.wants/syncbn-master.service
  in_system sh -c 'zcat /usr/share/man/man8/syncbn-master.8.gz' | grep -q -- '--address\|\\-\\-address' ||
    die "the man page does not have the options"
}

make_certificates() {
  tests/deploy/make_certificates "$root/etc/syncbn/tls"
}

try_master_and_trainers() {
  say "Two trainers and the installed master: the installed configuration, certificates, the slow one, an upgrade"
  make_certificates
  make_newer_package
  cp tests/deploy/{try_master,trainer}.py "$SYNCBN_DEPS/bin/grpcurl" "$root/test"
  isolated python3 /test/try_master.py /test/grpcurl /test/newer.deb
}

# The master's package again, with a greater version.
make_newer_package() {
  dpkg-deb --raw-extract "$directory"/syncbn-master_*.deb "$work/newer"
  sed -i 's/^Version: .*/&+newer/' "$work/newer/DEBIAN/control"
  dpkg-deb --root-owner-group -z1 --build "$work/newer" "$root/test/newer.deb" >/dev/null
}

try_development_files() {
  say "A C program outside of Bazel, by pkg-config and by CMake"
  in_system "${INSTALL[@]}" gcc libc6-dev make pkgconf cmake >/dev/null
  mkdir "$root/test/program"
  sed 's|"client/c/syncbn.h"|<syncbn.h>|' client/examples/c/train.c >"$root/test/program/train.c"
  cp tests/deploy/CMakeLists.txt "$root/test/program"
  isolated sh -ec 'cd /test/program
    cc train.c $(pkg-config --cflags --libs syncbn) -lm -o by_pkgconf && ./by_pkgconf
    cmake -S . -B build >/dev/null && cmake --build build >/dev/null && build/train
    readelf -d by_pkgconf build/train | grep -c "NEEDED.*\[libsyncbn.so.1\]" | grep -qx 2'
}

try_python() {
  say "A training by the Python package and Debian's PyTorch, beside one process on the whole batch"
  in_system "${INSTALL[@]}" python3-torch >/dev/null
  cp -r client/examples "$root/test"
  isolated python3 /test/examples/spawn/train.py
}

purge() {
  say "Purging the packages"
  in_system sh -ec 'mkdir -p /var/lib/private/syncbn && touch /var/lib/private/syncbn/state && ln -s private/syncbn /var/lib'
  rm "$root"/etc/syncbn/tls/*
  rm -r "$root/run/credentials"  # They are systemd's, where one runs.
  in_system dpkg -L "${PACKAGES[@]}" >"$work/installed"
  in_system sh -ec "apt-get purge -qq -o Dpkg::Use-Pty=0 ${PACKAGES[*]} >/dev/null"
  local left=() path
  while read -r path; do
    # Folders belong to other packages as well; those that do not have the name in theirs.
    if [[ $path == /* && -e $root$path && ! -d $root$path ]]; then left+=("$path"); fi
  done < <(sort -u "$work/installed")
  while read -r path; do left+=("$path"); done < <(in_system find / -xdev -name '*syncbn*' -not -path '/test/*' \
    -not -path '/proc/*' -not -path '/var/cache/*')
  [[ ${#left[@]} == 0 ]] || die "purging leaves ${left[*]}"
}

[[ $# == 1 && -d $1 ]] || die "usage: packages_test.sh DIRECTORY"
[[ $(id -u) == 0 ]] || die "needs root, to make a system in a folder and run in it"
command -v mmdebstrap >/dev/null || die "needs mmdebstrap"
[[ -x $SYNCBN_DEPS/bin/grpcurl ]] || die "needs grpcurl: tools/install_deps"
directory=$1
work=$(mktemp -d)
root=$work/root
trap 'rm -rf "$work"' EXIT
bootstrap
install_packages
try_master_and_trainers
try_development_files
try_python
purge
say "The packages install, serve, link, train, and leave nothing behind"
