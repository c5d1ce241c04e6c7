"""Trains in groups whose members run on machines of two kinds, and compares every bit with a group of one kind.

    mixed_group.py COMMAND...   the words by which the other kind's Python runs member.py

A master of this kind of machine. Exits with 1, and names what differs, if any bit does. tools/test_aarch64 calls it.
"""

import os
import pathlib
import subprocess
import sys
from typing import List, Sequence

import syncbn

SEED = 20261129
MEMBER = str(pathlib.Path(__file__).with_name("member.py"))
PATIENCE = 600.0  # Seconds, for an emulated processor.


def train(target: str, commands: Sequence[Sequence[str]]) -> List[List[str]]:
    """Returns the lines of each member, which all run at once."""
    group = f"group-{os.urandom(4).hex()}"
    members = [
        subprocess.Popen(
            [*command, target, group, str(rank), str(len(commands)), str(SEED)], stdout=subprocess.PIPE, text=True
        )
        for rank, command in enumerate(commands)
    ]
    try:
        outputs = [member.communicate(timeout=PATIENCE)[0] for member in members]
    finally:
        for member in members:
            member.kill()
            member.wait()
    if any(member.returncode != 0 for member in members):
        sys.exit(f"mixed_group: members exited with {[member.returncode for member in members]}")
    return [output.splitlines() for output in outputs]


def main() -> None:
    here, there = [sys.executable, MEMBER], sys.argv[1:]
    differing = 0
    with syncbn.Master(address="127.0.0.1:0") as master:
        expected = train(master.target, [here, here, here])
        for name, commands in (("mixed", [here, there, there]), ("the other kind alone", [there, there, there])):
            for rank, (want, got) in enumerate(zip(expected, train(master.target, commands))):
                if len(want) != len(got):
                    sys.exit(f"mixed_group: {name}: rank {rank} has {len(got)} results instead of {len(want)}")
                for one, other in zip(want, got):
                    if one != other:
                        differing += 1
                        print(f"{name}: rank {rank}: {one} differs: {other}")
            print(f"{name}: {sum(map(len, expected))} results compared (seed {SEED})")
    if differing:
        sys.exit(f"mixed_group: {differing} results differ")


if __name__ == "__main__":
    main()
