"""Reports of benchmarks: Markdown tables with their origin, kept between markers in a file."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
from typing import List, Optional, Sequence, Tuple


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---:"] * len(head), *rows)]


def _processor() -> str:
    models = re.findall(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return models[0] if models else os.uname().machine


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()

    # The report itself was not measured.
    changed = git("status", "--porcelain", "--", ".", ":(exclude)tests/benchmarks/README.md")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def provenance(command: str) -> str:
    """The command with this process's arguments, the commit and the machine, in one paragraph."""
    arguments = shlex.join(sys.argv[1:])
    arguments = re.sub(r" ?--output \S+", "", arguments).strip()
    shown = f"{command} {arguments}".strip()
    load = os.getloadavg()[0]
    return (
        f"`{shown}` at commit {_commit()}; {_processor()}, {os.cpu_count()} cores; "
        f"load average at the start {load:.1f}."
    )


def split(page: str, name: str) -> Tuple[str, str, str]:
    """A page before, within and after the part that a benchmark has written, which stands between
    `<!-- begin NAME -->` and `<!-- end NAME -->`. The marks belong to what is before and after.

    Raises: ValueError if the page has no such part.
    """
    found = re.fullmatch(f"(.*<!-- begin {name} -->\n)(.*)(<!-- end {name} -->.*)", page, re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no part {name}")
    before, part, after = found.groups()
    return before, part, after


def publish(name: str, lines: List[str], output: Optional[pathlib.Path]) -> None:
    """Prints the lines; puts them into the benchmark's part of `output`, if given.

    Wraps those that belong to no table to the width of a page.
    """
    wrapped = (line if line.startswith("|") else textwrap.fill(line, 120, break_on_hyphens=False) for line in lines)
    text = "\n".join(wrapped)
    print(text)
    if output is None:
        return
    before, _, after = split(output.read_text(), name)
    output.write_text(f"{before}{text}\n{after}")
