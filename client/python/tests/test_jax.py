"""The JAX front against formulas in float64 over the whole batch. Workers are processes: JAX has one runtime in
each.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import signal
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


# Trains two layers for some steps on its rows; alone, it is the reference.
_TRAINER = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, numpy as np, syncbn, syncbn.jax as sync
target, rank, world, group, inputs, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
given = np.load(inputs)
ends = given["ends"] if world > 1 else given["ends"][[0, -1]]
x, labels = (jnp.asarray(given[name])[int(ends[rank]):int(ends[rank + 1])] for name in ("x", "labels"))
with syncbn.Worker(target, group, rank, world, timeout=60) as worker, sync.typed_errors():
    def loss(parameters, states):
        h, new = x, []
        for index, (weight, state) in enumerate(zip(parameters[:2], states)):
            h, state = sync.sync_batch_norm(
                h @ weight, parameters[2][index], parameters[3][index], state, layer=f"bn{index}", worker=worker)
            h = jnp.tanh(h)
            new.append(state)
        return jnp.square(h.sum(1) - labels).sum(), new
    step = jax.jit(jax.grad(loss, has_aux=True))
    parameters = [jnp.asarray(given[name]) for name in ("w0", "w1", "scales", "biases")]
    states = [sync.init_statistics(parameters[0].shape[1], jnp.float64) for _ in range(2)]
    for _ in range(4):
        gradients, states = step(parameters, states)
        flat = np.concatenate([np.ravel(g) for g in gradients])
        total, ends_at = worker.all_reduce("gradients", flat), np.cumsum([p.size for p in parameters])
        parameters = [
            p - 0.01 * g.reshape(p.shape) for p, g in zip(parameters, np.split(total, ends_at[:-1]))]
    np.savez(output, *parameters, *(v for state in states for v in state))
"""

_DEVICES = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp, numpy as np, syncbn, syncbn.jax as sync
from jax.sharding import Mesh, NamedSharding, PartitionSpec
try:
    from jax import shard_map
except ImportError:
    from jax.experimental.shard_map import shard_map
devices = jax.devices()
assert len(devices) == 2
mesh, parts = Mesh(np.array(devices), ("d",)), PartitionSpec("d")
x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 3)), jnp.float32)
with syncbn.Worker(sys.argv[1], "jax devices", 0, 1) as worker:
    normalize = lambda v: sync.sync_batch_norm(v, layer="bn", worker=worker)[0]
    # jit spreads the array: one batch, one round.
    y = jax.jit(normalize)(jax.device_put(x, NamedSharding(mesh, parts)))
    expected = (x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1)) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    # A call outside of jit does so too, forward and backward, of an array that lies on several devices.
    plain = lambda v: (v - v.mean((0, 1))) / jnp.sqrt(v.var((0, 1)) + 1e-5)
    gradient = lambda function: jax.grad(lambda v: (function(v) ** 3).sum())
    for spread in (parts, PartitionSpec()):
        on_devices = jax.device_put(x, NamedSharding(mesh, spread))
        y = normalize(on_devices)
        assert y.sharding.device_set == set(devices)
        np.testing.assert_allclose(y, expected, atol=1e-5)
        np.testing.assert_allclose(gradient(normalize)(on_devices), gradient(plain)(x), rtol=1e-4, atol=1e-4)
    begun = worker.synchronize("bn", 2, np.zeros(3), np.ones(3)).sequence
    for mapped in (jax.pmap(normalize), jax.jit(shard_map(normalize, mesh=mesh, in_specs=parts, out_specs=parts))):
        try:
            mapped(x)
        except ValueError as error:
            assert "a process for each device" in str(error), error
        else:
            raise AssertionError("not refused")
    # The refused calls have begun nothing.
    assert worker.synchronize("bn", 2, np.zeros(3), np.ones(3)).sequence == begun + 1
"""

_INTERRUPTED = """
import os, signal
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp, syncbn, syncbn.jax as sync
signal.signal(signal.SIGINT, signal.default_int_handler)  # Under nohup and the like it is ignored.
with syncbn.Master() as master:
    worker = syncbn.Worker(master.target, rank=0, world_size=2, timeout=600)
    # Large enough to be dispatched to another thread, by some versions.
    x = jnp.ones((600, 600))
    step = jax.jit(lambda v: sync.sync_batch_norm(v @ v, layer="bn", worker=worker)[0])
    compiled = step.lower(x).compile()
    try:
        with sync.typed_errors():
            print("waiting", flush=True)
            jax.block_until_ready(compiled(x))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    worker.close()
    # JAX 0.4 may still be in the callback's last lines, and an interpreter that ends at that moment aborts.
    os._exit(0)
