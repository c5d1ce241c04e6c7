"""The README's table of errors against torch.nn.BatchNorm* in float64, measured again."""

import pytest

pytest.importorskip("torch")

import parity


@pytest.fixture(scope="module")
def table(master):
    return parity.rows(parity.measure(master.target, list(parity.cases())))


def test_every_cell_is_within_its_bound(table):
    assert not parity.beyond_bounds(table)


def test_the_committed_table_has_these_rows_and_is_within_the_bounds(table):
    committed = parity.committed()
    assert [(row.label, row.cases) for row in committed] == [(row.label, row.cases) for row in table], (
        "client/python/README.md is out of date: tools/python client/python/tests/parity.py --write"
    )
    assert [[cell is None for cell in row.cells] for row in committed] == [
        [cell is None for cell in row.cells] for row in table
    ]
    assert not parity.beyond_bounds(committed)
