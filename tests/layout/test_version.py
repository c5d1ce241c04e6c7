"""The file VERSION is the only place that holds the version; programs, libraries and packages take it from there."""

import os
import pathlib
import re
import subprocess

import syncbn
from syncbn import _library

ROOT = pathlib.Path(__file__).resolve().parents[2]
VERSION = (ROOT / "VERSION").read_text().strip()
SOURCES = [".bzl", ".c", ".cc", ".cu", ".cuh", ".h", ".py", ".toml", ".yaml"]


def test_its_form() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)


def test_whoever_tells_it_tells_the_same() -> None:
    assert _library.lib.syncbn_version().decode() == VERSION
    assert syncbn.__version__ == VERSION
    told = subprocess.run([os.environ["SYNCBN_MASTER"], "--version"], capture_output=True, text=True, timeout=60)
    assert told.stdout.startswith(f"syncbn-master {VERSION} (")


def test_the_changelog_begins_with_it_or_with_what_is_unreleased() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.match(rf"(?i)unreleased|{re.escape(VERSION)}\b", headings[0]), headings[0]


def test_no_source_repeats_it() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sources = [ROOT / name for name in listed.split("\0") if pathlib.Path(name).suffix in SOURCES]
    own = re.compile(rf"\bsyncbn[a-z-]*[ /]{re.escape(VERSION)}\b|\"{re.escape(VERSION)}\"")
    assert len(sources) > 200
    assert [str(path) for path in sources if path.exists() and own.search(path.read_text())] == []
