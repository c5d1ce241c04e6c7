"""Commands of the package: python -m syncbn doctor | quickstart | master, each with --help."""

import argparse
import pathlib
import runpy
import sys
from typing import List

from syncbn import _doctor, _program

_MODULES = pathlib.Path(__file__).resolve().parent


def _quickstart(arguments: List[str]) -> int:
    """Runs the quickstart that a wheel has beside these modules, or that of the source tree."""
    places = (_MODULES / "_examples", _MODULES.parents[1] / "examples")
    script = next((place / "quickstart/quickstart.py" for place in places if place.is_dir()), None)
    if script is None:
        print("syncbn: this installation has no quickstart; a wheel of tools/build_wheel does", file=sys.stderr)
        return 2
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0


_COMMANDS = {"doctor": _doctor.main, "quickstart": _quickstart, "master": _program.run}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m syncbn",
        description="doctor: checks this installation. quickstart: trains with four workers, and compares them with one "
        "process. master: syncbn-master.",
    )
    parser.add_argument("command", choices=list(_COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command; --help shows them")
    given = parser.parse_args()
    return _COMMANDS[given.command](given.arguments)


if __name__ == "__main__":
    sys.exit(main())
