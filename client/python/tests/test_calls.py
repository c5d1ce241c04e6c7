"""The calls of a pass, by the functions that the library makes for Python and by ctypes."""

import ctypes
import gc
import logging
import sys

import numpy as np
import pytest

import syncbn
import syncbn.numpy as sync
from syncbn import _calls, _library, _passes

SEED = 31
CHANNELS = 3
NAMES = [name for name in vars(_calls.ByCtypes) if not name.startswith("_")]
TENSOR = bytes(_library.Tensor())
OPTIONS = (8).to_bytes(8, "little")  # A struct that has its size alone.
# Arguments of the right types. No call gets as far as the library with them.
ARGUMENTS = {
    "forward_start": (0, b"bn", TENSOR, OPTIONS, False),
    "forward_end": (0, 0, TENSOR, OPTIONS, [], []),
    "forward_wait": (0, 0),
    "forward_finish": (0, TENSOR, OPTIONS),
    "forward_count": (0,),
    "forward_backward_required": (0,),
    "forward_destroy": (0,),
    "backward": (0, OPTIONS, OPTIONS, OPTIONS, 0, []),
    "backward_wait": (0, 0),
    "backward_finish": (0, OPTIONS, OPTIONS),
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


def test_a_library_of_another_version_makes_nothing(monkeypatch):
    assert _calls._maker() is not None and _calls.function("of another version", None) is None
    monkeypatch.setattr(_calls, "_PYTHON", _calls._PYTHON[:-1])
    assert _calls._maker() is None


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
        if isinstance(argument, bytes) and argument != b"bn":  # A struct that is cut off, and one without its size.
            for short in (argument[:-1], b""):
                with pytest.raises(TypeError):
                    function(*given[:place], short, *given[place + 1 :])
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


@pytest.fixture(params=["within a slice", "in several slices"])
def slices(request, monkeypatch):
    """The length of a round: as tests run, or longer than the first call waits."""
    if request.param == "in several slices":
        monkeypatch.setattr(_passes, "SLICE_NS", 0)


def test_a_round_that_fails_names_its_layer_and_ranks(group, calls, slices):
    def run(worker):
        assert worker.wait_for_members()
        if worker.rank == 1:
            worker.close()
            return
        with pytest.raises(syncbn.WorkerLost) as caught:
            train(worker)
        assert caught.value.layer == "bn"
        assert list(caught.value.ranks) == [1]
        stats = worker.stats()
        assert (stats.rounds, stats.failed, stats.missing) == (1, 1, {1: 1})
        assert worker._users == []

    group(2, run)


def test_a_backward_round_that_fails_is_told(group, calls, slices):
    def run(worker):
        x = np.arange(6.0).reshape(2, CHANNELS) + worker.rank
        _, state = sync.forward(worker, "bn", x)
        if worker.rank == 1:
            worker.close()
            return
        with pytest.raises(syncbn.WorkerLost) as caught:
            state.backward(x)
        assert list(caught.value.ranks) == [1]
        stats = worker.stats()
        assert (stats.rounds, stats.failed, stats.missing) == (2, 1, {1: 1})
        assert worker._users == []

    group(2, run)


@pytest.mark.parametrize("rows, count", [(0, 0), (1, 1), (2, 2)])
def test_the_end_of_a_pass_leaves_small_batches_to_the_caller(group, calls, slices, rows, count):
    def run(worker):
        x, y = np.arange(2.0 * CHANNELS).reshape(2, CHANNELS)[:rows], np.full((rows, CHANNELS), 7.0)
        mean = np.full(CHANNELS, 7.0)
        worker.declare_layer("bn", CHANNELS)
        tensor = sync._describe(x)
        passed = _passes.ForwardPass(worker, "bn", tensor, eps=1e-5, clamp=False)
        running = _library.Vector.from_buffer_copy(sync._running(mean, CHANNELS, "running_mean"))
        described = _library.Tensor.from_buffer_copy(sync._describe(y))
        outputs = bytes(_library.ForwardOutputs(y=described, running_mean=running, momentum=1.0))
        for _ in range(2):
            ended = []
            assert passed.end(tensor, outputs, ended) == count == passed.count
            assert np.all(y == 7.0) == (count < 2) and np.all(mean == 7.0) == (count < 2)
            assert ended == ([count] if count >= 2 else [])
            assert worker.stats().rounds == 1

    group(1, run)


def test_both_passes_wait_for_as_long_as_it_takes(group, calls, slices):
    def run(worker):
        return train(worker, rows=slice(0, 3) if worker.rank == 0 else slice(3, None)), worker.stats().rounds

    (first, rounds), (second, _) = group(2, run)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first[-2:], second[-2:])) and rounds == 4


def test_lines_of_the_log_are_delivered_with_the_end_of_a_pass(group, calls, caplog):
    def run(worker):
        keep = _library.lib.syncbn_log_keep
        keep.argtypes, keep.restype = [ctypes.c_int32, ctypes.c_char_p, ctypes.c_void_p], None
        x = np.arange(6.0).reshape(2, CHANNELS)
        for place in ("forward", "backward"):
            keep(logging.WARNING, b"kept for " + place.encode(), None)
            if place == "forward":
                _, state = sync.forward(worker, "bn", x)
            else:
                state.backward(x)
            assert f"kept for {place}" in caplog.text

    group(1, run)


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
                functions.forward_finish(0, TENSOR, OPTIONS)

    fail()
    gc.collect()  # Functions of earlier tests hold `_attend`.
    counts = [sys.getrefcount(value) for value in (functions.forward_finish, _calls._attend)]
    fail()
    assert counts == [sys.getrefcount(value) for value in (functions.forward_finish, _calls._attend)]
