#!/bin/sh
# Prints the one block of a language in a page as the body of a function, below the block's own #include, for a compiler:
#
#   readme_block.sh PAGE LANGUAGE 'FUNCTION(PARAMETERS)' ['LAST STATEMENT;']
set -eu
test "$(grep -c "^\`\`\`$2\$" "$1")" = 1
awk -v fence="\`\`\`$2" -v head="$3 {" -v last="${4:-}" '
  $0 == fence { inside = 1; next }
  /^```$/ { inside = 0 }
  inside && /^#include/ { print; next }
  inside && !begun { print head; begun = 1 }
  inside { print }
  END { print last; print "}" }' "$1"
