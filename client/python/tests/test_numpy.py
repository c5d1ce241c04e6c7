"""The NumPy front against formulas in float64 over the whole batch."""

import gc
import os
import pathlib
import subprocess
import sys
import weakref

import numpy as np
import pytest

import syncbn
import syncbn.numpy as sync
from syncbn import _dlpack

SEED = 4711
SIZES = (2, 0, 3)
C = 4
EPS = 0.01


def oracle(x, weight, bias, dy, residual, relu, mode, eps=EPS):
    """Computes everything by the central formulas over [N, C, ...] in float64."""
    axes = tuple(a for a in range(x.ndim) if a != 1)
    wide = lambda v: v.reshape([1, -1] + [1] * (x.ndim - 2))
    n = x.size // x.shape[1]
    mean, var = x.mean(axes), x.var(axes)
    floor = np.maximum(var, eps) if mode == "clamp" else var + eps
    invstd = 1 / np.sqrt(floor)
    hat = (x - wide(mean)) * wide(invstd)
    y = hat * wide(weight) + wide(bias) + residual
    if relu:
        dy = dy * (y > 0)
        y = np.maximum(y, 0)
    free = np.ones_like(var) if mode == "add" else (var >= eps).astype(float)
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


@pytest.mark.parametrize("channels_last", [False, True])
def test_dense_memory_is_taken_as_it_lies(group, channels_last):
    """Channels first and last, for either meaning of the axes: no copy, and results in the same memory order."""
    rng = np.random.default_rng(SEED)
    x, dy = rng.normal(size=(3, 5, 2, C)), rng.normal(size=(3, 5, 2, C))
    for order in ("channels innermost", "channels second"):
        lay = (lambda v: v) if order == "channels innermost" else lambda v: np.moveaxis(np.moveaxis(v, -1, 1).copy(), 1, -1)
        give = lambda v: v if channels_last else np.moveaxis(v, -1, 1)
        given, gradient, extra = give(lay(x)), give(lay(dy)), give(x.copy())

        def run(worker):
            y, state = sync.forward(worker, "layer", given, channels_last=channels_last, residual=extra, relu=True)
            assert np.shares_memory(state._x, given)
            return y, state.backward(gradient)

        y, gradients = group(1, run)[0]
        want_y, want_dx, _, _, want_dr, _, _ = oracle(
            *(np.moveaxis(v, -1, 1) for v in (x,)), np.ones(C), np.zeros(C), np.moveaxis(dy, -1, 1),
            np.moveaxis(x, -1, 1), True, "add", eps=1e-5
        )
        for actual, wanted in ((y, want_y), (gradients.dx, want_dx), (gradients.d_residual, want_dr)):
            assert actual.shape == given.shape and actual.strides == given.strides
            np.testing.assert_allclose(np.moveaxis(actual, -1, 1) if channels_last else actual, wanted, atol=1e-13)


def same_as(x, **options):
    """Forward and backward of x as given, through `forward`; checked against the oracle, and whether it was copied."""

    def check(worker):
        wide = np.asarray(options.get("wide", x), np.float64)
        y, state = sync.forward(worker, "layer", x)
        dx = state.backward(x).dx
        wanted = oracle(wide, np.ones(wide.shape[1]), np.zeros(wide.shape[1]), wide, 0.0, False, "add", eps=1e-5)
        tolerance = options.get("tolerance", 1e-13)
        np.testing.assert_allclose(y.astype(np.float64), wanted[0], atol=tolerance * 4)
        np.testing.assert_allclose(dx.astype(np.float64), wanted[1], atol=tolerance * np.abs(wide).max() * 4)
        evaluated = sync.evaluate(x, wide.mean(0), wide.var(0))
        np.testing.assert_allclose(evaluated.astype(np.float64), wanted[0], atol=tolerance * 4)
        return state._x

    return check


MATRIX = np.arange(12.0).reshape(4, 3) ** 1.5


def test_read_only_arrays(group):
    x = MATRIX.copy()
    x.flags.writeable = False
    assert np.shares_memory(group(1, same_as(x))[0], x)


def test_bfloat16_arrays(group):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = MATRIX.astype(ml_dtypes.bfloat16)
    taken = group(1, same_as(x, tolerance=2.0**-8))[0]
    assert taken.dtype == ml_dtypes.bfloat16 and np.shares_memory(taken, x)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_tensors_of_torch(group, dtype):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(MATRIX).to(getattr(torch, dtype))
    if dtype == "bfloat16" and _dlpack.bfloat16() is None:
        with pytest.raises(TypeError, match="ml_dtypes"):
            sync.evaluate(x, np.zeros(3), np.ones(3))
        return
    tolerance = {"float64": 1e-13, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2.0**-8}[dtype]
    taken = group(1, same_as(x, wide=x.double(), tolerance=tolerance))[0]
    assert taken.dtype.name == dtype and taken.ctypes.data == x.data_ptr()


