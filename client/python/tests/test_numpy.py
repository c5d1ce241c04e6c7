"""The NumPy front against formulas in float64 over the whole batch."""

import numpy as np
import pytest

import syncbn.numpy as sync

SEED = 4711
SIZES = (2, 0, 3)
C = 4
EPS = 0.01


def oracle(x, weight, bias, dy, residual, relu, mode):
    """Everything by central formulas over [N, C, ...] in float64."""
    axes = tuple(a for a in range(x.ndim) if a != 1)
    wide = lambda v: v.reshape([1, -1] + [1] * (x.ndim - 2))
    n = x.size // x.shape[1]
    mean, var = x.mean(axes), x.var(axes)
    floor = np.maximum(var, EPS) if mode == "clamp" else var + EPS
    invstd = 1 / np.sqrt(floor)
    hat = (x - wide(mean)) * wide(invstd)
    y = hat * wide(weight) + wide(bias) + residual
    if relu:
        dy = dy * (y > 0)
        y = np.maximum(y, 0)
    free = np.ones(C) if mode == "add" else (var >= EPS).astype(float)
    dx = wide(weight * invstd) * (dy - wide(dy.mean(axes)) - hat * wide(free * (dy * hat).mean(axes)))
    return y, dx, (dy * hat).sum(axes), dy.sum(axes), dy, mean, var * n / (n - 1)


@pytest.mark.parametrize("dtype,tolerance", [(np.float64, 1e-12), (np.float32, 1e-5), (np.float16, 4e-3)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("fused", ["plain", "relu", "residual", "both"])
@pytest.mark.parametrize("mode", ["add", "clamp"])
def test_forward_and_backward(group, dtype, tolerance, channels_last, fused, mode):
    rng = np.random.default_rng(SEED)
    x = rng.normal(1.0, 2.0, (sum(SIZES), C, 3, 2)).astype(dtype)
    x[:, 1] = x[:, 1] * dtype(0.01) + dtype(1)  # A channel that the clamp holds.
    dy, residual = (rng.normal(size=x.shape).astype(dtype) for _ in range(2))
    residual *= dtype("residual" in fused or fused == "both")
    weight, bias = rng.normal(size=C).astype(np.float32), rng.normal(size=C).astype(np.float32)
    relu, has_residual = fused in ("relu", "both"), fused in ("residual", "both")
    arguments = [v.astype(np.float64) for v in (x, weight, bias, dy, residual)]
    y, dx, dw, db, dr, mean, var = oracle(*arguments, relu, mode)
    parts = lambda v: [
        np.ascontiguousarray(np.moveaxis(p, 1, -1)) if channels_last else p for p in np.split(v, np.cumsum(SIZES)[:-1])
    ]

    def run(worker):
        r = worker.rank
        running = np.zeros(C), np.ones(C)
        out, state = sync.forward(
            worker,
            "layer",
            parts(x)[r],
            weight,
            bias,
            running_mean=running[0],
            running_var=running[1],
            momentum=0.25,
            eps=EPS,
            eps_mode=mode,
            channels_last=channels_last,
            relu=relu,
            residual=parts(residual)[r] if has_residual else None,
        )
        assert state.count == sum(SIZES) * 6 and state.backward_required
        np.testing.assert_allclose(state.mean, mean, rtol=1e-9, atol=1e-9)
        return out, state.backward(parts(dy)[r]), running

    results = group(len(SIZES), run)
    together = lambda values: np.concatenate([np.moveaxis(v, -1, 1) if channels_last else v for v in values])
    near = lambda a, b: np.testing.assert_allclose(
        a.astype(np.float64), b, rtol=tolerance, atol=tolerance * np.abs(b).max()
    )
    near(together([out for out, _, _ in results]), y)
    near(together([g.dx for _, g, _ in results]), dx)
    np.testing.assert_allclose(sum(g.d_weight.astype(np.float64) for _, g, _ in results), dw, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(sum(g.d_bias.astype(np.float64) for _, g, _ in results), db, rtol=1e-4, atol=1e-3)
    if has_residual:
        near(together([g.d_residual for _, g, _ in results]), dr)
    for _, _, (running_mean, running_var) in results:
        near(running_mean, 0.25 * mean)
        near(running_var, 0.75 + 0.25 * var)


def test_evaluation():
    rng = np.random.default_rng(SEED)
    x, residual = rng.normal(size=(2, 5, C)), rng.normal(size=(2, 5, C))
    mean, var, weight, bias = rng.normal(size=C), rng.uniform(0.5, 2, C), rng.normal(size=C), rng.normal(size=C)
    y = sync.evaluate(x, mean, var, weight, bias, eps=EPS, channels_last=True, residual=residual, relu=True)
    np.testing.assert_allclose(y, np.maximum((x - mean) / np.sqrt(var + EPS) * weight + bias + residual, 0), atol=1e-14)


def test_what_is_not_contiguous_is_copied(group):
    x = np.arange(24.0).reshape(4, 6)[:, ::2]
    y = group(1, lambda worker: sync.forward(worker, "layer", x, backward=False)[0])[0]
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), atol=1e-14)


def test_tensors_come_through_dlpack(group):
    torch = pytest.importorskip("torch")
    x = torch.arange(12, dtype=torch.float64).reshape(4, 3)
    y = group(1, lambda worker: sync.forward(worker, "layer", x, backward=False)[0])[0]
    np.testing.assert_allclose(y.mean(0), np.zeros(3), atol=1e-14)


@pytest.mark.parametrize(
    "change,error",
    [
        (dict(x=np.zeros(3)), ValueError),
        (dict(x=np.zeros((2, 3), np.int32)), TypeError),
        (dict(weight=np.zeros(4)), ValueError),
        (dict(running_mean=np.zeros(6)[::2]), ValueError),
        (dict(residual=np.zeros((2, 4))), ValueError),
    ],
)
def test_wrong_arguments(group, change, error):
    arguments = {"x": np.zeros((2, 3)), **change}

    def run(worker):
        with pytest.raises(error):
            sync.forward(worker, "layer", arguments.pop("x"), **arguments)

    group(1, run)
