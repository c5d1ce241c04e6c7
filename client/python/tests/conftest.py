"""A master in this process, and groups of workers as its threads."""

import concurrent.futures
import itertools
from typing import Any, Callable, Iterator, List

import pytest

import syncbn

_groups = itertools.count()

# Bounds every test: a round that lacks a worker ends after this many seconds.
ROUND_TIMEOUT = 60.0


@pytest.fixture(scope="session")
def master() -> Iterator[syncbn.Master]:
    with syncbn.Master(address="127.0.0.1:0") as started:
        yield started


class Group:
    """Runs one function as every worker of a fresh group, each on a thread."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __call__(self, world_size: int, function: Callable[..., Any], **options: Any) -> List[Any]:
        """function(worker) of each rank. Raises the error that began the trouble, not those that it caused
        elsewhere.
        """
        name = f"test-{next(_groups)}"
        options.setdefault("timeout", ROUND_TIMEOUT)

        def run(rank: int) -> Any:
            with syncbn.Worker(self.target, name, rank, world_size, **options) as worker:
                return function(worker)

        with concurrent.futures.ThreadPoolExecutor(world_size) as pool:
            futures = [pool.submit(run, rank) for rank in range(world_size)]
            failures = [f.exception() for f in futures if f.exception() is not None]
        for failure in failures:
            if not isinstance(failure, syncbn.WorkerLost):
                raise failure
        if failures:
            raise failures[0]
        return [f.result() for f in futures]


@pytest.fixture
def group(master: syncbn.Master) -> Group:
    return Group(master.target)
