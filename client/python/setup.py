"""Takes the version from the file VERSION, and gives the wheel its platform: it holds a shared library, though nothing
that is bound to one version of Python.
"""

import os
import pathlib
import sys
from typing import Any, Tuple

from setuptools import Distribution, setup

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # Before setuptools 70.1.
    from wheel.bdist_wheel import bdist_wheel

_HERE = pathlib.Path(__file__).resolve().parent


def version() -> str:
    """The content of the file beside this one, where tools/build_wheel puts it, or at the root of the source tree."""
    for folder in (_HERE, _HERE.parents[1]):
        if (folder / "VERSION").is_file():
            return (folder / "VERSION").read_text().strip()
    sys.exit("syncbn: there is no file VERSION: install from a clone, or make a wheel there with tools/build_wheel")


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    def run(self) -> None:
        library = _HERE / "syncbn" / "libsyncbn.so"
        if not library.is_file() and not os.environ.get("SYNCBN_LIBRARY"):
            sys.exit(
                f"syncbn: there is no {library}, without which the package does not work. tools/build_wheel makes a whole "
                "wheel: pip install dist/syncbn-*.whl. To use the modules with another libsyncbn.so, set SYNCBN_LIBRARY to it"
            )
        super().run()

    def get_tag(self) -> Tuple[str, str, Any]:
        return "py3", "none", super().get_tag()[2]


setup(version=version(), distclass=PlatformDistribution, cmdclass={"bdist_wheel": PlatformWheel})