def test_tensors_of_torch_in_other_orders(group):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(np.random.default_rng(SEED).normal(size=(2, C, 3, 5)))
    y = group(1, lambda worker: sync.forward(worker, "layer", x, backward=False)[0])[0]
    for other in (x.contiguous(memory_format=torch.channels_last), torch.cat([x, x], -1)[..., :5], x.transpose(2, 3)):
        z = group(1, lambda worker: sync.forward(worker, "layer", other, backward=False)[0])[0]
        np.testing.assert_allclose(z if z.shape == y.shape else z.swapaxes(2, 3), y, atol=1e-14)
    empty = group(1, lambda worker: sync.forward(worker, "layer", x[:0], backward=False)[0])[0]
    assert empty.shape == (0, C, 3, 5)


def test_a_tensor_that_records_gradients_is_refused(group):
    torch = pytest.importorskip("torch")

    def run(worker):
        with pytest.raises(TypeError, match="torch.Tensor through DLPack.*grad"):
            sync.forward(worker, "layer", torch.ones(2, 3, requires_grad=True))

    group(1, run)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_arrays_of_jax(group, dtype):
    jnp = pytest.importorskip("jax.numpy")
    x = jnp.asarray(MATRIX, dtype)
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2.0**-8}[dtype]
    taken = group(1, same_as(x, tolerance=tolerance))[0]
    assert taken.dtype.name == dtype and taken.ctypes.data == x.unsafe_buffer_pointer()


class Elsewhere:
    """An array in a GPU's memory, as far as its protocols tell."""

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **options):
        raise AssertionError("memory of a GPU was asked for")


class OldElsewhere:
    __cuda_array_interface__ = {"shape": (2, 3), "typestr": "<f4", "data": (4096, False), "version": 2}


@pytest.mark.parametrize("x", [Elsewhere(), OldElsewhere()])
def test_memory_of_a_gpu_is_refused(x):
    with pytest.raises(TypeError, match="Elsewhere .*GPU"):
        sync.evaluate(x, np.zeros(3), np.ones(3))


def test_old_and_new_capsules_and_their_owners():
    """With and without a version; the memory lives as long as the array, and is released after it."""

    class Exporter:
        def __init__(self, array, version):
            self.array, self.version = array, version

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

        def __dlpack__(self, **options):
            if self.version is None and options:
                raise TypeError("unexpected keyword")
            return self.array.__dlpack__(**({} if self.version is None else options))

    versions = [None] + [(1, 0)] * (np.lib.NumpyVersion(np.__version__) >= "2.1.0")
    for version in versions:
        array = MATRIX.copy()
        watch = weakref.ref(array)
        taken = _dlpack.to_numpy(Exporter(array[:, ::2], version))
        del array
        gc.collect()
        assert watch() is not None
        np.testing.assert_array_equal(taken, MATRIX[:, ::2])
        del taken
        gc.collect()
        assert watch() is None
    if len(versions) > 1:
        fixed = MATRIX.copy()
        fixed.flags.writeable = False
        assert not _dlpack.to_numpy(Exporter(fixed, (1, 0))).flags.writeable


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


@pytest.mark.parametrize(
    "x,name",
    [
        (MATRIX.astype(complex), "complex128"),
        (MATRIX.astype(np.int64), "int64"),
        (MATRIX > 3, "bool"),
        (MATRIX.astype(object), "object"),
        (MATRIX.astype(np.longdouble), str(np.dtype(np.longdouble))),
        (MATRIX.astype(">f4"), ">f4"),
        ([[1, 2], [3, 4]], "int64"),
        (np.array([["a", "b"]]), "U1"),
        (np.ma.masked_array(MATRIX, MATRIX > 3), "MaskedArray"),
    ],
)
def test_types_that_are_refused(group, x, name):
    """Every argument that is an array gives the same error."""

    def run(worker):
        with pytest.raises(TypeError, match=name):
            sync.forward(worker, "layer", x)
        with pytest.raises(TypeError, match=name):
            sync.forward(worker, "layer", MATRIX, residual=x)
        with pytest.raises(TypeError, match=name):
            sync.evaluate(x, np.zeros(3), np.ones(3))
        _, state = sync.forward(worker, "layer", MATRIX)
        with pytest.raises(TypeError, match=name):
            state.backward(x)
        state.backward(MATRIX)

    group(1, run)


def test_float8_is_refused(group):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        sync.evaluate(MATRIX.astype(ml_dtypes.float8_e4m3fn), np.zeros(3), np.ones(3))


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_lists_and_matrices(group):
    run = lambda x: group(1, lambda worker: sync.forward(worker, "layer", x, backward=False)[0])[0]
    for x in (MATRIX.tolist(), np.matrix(MATRIX)):
        np.testing.assert_array_equal(run(x), run(MATRIX))


