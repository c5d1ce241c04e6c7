#!/bin/sh
# The library exports syncbn_* and nothing else, and every function of the header.
set -eu
library=$1
header=$2
nm -D --defined-only --extern-only "$library" | awk '{print $3}' | sort -u > exported
sed -n 's/^SYNCBN_API [^(]*[ *]\(syncbn_[a-z0-9_]*\)(.*/\1/p' "$header" | sort -u > declared
test "$(wc -l < declared)" -gt 40
diff declared exported
echo "$(wc -l < exported) functions, as declared"
