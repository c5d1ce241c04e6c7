"""A step that raises on one worker alone: it begins fewer rounds than the others, and they agree again by themselves."""

import copy
import threading

import numpy as np
import pytest
import syncbn
import syncbn.numpy

STEPS = 5


class Spilled(Exception):
    """What a program raises within a step."""


def raise_at(raises, place):
    if raises == place:
        raise Spilled(place)


class TorchSteps:
    """Three layers, the second of which is used twice a step, and a sum."""

    places = ("forward", "between uses", "before backward", "backward", "before sum")

    def __init__(self, worker):
        torch = pytest.importorskip("torch")
        import syncbn.torch as sync

        torch.manual_seed(0)
        model = torch.nn.ModuleList([torch.nn.BatchNorm1d(3) for _ in range(3)])
        self.layers = sync.convert_sync_batchnorm(copy.deepcopy(model), worker)
        self.worker, self.torch = worker, torch

    def __call__(self, raises):
        torch = self.torch
        hidden = self.layers[0](torch.randn(4, 3, requires_grad=True))
        raise_at(raises, "forward")
        hidden = self.layers[1](hidden)
        raise_at(raises, "between uses")
        hidden = self.layers[1](hidden + 1)
        hidden.register_hook(lambda gradient: raise_at(raises, "backward"))
        y = self.layers[2](hidden)
        raise_at(raises, "before backward")
        (y * torch.randn(4, 3)).sum().backward()
        raise_at(raises, "before sum")
        self.worker.all_reduce("loss", [1.0])

    def seen(self):
        return [layer.running_mean.tolist() for layer in self.layers]


class NumpySteps:
    """Two layers of the NumPy front, and a sum."""

    places = ("forward", "before backward", "backward", "before sum")

    def __init__(self, worker):
        self.worker = worker
        self.random = np.random.default_rng(worker.rank)
        self.running = {name: (np.zeros(3), np.ones(3)) for name in ("first", "second")}

    def layer(self, name):
        mean, var = self.running[name]
        x = self.random.normal(size=(4, 3))
        return syncbn.numpy.forward(self.worker, name, x, running_mean=mean, running_var=var)[1]

    def __call__(self, raises):
        first = self.layer("first")
        raise_at(raises, "forward")
        second = self.layer("second")
        raise_at(raises, "before backward")
        second.backward(np.ones((4, 3)))
        raise_at(raises, "backward")
        first.backward(np.ones((4, 3)))
        raise_at(raises, "before sum")
        self.worker.all_reduce("loss", [1.0])

    def seen(self):
        return [mean.tolist() for mean, _ in self.running.values()]


def train(worker, steps, plan):
    """Steps until STEPS of them have succeeded. `plan`: {(rank, attempt): place}. Returns: the errors, by attempt; the
    number of attempts; what the layers have seen.
    """
    step = steps(worker)
    done, attempts, failed = 0, 0, []
    while done < STEPS:
        assert attempts < 8 * STEPS, f"no step succeeds any more: {failed}"
        try:
            step(plan.get((worker.rank, attempts)))
            done += 1
        except Spilled:
            failed.append((attempts, "raised"))
        except syncbn.Error as error:
            failed.append((attempts, error.reason))
        attempts += 1
    return failed, attempts, step.seen()


def check_alike(results):
    """Of all rounds that a worker has seen, the others have seen the same."""
    for _, _, seen in results[1:]:
        assert seen == results[0][2]


CASES = [(steps, place) for steps in (TorchSteps, NumpySteps) for place in steps.places]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("steps, place", CASES)
def test_the_raise_costs_the_others_one_step(group, steps, place, world_size):
    results = group(world_size, lambda worker: train(worker, steps, {(0, 1): place}))
    assert results[0][0] == [(1, "raised"), (2, "DEADLOCK")]
    for failed, _, _ in results[1:]:
        assert failed == [(1, "DEADLOCK")]
    check_alike(results)


@pytest.mark.parametrize("steps", [TorchSteps, NumpySteps])
def test_deadlines_where_threads_share_a_worker_cost_no_more(group, steps):
    def run(worker):
        other = threading.Thread(target=worker.all_reduce, args=("other", [1.0]))
        other.start()
        other.join()
        worker.all_reduce("loss", [1.0])  # The second thread: from now on it says no longer that it is blocked.
        return train(worker, steps, {(0, 1): "before backward"})

    # Long enough for a busy machine, whose other rounds must not fail.
    results = group(3, run, timeout=5.0)
    assert results[0][0] == [(1, "raised"), (2, "ROUND_TIMEOUT")]
    for failed, _, _ in results[1:]:
        assert failed == [(1, "ROUND_TIMEOUT")]
    check_alike(results)


@pytest.mark.parametrize("steps, place", CASES)
def test_two_of_three_may_raise_at_once(group, steps, place):
    results = group(3, lambda worker: train(worker, steps, {(0, 1): place, (1, 1): place}))
    assert [failed for failed, _, _ in results] == [[(1, "raised"), (2, "DEADLOCK")]] * 2 + [[(1, "DEADLOCK")]]
    check_alike(results)


@pytest.mark.parametrize("steps", [TorchSteps, NumpySteps])
def test_all_raise_at_once(group, steps):
    results = group(2, lambda worker: train(worker, steps, {(0, 1): "forward", (1, 1): "forward"}))
    assert [failed for failed, _, _ in results] == [[(1, "raised")]] * 2
    check_alike(results)


@pytest.mark.parametrize("steps", [TorchSteps, NumpySteps])
def test_workers_may_raise_again_and_again(group, steps):
    plan = {(attempt % 2, attempt): place for attempt, place in enumerate(steps.places * 2)}
    results = group(2, lambda worker: train(worker, steps, plan))
    check_alike(results)
    for failed, attempts, _ in results:
        assert attempts == STEPS + len(failed)


def test_a_raise_between_two_steps_costs_the_others_nothing(group):
    def run(worker):
        step = TorchSteps(worker)
        for number in range(STEPS):
            step(None)
            try:
                raise_at("optimizer" if worker.rank == 0 and number == 1 else None, "optimizer")
            except Spilled:
                pass
        return step.seen()

    first, second = group(2, run)
    assert first == second


def test_after_an_error_that_all_ignore_the_step_goes_on(group):
    """One of them is merely late, so that the error names no number, and none of the later layers waits for it."""
    given_up = threading.Event()

    def run(worker):
        means = []
        for step in range(2):
            for layer in ("first", "second", "third"):
                late = (step, layer) == (1, "first")
                if late and worker.rank == 1:
                    assert given_up.wait(60)
                try:
                    means.append(worker.synchronize(layer, 2, [1.0 + worker.rank], [0.5]).mean[0])
                except syncbn.DeadlineExceeded:
                    assert late
                if late:
                    given_up.set()
        return means

    # Long enough for a busy machine, whose other rounds must not fail.
    assert group(2, run, timeout=5.0) == [[1.5] * 5] * 2


def test_a_checkpoint_after_a_raise_has_the_numbers_on_which_all_agree(group):
    def run(worker):
        failed, attempts, _ = train(worker, NumpySteps, {(0, 1): "forward"})
        return worker.state_dict()

    first, second = group(2, run)
    assert first == second
    assert first["first"] > 0