@pytest.mark.parametrize(
    "change,error,text",
    [
        (dict(worker="127.0.0.1:50051"), TypeError, "syncbn.Worker"),
        (dict(layer=""), ValueError, "is empty"),
        (dict(layer="a\0b"), ValueError, "NUL"),
        (dict(layer="é" * 128), ValueError, "256 bytes"),
        (dict(layer=3), TypeError, "has to be a string"),
        (dict(momentum=-0.1), ValueError, "momentum is -0.1"),
        (dict(momentum=float("nan")), ValueError, "momentum is nan"),
        (dict(momentum=None), TypeError, "momentum is None"),
        (dict(eps=-1e-5), ValueError, "eps is -1e-05"),
        (dict(eps=float("inf")), ValueError, "eps is inf"),
        (dict(eps_mode="plus"), ValueError, "eps_mode is"),
        (dict(numeric=True), ValueError, "numeric is"),
        (dict(num_threads=0), ValueError, "num_threads is 0"),
        (dict(num_threads=2**31), ValueError, "num_threads is 2147483648"),
        (dict(num_threads=1.0), TypeError, "num_threads is 1.0"),
        (dict(sequence=-1), ValueError, "sequence is -1"),
        (dict(sequence=2**64), ValueError, "sequence is 18446744073709551616"),
        (dict(sequence=0.0), TypeError, "sequence is 0.0"),
        (dict(weight=np.ones((3, 1))), ValueError, "weight has shape"),
        (dict(running_var=np.ones(3, int)), TypeError, "int64"),
        (dict(x=np.ones((2, 0))), ValueError, "no channels"),
    ],
)
def test_arguments_out_of_range(group, change, error, text):
    def run(worker):
        arguments = dict(dict(worker=worker, layer="layer", x=MATRIX), **change)
        with pytest.raises(error, match=text):
            sync.forward(**arguments)
        sync.forward(worker, "layer", MATRIX, backward=False)

    group(1, run)


@pytest.mark.parametrize("size", [1, 2])
def test_going_back_several_times(group, size):
    """Each time with another gradient; the same gradient gives the same bits."""
    rng = np.random.default_rng(SEED)
    x, dys = rng.normal(size=(5, C, 3)), rng.normal(size=(3, 5, C, 3))
    parts = lambda v: np.split(v, [2])[:size] if size > 1 else [v]

    def run(worker):
        _, state = sync.forward(worker, "layer", parts(x)[worker.rank], eps=EPS)
        found = [state.backward(parts(dy)[worker.rank]).dx for dy in dys]
        np.testing.assert_array_equal(state.backward(parts(dys[0])[worker.rank]).dx, found[0])
        return found

    results = group(size, run)
    for index, dy in enumerate(dys):
        wanted = oracle(x, np.ones(C), np.zeros(C), dy, 0.0, False, "add")[1]
        np.testing.assert_allclose(np.concatenate([found[index] for found in results]), wanted, atol=1e-13)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("mask", [None, True])
def test_numbers_that_are_not_finite(group, bad, mask):
    """In a batch the policy refuses or propagates them. In a gradient they always propagate, within their channel."""
    x, dy = MATRIX.copy(), np.random.default_rng(SEED).normal(size=MATRIX.shape)
    x[1, 1], dy[2, 2] = bad, bad

    def refused(worker):
        with pytest.raises(syncbn.NotFinite):
            sync.forward(worker, "layer", x, mask=mask)

    def propagated(worker):
        y, state = sync.forward(worker, "layer", x, mask=mask, numeric="propagate")
        return y, state.backward(dy).dx

    group(1, refused)
    y, dx = group(1, propagated)[0]
    wanted = oracle(MATRIX, np.ones(3), np.zeros(3), np.nan_to_num(dy, posinf=0.0), 0.0, False, "add", eps=1e-5)
    np.testing.assert_allclose(y[:, [0, 2]], wanted[0][:, [0, 2]], atol=1e-12)
    np.testing.assert_allclose(dx[:, 0], wanted[1][:, 0], atol=1e-12)
    assert np.isnan(y[:, 1]).all() and not np.isfinite(dx[:, 1:]).any()


def test_silence_at_exit(master):
    """A pass that is still referred to when the interpreter ends."""
    program = (
        "import sys, numpy, syncbn, syncbn.numpy\n"
        "worker = syncbn.Worker(sys.argv[1], 'numpy exit', 0, 1)\n"
        "y, state = syncbn.numpy.forward(worker, 'layer', numpy.ones((3, 2)))\n"
        "masked = syncbn.numpy.forward(worker, 'layer', numpy.ones((3, 2)), mask=True)\n"
        "sys.modules['kept'] = state\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(pathlib.Path(syncbn.__file__).parent.parent))
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", program, master.target], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_many_forward_passes_before_the_first_backward_pass(group):
    """Forward rounds that await a backward round are kept: 300 uses of a layer, with backward passes in reverse."""
    rng = np.random.default_rng(SEED)
    x, dy = rng.normal(size=(300, 4, 2)), rng.normal(size=(4, 2))

    def run(worker):
        rows = slice(worker.rank, None, 2)
        states = [sync.forward(worker, "layer", part[rows], eps=EPS)[1] for part in x]
        return [state.backward(dy[rows]).dx for state in reversed(states)][::-1]

    for index, (even, odd) in enumerate(zip(*group(2, run))):
        wanted = oracle(x[index], np.ones(2), np.zeros(2), dy, 0.0, False, "add")[1]
        np.testing.assert_allclose(even, wanted[0::2], atol=1e-12)
        np.testing.assert_allclose(odd, wanted[1::2], atol=1e-12)
