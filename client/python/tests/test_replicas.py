"""Replicas on threads of one process: one worker together, the whole batch's results."""

import copy
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import syncbn
import syncbn.torch as sync
from syncbn.torch import _replicas, compat

SEED = 77


def make_model(affine=True, dtype=torch.float64):
    torch.manual_seed(SEED)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, bias=False),
        torch.nn.BatchNorm2d(4, affine=affine),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 5, 3, bias=False),
        torch.nn.BatchNorm2d(5, affine=affine, momentum=None),
        torch.nn.Flatten(),
        torch.nn.Linear(5 * 4, 3),
    ).to(dtype)


def batch(count):
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn((count, 2, 6, 6), generator=generator, dtype=torch.float64) * 3 + 5


def test_merging_is_that_of_all_values():
    rng = np.random.default_rng(SEED)
    parts = [rng.normal(1e3, 1.0, (n, 4)) for n in (0, 3, 0, 1, 7)]
    moments = [
        (len(p), p.mean(0), ((p - p.mean(0)) ** 2).sum(0)) if len(p) else (0, np.zeros(4), np.zeros(4)) for p in parts
    ]
    count, mean, m2 = _replicas.merge(moments)
    whole = np.concatenate(parts)
    assert count == len(whole)
    np.testing.assert_allclose(mean, whole.mean(0), rtol=1e-15)
    np.testing.assert_allclose(m2, ((whole - whole.mean(0)) ** 2).sum(0), rtol=1e-9)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("sizes", [(8,), (5, 2), (1, 6, 0)])
def test_training_with_replicas_is_training_on_the_whole_batch(group, sizes, affine):
    whole, x = make_model(affine), batch(sum(sizes))
    wholes_x = x.clone().requires_grad_()
    models = [copy.deepcopy(whole) for _ in sizes]
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (whole(wholes_x).square().sum() / len(x)).backward()
        optimizer.step()

    def run(worker):
        model = sync.convert_sync_batchnorm(models[worker.rank], worker)
        parallel = compat.DataParallelWithCallback(model, replicas=3)
        part = x.split(list(sizes))[worker.rank].clone().requires_grad_()
        mine = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            mine.zero_grad()
            y = parallel(part)
            assert len(y) == len(part)
            y.square().sum().backward()
            sync.all_reduce_gradients(model, worker, weight=len(part))
            mine.step()
        return part.grad, model.state_dict(), parallel.eval()(part)

    for gradient, state, evaluated in group(len(sizes), run):
        for name, wanted in whole.state_dict().items():
            torch.testing.assert_close(state[name], wanted, rtol=1e-9, atol=1e-11, msg=name)
        assert evaluated.shape[1:] == (3,)


def test_replicas_send_one_contribution_beside_a_worker_without_any(group):
    """Workers that run replicas and workers that do not are one group; the clamped mode, one channel below epsilon."""
    scale = torch.tensor([0.01, 1.0], dtype=torch.float64)
    x = batch(9)[:, :, 0, 0] * scale
    dy = batch(9)[:, :, 1, 1]
    wholes_x = x.clone().requires_grad_()
    invstd = wholes_x.var(0, unbiased=False).clamp(min=0.5).rsqrt()
    expected = (wholes_x - wholes_x.mean(0)) * invstd
    expected.backward(dy)

    def run(worker):
        layer = compat.SynchronizedBatchNorm1d(2, eps=0.5, worker=worker, layer="bn").double()
        model = compat.DataParallelWithCallback(layer, replicas=1 + 2 * worker.rank)
        part = x.split([4, 5])[worker.rank].clone().requires_grad_()
        y = model(part)
        y.backward(dy.split([4, 5])[worker.rank])
        return y.detach(), part.grad

    results = group(2, run)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), expected.detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), wholes_x.grad, rtol=1e-11, atol=1e-11)


def test_replicas_without_gradients_serve_a_worker_that_needs_them(group):
    x = batch(6)[:, :, 0, 0]

    def run(worker):
        layer = sync.SyncBatchNorm(2, worker=worker, layer="bn", affine=False, dtype=torch.float64)
        model = compat.DataParallelWithCallback(layer, replicas=2 if worker.rank == 0 else 1)
        y = model(x.split([4, 2])[worker.rank].clone().requires_grad_(worker.rank == 1))
        y.pow(3).sum().backward()
        with torch.no_grad():
            return model(x).requires_grad

    assert group(2, run) == [False, False]


def test_a_layer_called_twice_and_structured_values(group):
    class Twice(torch.nn.Module):
        def __init__(self, worker):
            super().__init__()
            self.bn = sync.SyncBatchNorm(2, worker=worker, dtype=torch.float64)

        def forward(self, pair, scale, shift):
            y = self.bn(self.bn(pair["a"]).sin() * scale)
            return {"y": y + shift, "sum": (pair["b"] + scale, y.sum())}

    def run(worker):
        model = compat.DataParallelWithCallback(Twice(worker), replicas=2)
        x = batch(4)[:, :, 0, 0]
        out = model({"a": x, "b": x}, 2.0, shift=torch.zeros(4, 1, dtype=torch.float64))
        first = torch.nn.functional.batch_norm(x, None, None, training=True)
        wanted = torch.nn.functional.batch_norm(first.sin() * 2.0, None, None, training=True)
        torch.testing.assert_close(out["y"], wanted, rtol=1e-9, atol=1e-9)
        assert torch.equal(out["sum"][0], x + 2.0) and out["sum"][1].shape == (2,)
        return model.module.bn.layer, int(model.module.bn.num_batches_tracked)

    assert group(1, run) == [("bn", 2)]


