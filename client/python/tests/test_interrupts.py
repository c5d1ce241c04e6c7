"""Ctrl-C at every moment of a step at which Python can raise it: on entry to a function, and after a foreign one."""

import copy
import sys
import threading

import numpy as np
import pytest
import syncbn
import syncbn.numpy
from syncbn import _presence

PACKAGE = syncbn.__file__.rsplit("/", 1)[0]
MOST_ATTEMPTS = 6

pytestmark = pytest.mark.filterwarnings("error")  # Such as those about exceptions in destructors.


class Interrupt:
    """Raises KeyboardInterrupt at the `moment`-th moment of its `with` block within the package, as Ctrl-C does there."""

    def __init__(self, moment):
        self.moment, self.seen, self.place = moment, 0, None

    def _look(self, frame, event, _):
        code = frame.f_code
        # Python itself ignores what is raised in __del__.
        if event not in ("call", "c_return") or not code.co_filename.startswith(PACKAGE) or code.co_name == "__del__":
            return
        self.seen += 1
        if self.seen == self.moment:
            self.place = f"{code.co_filename[len(PACKAGE):]}:{frame.f_lineno} {event}"
            raise KeyboardInterrupt

    def __enter__(self):
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)


class TorchStep:
    """Two layers forward and backward, over the same batch in each step, so that each success has the same bits."""

    def __init__(self, worker):
        torch = pytest.importorskip("torch")
        import syncbn.torch as sync

        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.ReLU(), torch.nn.BatchNorm1d(3))
        self.model = sync.convert_sync_batchnorm(copy.deepcopy(model), worker)
        self.layers = [self.model[0], self.model[2]]
        torch.manual_seed(1 + worker.rank)
        self.x, self.dy = torch.randn(5, 3), torch.randn(5, 3)
        self.worker = worker

    def __call__(self):
        x = self.x.clone().requires_grad_()
        self.model.zero_grad()
        y = self.model(x)
        y.backward(self.dy)
        total = self.worker.all_reduce("loss", [1.0])
        return [tensor.tolist() for tensor in (y, x.grad, *(p.grad for p in self.model.parameters()), total)]

    def forget(self):
        for layer in self.layers:
            layer.reset_running_stats()

    def check_running(self, place):
        """No layer has taken half of a round."""
        for layer in self.layers:
            fresh = layer.running_mean.tolist() == [0.0] * 3
            assert (layer.running_var.tolist() == [1.0] * 3) == fresh, place
            assert fresh or int(layer.num_batches_tracked) == 1, place


class NumpyStep:
    """The same with the NumPy front."""

    def __init__(self, worker):
        random = np.random.default_rng(worker.rank)
        self.x, self.dy = random.normal(size=(5, 3)), random.normal(size=(5, 3))
        self.worker = worker
        self.forget()

    def __call__(self):
        y, first = syncbn.numpy.forward(self.worker, "first", self.x, running_mean=self.mean, running_var=self.var)
        z, second = syncbn.numpy.forward(self.worker, "second", y * y)
        dx = first.backward(second.backward(self.dy).dx).dx
        return [array.tolist() for array in (y, z, dx, self.worker.all_reduce("loss", [1.0]))]

    def forget(self):
        self.mean, self.var = np.zeros(3), np.ones(3)

    def check_running(self, place):
        assert (self.mean == 0).all() == (self.var == 1).all(), place


def succeed(step):
    """Steps until one succeeds, as a program does that catches errors. Returns: what it has returned."""
    errors = []
    for _ in range(MOST_ATTEMPTS):
        try:
            return step()
        except syncbn.Error as error:
            errors.append(error)
    raise AssertionError(f"no step succeeds any more: {errors}")


class Peer(threading.Thread):
    """The other worker, which steps until this one has gone for good."""

    def __init__(self, target, group, kind):
        super().__init__(daemon=True)
        self.target, self.group, self.kind = target, group, kind
        self.over, self.expected, self.seen = False, None, set()
        self.start()

    def run(self):
        with syncbn.Worker(self.target, self.group, 1, 2, timeout=60) as worker:
            step = self.kind(worker)
            self.expected = succeed(step)
            while not self.over:
                try:
                    self.seen.add(repr(step()))
                except syncbn.Error:
                    pass


@pytest.mark.parametrize("kind", [TorchStep, NumpyStep])
def test_every_moment(master, kind):
    """Whatever the moment, the next steps succeed, with the same bits, and then any thread can close the worker."""
    group = f"interrupts-{kind.__name__}"
    peer = Peer(master.target, group, kind)
    worker = syncbn.Worker(master.target, group, 0, 2, timeout=60)
    step = kind(worker)
    expected = succeed(step)
    moment = 0
    while True:
        moment += 1
        step.forget()
        with Interrupt(moment) as interrupt:
            try:
                step()
                assert interrupt.place is None, f"lost: {interrupt.place}"
            except KeyboardInterrupt:
                pass
        if interrupt.place is None:
            break
        step.check_running(interrupt.place)
        assert succeed(step) == expected, interrupt.place
    assert moment > 50
    peer.over = True
    closing = threading.Thread(target=worker.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive(), "it waits for a thread that has been interrupted"
    peer.join(60)
    assert peer.seen == {repr(peer.expected)}


def test_a_close_waits_for_those_who_are_within(master):
    """However long: a look at the threads' stacks finds them, in the package and in a function that has the handle."""
    worker = syncbn.Worker(master.target, "within", 0, 1, timeout=60)
    inside, go_on, order = threading.Event(), threading.Event(), []

    def use():
        with worker.handle():
            inside.set()
            go_on.wait(timeout=60)  # A close that does not look has to fail the test, not to hang it.
            order.append("used")

    def close():
        worker.close()
        order.append("closed")

    threads = [threading.Thread(target=function, daemon=True) for function in (use, close)]
    threads[0].start()
    assert inside.wait(timeout=60)
    looks = []
    absent = _presence.absent

    def look(users):
        looks.append(absent(users))
        if len(looks) == 3:
            go_on.set()
        return looks[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_presence, "absent", look)
        threads[1].start()
        for thread in threads:
            thread.join(timeout=120)
    assert (order, looks[:3]) == (["used", "closed"], [[]] * 3)
