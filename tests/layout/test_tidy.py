"""tools/tidy finds what clang's analysis of locks and clang-tidy's checks object to, in headers too."""

import pathlib
import subprocess
from typing import Optional

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "target, found",
    [
        ("unguarded", "unguarded.cc:9:30: error: reading variable 'value_' requires holding mutex 'mutex_'"),
        ("copying", "copying.h:13:26: error: loop variable is copied but only used as const reference"),
        ("correct", None),
    ],
)
def test_planted_errors_are_found(target: str, found: Optional[str]) -> None:
    done = subprocess.run(
        [ROOT / "tools/tidy", f"//tests/layout/planted:{target}"], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode != 0) == (found is not None), done.stderr
    assert found is None or found in done.stderr