def test_every_replica_reads_the_count_of_the_batch_that_is_under_way(group):
    """Replica 0 counts the batch for all. Here it comes last, and the others read the count at once."""
    others_come, seen = threading.Event(), []

    class Counting(torch.nn.BatchNorm1d):
        def forward(self, x):
            if _replicas.current().replica != 0:
                others_come.set()
            else:
                assert others_come.wait(60)
                torch.linalg.eigvals(torch.rand(300, 300))  # Time for the others, who have nothing left to do.
            self.num_batches_tracked.add_(1)
            seen.append(int(self.num_batches_tracked))
            return torch.nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, 1.0 / seen[-1], self.eps
            )

    def run(worker):
        model = sync.convert_sync_batchnorm(torch.nn.Sequential(Counting(2)).double(), worker)
        for _ in range(2):
            others_come.clear()
            compat.DataParallelWithCallback(model, replicas=3)(batch(2).reshape(-1, 2)[:12])
        return int(model[0].num_batches_tracked)

    assert group(1, run) == [2]
    assert seen == [1] * 3 + [2] * 3


def test_half_inputs_and_autocast(group):
    def run(worker):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), sync.SyncBatchNorm(3, worker=worker))
        parallel = compat.DataParallelWithCallback(model, replicas=2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = parallel(torch.randn(6, 2))
        y.float().square().sum().backward()
        return y.dtype, model[1].weight.grad.dtype

    assert group(1, run) == [(torch.bfloat16, torch.float32)]


def test_the_default_worker_is_the_callers(group):
    def run(worker):
        model = compat.DataParallelWithCallback(sync.SyncBatchNorm(2), replicas=2)
        return model(torch.arange(8.0).reshape(4, 2)).shape

    assert group(2, run) == [(4, 2)] * 2


class Uneven(torch.nn.Module):
    """A replica that skips a layer which the other runs, or fails."""

    def __init__(self, worker, fails):
        super().__init__()
        self.a = sync.SyncBatchNorm(2, worker=worker)
        self.b = sync.SyncBatchNorm(2, worker=worker)
        self.fails = fails

    def forward(self, x):
        if x[0, 0] == 0:
            if self.fails:
                raise ZeroDivisionError
            return x
        return self.b(x) if x[0, 0] == 1 else self.a(x)


def test_replicas_that_differ_fail_at_once(group):
    def run(worker):
        model = compat.DataParallelWithCallback(Uneven(worker, False), replicas=2)
        for rows in ([0.0, 1.0], [2.0, 1.0]):
            with pytest.raises(RuntimeError, match="do not run the same layers.*'b'"):
                model(torch.tensor(rows).repeat_interleave(4).reshape(4, 2))
        failing = compat.DataParallelWithCallback(Uneven(worker, True), replicas=2)
        with pytest.raises(ZeroDivisionError):
            failing(torch.tensor([0.0, 1.0]).repeat_interleave(4).reshape(4, 2))
        return worker.all_reduce("after", [1.0])[0]

    assert group(1, run, timeout=600.0) == [1.0]


def test_an_error_of_the_round_reaches_the_caller(master):
    with syncbn.Worker(master.target, "replicas alone", 0, 2, timeout=0.2) as worker:
        model = compat.DataParallelWithCallback(sync.SyncBatchNorm(2, worker=worker, layer="bn"), replicas=2)
        with pytest.raises(syncbn.DeadlineExceeded) as caught:
            model(torch.ones(4, 2))
    assert caught.value.ranks == (1,)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_refused(group, reentrant):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(torch.nn.Module):
        def __init__(self, worker):
            super().__init__()
            self.bn = sync.SyncBatchNorm(2, worker=worker)

        def forward(self, x):
            return checkpoint(self.bn, x, use_reentrant=reentrant)

    def run(worker):
        model = compat.DataParallelWithCallback(Checkpointed(worker), replicas=2)
        with pytest.raises(RuntimeError, match="a process for each"):
            model(torch.ones(4, 2, requires_grad=True))

    group(1, run)


_INTERRUPTED = """
import signal, torch, syncbn, syncbn.torch
from syncbn.torch import compat
signal.signal(signal.SIGINT, signal.default_int_handler)  # Under nohup and the like it is ignored.
with syncbn.Master() as master:
    worker = syncbn.Worker(master.target, rank=0, world_size=2, timeout=600)
    model = compat.DataParallelWithCallback(syncbn.torch.SyncBatchNorm(2, worker=worker), replicas=2)
    try:
        print("waiting", flush=True)
        model(torch.ones(4, 2))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    worker.close()
"""


def test_ctrl_c_ends_the_replicas_wait():
    process = subprocess.Popen([sys.executable, "-c", _INTERRUPTED], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "interrupted\n"
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
