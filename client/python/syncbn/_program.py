"""The master's program, which a wheel has beside these modules; the console script `syncbn-master` is `main`."""

import os
import pathlib
import sys
from typing import List, Optional


def path() -> Optional[pathlib.Path]:
    """$SYNCBN_MASTER, else the one beside these modules; None if there is none."""
    named = os.environ.get("SYNCBN_MASTER")
    found = pathlib.Path(named) if named else pathlib.Path(__file__).with_name("bin") / "syncbn-master"
    return found if found.is_file() else None


def run(arguments: List[str]) -> int:
    """Becomes syncbn-master, so that signals and the exit code are its own. Returns: only if it is not there."""
    program = path()
    if program is None:
        print(
            "syncbn-master: this installation has no program of the master; a wheel of tools/build_wheel does, and "
            "SYNCBN_MASTER may name one",
            file=sys.stderr,
        )
        return 2
    sys.stdout.flush()
    os.execv(program, ["syncbn-master", *arguments])


def main() -> int:
    return run(sys.argv[1:])
