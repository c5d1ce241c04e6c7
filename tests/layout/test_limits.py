"""PROTOCOL.md's table of limits says what server/core/limits.h has."""

import pathlib
import re
from typing import Dict, List, Tuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
VOCABULARY = ROOT / "vocabulary/derived_name.h"
UNITS = {"": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
DURATIONS = {"Milliseconds": 1e-3, "Seconds": 1.0, "Minutes": 60.0, "Hours": 3600.0}
# Fields that bound what the master does, and nothing that a worker could notice; and defaults that other rows name.
UNLISTED = {"max_turn_bytes", "min_retained_outcomes", "default_round_timeout", "default_rejoin_grace"}


def fields(header: str) -> Dict[str, float]:
    """Each field of Limits and its value: bytes, seconds or a number; some are constants that workers share."""
    shared = dict(re.findall(r"^constexpr size_t (k\w+) = (\d+);", VOCABULARY.read_text(), re.MULTILINE))
    found = {}
    for name, text in re.findall(r"^  [\w:]+ (\w+) = ([^;]+);", header, re.MULTILINE):
        duration = re.fullmatch(r"absl::(\w+)\((\d+)\)", text)
        shift = re.fullmatch(r"(?:\w+\{(\d+)\}|(\d+)u) << (\d+)", text)
        if duration:
            found[name] = int(duration[2]) * DURATIONS[duration[1]]
        elif shift:
            found[name] = float(int(shift[1] or shift[2]) << int(shift[3]))
        else:
            found[name] = float(shared.get(text, text))
    return found


def quantity(text: str) -> float:
    """"4 MiB", "2^20", "10 ms", "2^500, and its square for M2"."""
    found = re.match(r"(\d+)(?:\^(\d+))? ?(KiB|MiB|GiB|ms|s|min|h|)(?:,|$)", text)
    assert found, text
    return float(int(found[1]) ** int(found[2] or 1)) * UNITS[found[3]]


def table(document: str) -> List[Tuple[str, str]]:
    """The named limits of section 13, each with the text of its value."""
    section = re.search(r"^## 13\. Limits\n(.*?)(?=^## |\Z)", document, re.MULTILINE | re.DOTALL)
    assert section
    rows = []
    for limits, default in re.findall(r"^\| (`[^|]*`) \| ([^|]*) \|", section[1], re.MULTILINE):
        names = re.findall(r"`(\w+)`", limits)
        rows += zip(names, default.split(", ") if len(names) > 1 else [default])
    return rows


def differences(header: str, document: str) -> List[str]:
    limits, listed = fields(header), table(document)
    found = [f"{name} is not listed" for name in limits if name not in UNLISTED | {name for name, _ in listed}]
    for name, text in listed:
        if name not in limits:
            found.append(f"{name} is not a limit")
        elif limits[name] != quantity(text):
            found.append(f"{name} is {limits[name]}, not {text}")
    return found


def read() -> Tuple[str, str]:
    return (ROOT / "server/core/limits.h").read_text(), (ROOT / "proto/PROTOCOL.md").read_text()


def test_the_table_is_the_header() -> None:
    header, document = read()
    assert len(fields(header)) == len(re.findall(r"^  [\w:]+ \w+ = ", header, re.MULTILINE)) >= 24
    assert len(table(document)) >= 20
    assert differences(header, document) == []


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("max_groups = 1024", "max_groups = 1025", "max_groups"),
        ("max_pending_bytes = size_t{1} << 30", "max_pending_bytes = size_t{1} << 31", "max_pending_bytes"),
        ("max_round_timeout = absl::Hours(24)", "max_round_timeout = absl::Minutes(24)", "max_round_timeout"),
        ("  size_t max_groups", "  size_t max_new = 3;\n  size_t max_groups", "max_new"),
        ("int64_t max_count = ", "int64_t max_counts = ", "max_count"),
    ],
)
def test_a_change_of_the_header_alone_is_found(old: str, new: str, named: str) -> None:
    header, document = read()
    assert old in header
    found = differences(header.replace(old, new), document)
    assert found and all(difference.startswith(named) for difference in found), found
