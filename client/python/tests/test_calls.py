"""The calls of a pass, by the functions that the library makes for Python and by ctypes."""

import sys

import numpy as np
import pytest

import syncbn
import syncbn.numpy as sync
from syncbn import _calls, _library, _passes

SEED = 31
CHANNELS = 3
NAMES = [name for name in vars(_calls.ByCtypes) if not name.startswith("_")]
# Arguments of the right types. No call gets as far as the library with them.
ARGUMENTS = {
    "forward_start": (0, b"bn", b"", b"", False),
    "forward_wait": (0, 0),
    "forward_finish": (0, b"", b""),
    "forward_count": (0,),
    "forward_backward_required": (0,),
    "forward_destroy": (0,),
    "backward_start": (0, b"", b""),
    "backward_wait": (0, 0),
    "backward_finish": (0, b"", b""),
    "backward_destroy": (0,),
    "has_log": (),
}


@pytest.fixture(params=["by the library", "by ctypes"])
def calls(request, monkeypatch):
    """The functions that passes go by."""
    functions = _calls.by_library() if request.param == "by the library" else _calls.ByCtypes
    monkeypatch.setattr(_passes, "calls", functions)
    return functions


def train(worker, layer="bn", rows=slice(None)):
    random = np.random.default_rng(SEED)
    x, dy = random.normal(1.0, 2.0, (6, CHANNELS, 4)), random.normal(size=(6, CHANNELS, 4))
    mean, var = np.zeros(CHANNELS), np.ones(CHANNELS)
    weight, bias = random.normal(size=CHANNELS), random.normal(size=CHANNELS)
    found = []
    for _ in range(2):
        y, state = sync.forward(worker, layer, x[rows], weight, bias, running_mean=mean, running_var=var)
        found += [y, *(part for part in state.backward(dy[rows]) if part is not None)]
    return found + [mean, var]


def test_cpython_has_the_functions_of_the_library():
    assert sys.implementation.name == "cpython"
    assert sorted(vars(_calls.by_library())) == sorted(NAMES)
    assert type(_passes.calls.forward_start) is type(len)


def test_both_ways_give_the_same_bits(group, monkeypatch):
    def run(worker):
        return train(worker, rows=slice(0, 2) if worker.rank == 0 else slice(2, None))

    results = []
    for functions in (_calls.by_library(), _calls.ByCtypes):
        monkeypatch.setattr(_passes, "calls", functions)
        results.append(group(2, run))
    for mine, wanted in zip(*results):
        assert len(mine) == len(wanted) == 10
        assert all(a.tobytes() == b.tobytes() for a, b in zip(mine, wanted))


@pytest.mark.parametrize("name", NAMES)
def test_calls_with_wrong_arguments_are_refused(name):
    function, given = getattr(_calls.by_library(), name), ARGUMENTS[name]
    with pytest.raises(TypeError):
        function(*given, 0)
    for place, argument in enumerate(given):
        with pytest.raises(TypeError):
            function(*given[:place])
        with pytest.raises(TypeError):
            function(*given[:place], object() if isinstance(argument, bytes) else "text", *given[place + 1 :])
    with pytest.raises(TypeError):
        function(*given, name=0)


def test_an_address_that_is_no_address_is_refused():
    with pytest.raises(OverflowError):
        _calls.by_library().forward_count(1 << 80)


def test_errors_are_those_of_the_library(group, calls):
    def run(worker):
        with worker.handle() as handle:
            x = bytes(_library.Tensor(None, 0, 1, 1, _library.FLOAT64, 0, 0, 0))
            with pytest.raises(syncbn.Error, match='layer "absent" has not been declared') as caught:
                calls.forward_start(handle, b"absent", x, _passes._options(1, None, 1, None, False, False), True)
        assert caught.value.code == syncbn.Code.FAILED_PRECONDITION
        with pytest.raises(syncbn.Error, match="forward is NULL") as caught:
            calls.forward_wait(0, 0)
        assert caught.value.code == syncbn.Code.INVALID_ARGUMENT

    group(1, run)


def test_a_round_that_fails_names_its_layer_and_ranks(group, calls):
    def run(worker):
        assert worker.wait_for_members()
        if worker.rank == 1:
            worker.close()
            return
        with pytest.raises(syncbn.WorkerLost) as caught:
            train(worker)
        assert caught.value.layer == "bn"
        assert list(caught.value.ranks) == [1]

    group(2, run)


def test_a_wait_leaves_the_interpreter_to_other_threads(group, calls):
    """The threads of two workers wait for each other, in both passes."""

    def run(worker):
        return train(worker, rows=slice(0, 3) if worker.rank == 0 else slice(3, None))

    first, second = group(2, run)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first[-2:], second[-2:]))


def test_failing_calls_keep_nothing():
    functions = _calls.by_library()

    def fail():
        for _ in range(100):
            with pytest.raises(syncbn.Error):
                functions.forward_finish(0, b"bytes of their own", b"")

    fail()
    counts = [sys.getrefcount(value) for value in (functions.forward_finish, _calls._raise)]
    fail()
    assert counts == [sys.getrefcount(value) for value in (functions.forward_finish, _calls._raise)]
