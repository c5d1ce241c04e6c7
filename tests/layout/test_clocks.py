"""Timed waits are measured by the monotonic clock: Abseil's follow the wall clock, which may be set back by hours."""

import pathlib
import re
from typing import List

ROOT = pathlib.Path(__file__).resolve().parents[2]
WAITS = re.compile(r"\b(?:\w*(?:Await|Wait|Lock)\w*With(?:Timeout|Deadline)|CondVar)\b")


def waits(text: str) -> List[str]:
    return WAITS.findall(text)


def test_no_wait_follows_the_wall_clock() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {wait}"
        for folder in ("client/c", "client/cc", "plumbing", "server", "vocabulary")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".h", ".cc")
        for wait in waits(path.read_text())
    ]
    assert not found, "; ".join(found)


def test_such_waits_are_found() -> None:
    assert waits("mutex_.AwaitWithTimeout(c, d);") and waits("done.WaitForNotificationWithTimeout(d)")
    assert waits("absl::CondVar changed_;") and waits("mutex_.LockWhenWithDeadline(c, t);")
    assert not waits("changed_.WaitFor(&mutex_, d);")
