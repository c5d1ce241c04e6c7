"""tools/tidy finds what clang's analysis of locks and clang-tidy's checks object to, in headers too."""

import pathlib
import re
import subprocess
from typing import List, Optional

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
UNGUARDED = r".* requires holding mutex 'mutex_' \[clang-diagnostic-thread-safety-analysis"


@pytest.mark.parametrize(
    "options, target, found",
    [
        ([], "unguarded", rf"unguarded\.cc:9:{UNGUARDED}"),
        ([], "copying", r"copying\.h:13:.* this creates a copy .*\[performance-for-range-copy"),
        ([], "correct", None),
        (["--fast"], "unguarded", rf"unguarded\.cc:9:{UNGUARDED}"),
        (["--fast"], "apart", rf"apart\.cc:6:{UNGUARDED}"),
        (["--fast"], "copying", r"copying\.h:13:.* this creates a copy .*\[performance-for-range-copy"),
        (["--fast"], "correct", None),
    ],
)
def test_planted_errors_are_found(options: List[str], target: str, found: Optional[str]) -> None:
    done = subprocess.run(
        [ROOT / "tools/tidy", *options, f"//tests/layout/planted:{target}"], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode != 0) == (found is not None), done.stderr
    assert found is None or re.search(found, done.stderr), done.stderr
