#!/bin/sh
# The header, and every *_INIT of it, in each language mode that it promises, with each compiler there is; no warning.
set -eu
header=$1
folder=$(dirname "$header")
{
  echo '#include "syncbn.h"'
  sed -n 's/^#define \(SYNCBN_\([A-Z_]*\)_INIT\) .*/\1/p' "$header" | while read -r init; do
    type=$(echo "${init%_INIT}" | tr '[:upper:]' '[:lower:]')
    printf 'static size_t size_of_%s(void) { const %s options = %s; return options.struct_size; }\n' "$type" "$type" "$init"
    printf '#define CHECK_%s if (size_of_%s() != sizeof(%s)) return 1;\n' "$init" "$type" "$type"
  done
  echo 'int main(void) {'
  sed -n 's/^#define \(SYNCBN_[A-Z_]*_INIT\) .*/  CHECK_\1/p' "$header"
  echo '  return SYNCBN_PENDING == -1 && SYNCBN_NEXT_SEQUENCE > 0 ? 0 : 1;'
  echo '}'
} > modes.c
cp modes.c modes.cc
test "$(grep -c '^  CHECK_' modes.c)" -gt 6
flags="-pedantic-errors -Wall -Wextra -Wconversion -Wsign-conversion -Wshadow -Werror -I$folder"
count=0
try() { # compiler, mode, source
  command -v "$1" >/dev/null || return 0
  # shellcheck disable=SC2086
  "$1" -std="$2" $flags -c "$3" -o modes.o
  count=$((count + 1))
}
for mode in c99 c11 c17; do
  try gcc "$mode" modes.c
  try clang-14 "$mode" modes.c
done
for mode in c++11 c++14 c++17 c++20; do
  try g++ "$mode" modes.cc
  try clang++-14 "$mode" modes.cc
done
test "$count" -ge 7
gcc -std=c99 $flags modes.c -o in_c && ./in_c
g++ -std=c++11 $flags modes.cc -o in_cpp && ./in_cpp
echo "$count modes"
