"""Runs a program with `syncbn.torch.install()` done:

    python -m syncbn.torch train.py --its arguments
    python -m syncbn.torch -m its.module --its arguments
    torchrun --nproc-per-node 4 -m syncbn.torch train.py --its arguments

Processes that the program starts by multiprocessing have it done too.
"""

import os
import runpy
import sys

from syncbn.torch.replacing import install


def main() -> None:
    arguments = sys.argv[1:]
    as_module = arguments[:1] == ["-m"]
    program = arguments[int(as_module) :]
    if not program or (program[0].startswith("-") and not as_module):
        sys.exit("usage: python -m syncbn.torch [-m] PROGRAM [ARGUMENT ...]")
    install()
    sys.argv[:] = program
    if as_module:
        sys.path[0] = os.getcwd()
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(program[0]))
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main()
