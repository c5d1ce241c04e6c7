"""The JAX front against formulas in float64 over the whole batch. Workers are processes: JAX has one runtime in
each.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

import syncbn
import syncbn.jax as sync

SEED = 515
SIZES = (2, 0, 3)
C = 4

_WORKER = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
if sys.argv[4] == "float64":
    jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, numpy as np, syncbn, syncbn.jax as sync
target, rank, world, dtype, mode, inputs, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
given = np.load(inputs)
with syncbn.Worker(target, "jax " + dtype + mode, rank, world, timeout=60) as worker:
    @jax.jit
    def step(x, scale, bias, statistics, dy):
        def loss(x, scale, bias):
            y, new = sync.sync_batch_norm(
                x, scale, bias, statistics, layer="bn", worker=worker, eps=0.01, eps_mode=mode, momentum=0.25)
            return (y * dy).sum(), (y, new)
        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, scale, bias)
    cast = lambda name: jnp.asarray(given[name].astype(dtype))
    ends = given["ends"]
    rows = slice(int(ends[rank]), int(ends[rank + 1]))
    statistics = sync.init_statistics(given["scale"].size, dtype)
    for _ in range(2):  # The second call takes the compiled step, and the next sequence.
        (_, (y, statistics)), (dx, ds, db) = step(
            cast("x")[rows], cast("scale"), cast("bias"), statistics, cast("dy")[rows])
    np.savez(output, y=y, dx=dx, ds=ds, db=db, mean=statistics.mean, var=statistics.var)
"""


def oracle(x, scale, bias, dy, mode):
    """Central formulas in float64 over [N, ..., C]."""
    axes = (0, 1)
    mean, var = x.mean(axes), x.var(axes)
    invstd = 1 / np.sqrt(np.maximum(var, 0.01) if mode == "clamp" else var + 0.01)
    free = (var >= 0.01) if mode == "clamp" else np.ones(C)
    hat = (x - mean) * invstd
    dx = scale * invstd * (dy - dy.mean(axes) - hat * free * (dy * hat).mean(axes))
    n = x.size // C
    return dict(y=hat * scale + bias, dx=dx, ds=(dy * hat).sum(axes), db=dy.sum(axes), mean=mean, var=var * n / (n - 1))


@pytest.mark.parametrize("dtype,mode,far", [("float64", "add", 0), ("float32", "clamp", 0), ("float32", "add", 1e4)])
def test_under_jit_and_grad(master, tmp_path, dtype, mode, far):
    rng = np.random.default_rng(SEED)
    x = rng.normal(far, 1.0, (sum(SIZES), 6, C))
    x[..., 1] = (x[..., 1] - far) * 0.01 + far  # A channel that the clamp holds.
    if far:
        x[..., 1] = x[..., 2]
    x, dy = x.astype(dtype), rng.normal(size=x.shape).astype(dtype)
    scale, bias = rng.normal(size=C).astype(dtype), rng.normal(size=C).astype(dtype)
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, x=x, dy=dy, scale=scale, bias=bias, ends=np.concatenate([[0], np.cumsum(SIZES)]))
    outputs = [tmp_path / f"{rank}.npz" for rank in range(len(SIZES))]
    environment = dict(os.environ, PYTHONPATH=str(pathlib.Path(syncbn.__file__).parent.parent))
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                _WORKER,
                master.target,
                str(rank),
                str(len(SIZES)),
                dtype,
                mode,
                inputs,
                outputs[rank],
            ],
            env=environment,
        )
        for rank in range(len(SIZES))
    ]
    try:
        assert [process.wait(180) for process in processes] == [0] * len(SIZES)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    results = [np.load(output) for output in outputs]
    expected = oracle(*(v.astype(np.float64) for v in (x, scale, bias, dy)), mode)
    tolerance = 1e-11 if dtype == "float64" else 3e-5

    def near(actual, name, wanted):
        np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max(), err_msg=name)

    for name in ("y", "dx"):
        near(np.concatenate([r[name] for r in results]), name, expected[name])
    for name in ("ds", "db"):
        near(sum(r[name].astype(np.float64) for r in results), name, expected[name])
    for r in results:  # Two updates with the same batch.
        near(r["mean"], "mean", expected["mean"] * (1 - 0.75**2))
        near(r["var"], "var", 0.75**2 + expected["var"] * (1 - 0.75**2))


def test_one_worker_in_this_process(master):
    x = jnp.asarray(np.random.default_rng(SEED).normal(size=(5, 3, 2)), jnp.float32)
    with syncbn.Worker(master.target, "jax here", 0, 1):
        y, statistics = jax.jit(lambda v: sync.sync_batch_norm(v, layer="bn", axis=1))(x)
        y.block_until_ready()
    assert statistics is None
    expected = (x - x.mean((0, 2), keepdims=True)) / np.sqrt(x.var((0, 2), keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_bfloat16_keeps_its_type(master):
    with syncbn.Worker(master.target, "jax bfloat16", 0, 1) as worker:
        y, _ = sync.sync_batch_norm(jnp.asarray([[1.0], [3.0]], jnp.bfloat16), layer="bn", worker=worker)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), [[-1.0], [1.0]], atol=1e-2)


def test_evaluation_needs_no_worker():
    statistics = sync.RunningStatistics(jnp.asarray([1.0, 2.0]), jnp.asarray([4.0, 9.0]))
    y, same = sync.sync_batch_norm(jnp.asarray([[3.0, 5.0]]), statistics=statistics, layer="bn", train=False, eps=0.0)
    np.testing.assert_allclose(y, [[1.0, 1.0]], rtol=1e-6)
    assert same is statistics
    with pytest.raises(ValueError, match="running statistics"):
        sync.sync_batch_norm(jnp.zeros((2, 2)), layer="bn", train=False)
