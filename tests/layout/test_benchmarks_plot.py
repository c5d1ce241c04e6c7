"""The picture of the benchmarks shows the ratios that the page has."""

import html
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks" / "plot"))

import plot  # noqa: E402

PAGE = (ROOT / "tests" / "benchmarks" / "README.md").read_text()


def test_the_picture_has_the_ratios_of_the_page() -> None:
    picture = html.unescape((ROOT / "docs" / "benchmarks.svg").read_text())
    drawn = plot.comparisons(PAGE)
    assert len(drawn) == 8
    for comparison in drawn:
        assert len(comparison.points) >= 3, comparison
        assert f">{plot.told(comparison)}<" in picture, f"run tools/benchmark plot: {comparison}"


def test_a_cell_without_a_ratio_has_no_point() -> None:
    rows = plot.tables("| W | x / y |\n| ---: | ---: |\n| 8 | 0.25 (0.20\u20130.30) |\n| 16 | \u2013 |\n")[0]
    assert plot.points(rows, "x / y", lambda row: row["W"]) == [plot.Point("8", 0.25)]


def test_a_page_without_a_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no part round"):
        plot.comparisons("")
