"""The Markdown pages: their links and paths lead somewhere, their lines fit and read as they are meant, and the index of
decisions is complete."""

import pathlib
import re
import subprocess
from typing import List

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
COLUMNS = 120


def pages() -> List[pathlib.Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).exists()]


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def broken_links(page: pathlib.Path, text: str) -> List[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"\w+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            broken.append(f"{page.relative_to(ROOT)} links to {link}, which does not exist")
        elif fragment and fragment not in map(anchor, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)):
            broken.append(f"{page.relative_to(ROOT)} links to {link}, which has no such heading")
    return broken


def unknown_paths(page: pathlib.Path, text: str) -> List[str]:
    """Paths in backquotes, from the root of the repository, that do not exist."""
    folders = "client|docs|kernels|plumbing|proto|server|tests|third_party|tools|vocabulary"
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", without_code(text))
    return [f"{page.relative_to(ROOT)} names {name}" for name in named if not (ROOT / name).exists()]


def long_lines(page: pathlib.Path, text: str) -> List[str]:
    """Lines that are too long, but for tables, which cannot be broken."""
    lines = enumerate(text.splitlines(), 1)
    return [
        f"{page.relative_to(ROOT)}:{number} has {len(line)} columns"
        for number, line in lines
        if len(line) > COLUMNS and not line.startswith("|")
    ]


def accidental_lists(page: pathlib.Path, text: str) -> List[str]:
    """Lines of a paragraph that begin like an item, such as a number and a full stop: Markdown makes a list of them."""
    found = []
    for paragraph in re.split(r"\n\s*\n", without_code(text)):
        first, *rest = paragraph.strip("\n").splitlines() or [""]
        if not re.match(r"\s|[-+*] |\d+[.)] |[|#]", first):
            found += [line for line in rest if re.match(r" {0,3}([-+*]|1[.)]) ", line)]
    return [f"{page.relative_to(ROOT)} has text that becomes a list: {line}" for line in found]


@pytest.mark.parametrize("check", [broken_links, unknown_paths, long_lines, accidental_lists])
def test_pages(check) -> None:
    found = [fault for page in pages() for fault in check(page, page.read_text())]
    assert found == [], "\n".join(found)


@pytest.mark.parametrize(
    "check, text",
    [
        (broken_links, "See [the page](missing.md)."),
        (broken_links, "See [the section](README.md#no-such-heading)."),
        (broken_links, "See [the section](#no-such-heading)."),
        (unknown_paths, "It is in `server/core/missing.cc`."),
        (long_lines, "x" * (COLUMNS + 1)),
        (accidental_lists, "Statistics start from mean 0 and variance\n1. In each step, they change."),
        (accidental_lists, "The result is the sum\n+ the bias."),
    ],
)
def test_faults_are_found(check, text: str) -> None:
    assert len(check(ROOT / "README.md", text)) == 1


@pytest.mark.parametrize(
    "check, text",
    [
        (broken_links, "See [the page](docs/operations.md#flags), or [elsewhere](https://example.com/missing)."),
        (broken_links, "```\n[this](missing.md)\n```\n"),
        (unknown_paths, "It is in `server/core/merge.cc`."),
        (long_lines, "|" + "x" * COLUMNS),
        (accidental_lists, "Two things:\n\n- one, which is\n  long;\n- another.\n\n1. First\n2. Second\n"),
        (accidental_lists, "A number at the start of a line is harmless,\n10. among others, and so is\n-5."),
    ],
)
def test_good_text_passes(check, text: str) -> None:
    assert check(ROOT / "README.md", text) == []


def test_the_index_of_decisions_is_complete() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    records = sorted(path.name for path in folder.glob("[0-9]*.md"))
    assert records, "the decisions are not where this test looks for them"
    assert [name for name in records if f"]({name})" not in index] == []
