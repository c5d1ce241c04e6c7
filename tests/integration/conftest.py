"""Run with `tools/python -m pytest tests/integration`."""

import os
from typing import Any, Callable, Iterator, List

import pytest
from processes import PATIENCE, Master

# Masters of tests leave the usual port to others.
os.environ.setdefault("SYNCBN_HTTP_ADDRESS", "off")


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Returns start(Class, ...), which makes an object of a class of processes.py and ends it with the test."""
    started: List[Any] = []

    def make(kind: Any, *arguments: Any, **options: Any) -> Any:
        started.append(kind(*arguments, **options))
        return started[-1]

    yield make
    for thing in reversed(started):
        thing.process.kill()
        thing.process.wait(PATIENCE)


@pytest.fixture
def master(start: Callable[..., Any]) -> Master:
    return start(Master)
