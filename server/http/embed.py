"""Writes the files of the page as string constants of a C++ header: embed.py index.html style.css page.js > page.h."""

import pathlib
import sys

print("// Generated from server/http/page by embed.py.")
print("#ifndef SYNCBN_SERVER_HTTP_PAGE_H_\n#define SYNCBN_SERVER_HTTP_PAGE_H_\n\nnamespace syncbn::http {\n")
for path in map(pathlib.Path, sys.argv[1:]):
    name = "k" + path.stem.capitalize() + path.suffix[1:].capitalize()
    print(f"inline constexpr char {name}[] =")
    for line in path.read_text().splitlines():
        escaped = "".join(
            c if c.isascii() and c.isprintable() and c not in '"\\?' else "".join(f"\\{b:03o}" for b in c.encode())
            for c in line
        )
        print(f'    "{escaped}\\n"')
    print("    ;\n")
print("}  // namespace syncbn::http\n\n#endif  // SYNCBN_SERVER_HTTP_PAGE_H_")
