"""tools/tidy finds what clang's analysis of locks and clang-tidy's checks object to, in headers too."""

import pathlib
import re
import subprocess
from typing import Optional

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "target, found",
    [
        ("unguarded", r"unguarded\.cc:9:.* requires holding mutex 'mutex_' \[clang-diagnostic-thread-safety-analysis"),
        ("copying", r"copying\.h:13:.* this creates a copy .*\[performance-for-range-copy"),
        ("correct", None),
    ],
)
def test_planted_errors_are_found(target: str, found: Optional[str]) -> None:
    done = subprocess.run(
        [ROOT / "tools/tidy", f"//tests/layout/planted:{target}"], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode != 0) == (found is not None), done.stderr
    assert found is None or re.search(found, done.stderr), done.stderr