"""


def environment(**more):
    return dict(os.environ, PYTHONPATH=str(pathlib.Path(syncbn.__file__).parent.parent), **more)


def run_all(commands):
    """Runs programs side by side, to their ends."""
    processes = [subprocess.Popen([sys.executable, "-c", *command], env=environment()) for command in commands]
    try:
        assert [process.wait(180) for process in processes] == [0] * len(commands)
    finally:
        for process in processes:
            process.kill()
            process.wait()


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
    run_all(
        [
            [_WORKER, master.target, str(rank), str(len(SIZES)), dtype, mode, inputs, outputs[rank]]
            for rank in range(len(SIZES))
        ]
    )
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


def test_two_layers_train_as_on_the_global_batch(master, tmp_path):
    rng = np.random.default_rng(SEED)
    inputs = tmp_path / "inputs.npz"
    np.savez(
        inputs,
        x=rng.normal(2.0, 3.0, (sum(SIZES), 6)),
        labels=rng.normal(size=sum(SIZES)),
        w0=rng.normal(size=(6, C)),
        w1=rng.normal(size=(C, C)),
        scales=rng.uniform(0.5, 2, (2, C)),
        biases=rng.normal(size=(2, C)),
        ends=np.concatenate([[0], np.cumsum(SIZES)]),
    )
    outputs = [tmp_path / f"{rank}.npz" for rank in range(len(SIZES))]
    whole = tmp_path / "whole.npz"
    run_all(
        [[_TRAINER, master.target, str(r), str(len(SIZES)), "jax parts", inputs, o] for r, o in enumerate(outputs)]
        + [[_TRAINER, master.target, "0", "1", "jax whole", inputs, whole]]
    )
    expected = np.load(whole)
    assert len(expected.files) == 8
    for output in outputs:
        actual = np.load(output)
        for name in expected.files:
            np.testing.assert_allclose(actual[name], expected[name], rtol=1e-10, atol=1e-12, err_msg=name)


def test_several_devices_of_a_process(master):
    flags = "--xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", _DEVICES, master.target],
        env=environment(XLA_FLAGS=flags),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr


def test_a_loop_in_the_program(master):
    """lax.scan has a round for each iteration, in order, forward and backward."""
    x = jnp.asarray(np.random.default_rng(SEED).normal(size=(3, 5, 2)), jnp.float32)
    with syncbn.Worker(master.target, "jax scan", 0, 1) as worker:
        normalize = lambda v: sync.sync_batch_norm(v, layer="bn", worker=worker)[0] ** 3
        scanned = lambda v: jax.lax.scan(lambda carry, part: (carry + normalize(part).sum(), None), 0.0, v)[0]
        together = jax.grad(scanned)(x)
        one_by_one = jnp.stack([jax.grad(lambda v: normalize(v).sum())(part) for part in x])
    np.testing.assert_allclose(together, one_by_one, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_an_error_of_a_round_is_typed(master, compiled, phase):
    """Rank 1 takes part in nothing, or ends after the forward round, at an event, since compiling may take long."""
    expected = {"forward": (4, "ROUND_TIMEOUT", "bn", (1,)), "backward": (14, "WORKER_LOST", "bn", (1,))}[phase]
    timeout = 0.5 if phase == "forward" else 60.0
    with contextlib.ExitStack() as stack:
        group = f"jax errors {compiled} {phase}"
        worker, other = (stack.enter_context(syncbn.Worker(master.target, group, r, 2, timeout=timeout)) for r in (0, 1))
        step = jax.grad(lambda v: (sync.sync_batch_norm(v, layer="bn", worker=worker)[0] ** 3).sum())
        step = jax.jit(step) if compiled else step

        def forward_alone():
            try:
                return other.synchronize("bn", 1, [2.0, 3.0], [0.0, 0.0], backward=True).count
            finally:
                other.close()

        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        started = pool.submit(forward_alone) if phase == "backward" else None
        with pytest.raises(syncbn.Error) as caught, sync.typed_errors():
            jax.block_until_ready(step(jnp.ones((3, 2))))
        error = caught.value
        assert type(error) is (syncbn.DeadlineExceeded if phase == "forward" else syncbn.WorkerLost)
        assert (error.code, error.reason, error.layer, error.ranks) == expected
        assert phase in error.message and isinstance(error.__cause__, RuntimeError)
        assert started is None or started.result() == 4
        # Other errors pass as they are, also while one of a callback is remembered.
        with pytest.raises(RuntimeError, match="mine"), sync.typed_errors():
            raise RuntimeError("mine")


def test_a_single_value_in_all_raises(master):
    with syncbn.Worker(master.target, "jax single", 0, 1) as worker:
        with pytest.raises(ValueError, match="more than 1 value"), sync.typed_errors():
            jax.block_until_ready(sync.sync_batch_norm(jnp.ones((1, 2)), layer="bn", worker=worker))


def test_no_value_anywhere_changes_nothing(master):
    statistics = sync.RunningStatistics(jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, 4.0]))
    with syncbn.Worker(master.target, "jax empty", 0, 1) as worker:
        y, after = jax.jit(lambda v: sync.sync_batch_norm(v, None, None, statistics, layer="bn", worker=worker))(
            jnp.zeros((0, 3, 2))
        )
    assert y.shape == (0, 3, 2)
    np.testing.assert_array_equal(after.mean, statistics.mean)
    np.testing.assert_array_equal(after.var, statistics.var)


def test_ctrl_c_ends_a_round():
    process = subprocess.Popen([sys.executable, "-c", _INTERRUPTED], stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "interrupted\n"
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
