"""Tensors as a layer sees them at sight, and changes between its steps. The oracles are the close look, and
torch's own layer in float64 under the same changes."""

import ctypes
import itertools
import sys

import pytest

torch = pytest.importorskip("torch")

import syncbn.torch as sync
from syncbn import _library
from syncbn.torch import _functions, _supported, _tensors

SEED = 4111
CHANNELS = 3
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


class Subclass(torch.Tensor):
    """A tensor that keeps its class."""


def spread_out(v):
    """The same values with gaps between them."""
    wide = torch.full((v.numel(), 2), float("nan"), dtype=v.dtype)
    wide[:, 0] = v
    return wide[:, 0]


def batch(dtype=torch.float64, sizes=(4, 5)):
    generator = torch.Generator().manual_seed(SEED)
    return (torch.randn((6, CHANNELS, *sizes), generator=generator, dtype=torch.float64) * 2 + 1).to(dtype)


def vectors(dtype=torch.float64):
    return tuple(torch.linspace(low, 3.0, CHANNELS, dtype=dtype) for low in (1.0, 0.5, -1.0, 2.0))


def packed_vectors(*given):
    return b"".join(_tensors.readable_vector(v)[1] for v in given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(), (5,), (4, 5), (2, 4, 5)], ids=lambda sizes: f"{2 + len(sizes)}D")
def test_usual_tensors_are_described_as_by_the_close_look(dtype, sizes):
    x, given = batch(dtype, sizes), vectors(dtype)
    _, channels_last, packed = _tensors.described(x)
    number = _supported.TYPES[dtype]
    types = (CHANNELS, number, number, _library.DEVICE_CPU, 0)
    assert _tensors.at_sight(x, *given) == (channels_last, packed, packed_vectors(*given), types)
    for seen, vector in zip(_tensors.vector_forms(types), given):
        seen.check("the form", vector)
    _tensors.tensor_form(x.shape, packed).check("the form", x)


def test_channels_last_and_absent_vectors():
    x = batch().contiguous(memory_format=torch.channels_last)
    weight = torch.nn.Parameter(vectors()[0])
    _, channels_last, packed = _tensors.described(x)
    assert channels_last
    types = (CHANNELS, _library.FLOAT64, -1, _library.DEVICE_CPU, 0)
    assert _tensors.at_sight(x, weight, None, None, None) == (True, packed, packed_vectors(weight, None, None, None), types)
    assert _tensors.vector_forms(types)[1] is None


def test_a_type_of_its_own_for_each_vector():
    kinds = [v.to(dtype) for v, dtype in zip(vectors(), DTYPES)]
    seen = _tensors.at_sight(batch(torch.bfloat16), *kinds)
    assert seen is not None
    assert seen[2] == packed_vectors(*kinds)
    assert seen[3][1:3] == (_library.FLOAT32, _library.FLOAT64)


UNUSUAL_INPUTS = {
    "subclass": lambda x: x.as_subclass(Subclass),
    "integers": lambda x: x.long(),
    "complex": lambda x: x.to(torch.complex64),
    "1D": lambda x: x.reshape(-1),
    "no element": lambda x: x[:0],
    "no channel": lambda x: x[:, :0],
    "gaps": lambda x: x[:, :, :, ::2],
    "turned": lambda x: x.permute(3, 1, 2, 0),
    "expanded": lambda x: x[:, :, :, :1].expand(x.shape),
    "negative": lambda x: torch._neg_view(x),
    "zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("kind", list(UNUSUAL_INPUTS))
def test_unusual_inputs_are_looked_at_closely(kind):
    assert _tensors.at_sight(UNUSUAL_INPUTS[kind](batch()), *vectors()) is None


UNUSUAL_VECTORS = {
    "subclass": lambda v: v.as_subclass(Subclass),
    "number": lambda v: 1.0,
    "integers": lambda v: v.long(),
    "longer": lambda v: torch.cat([v, v]),
    "shorter": lambda v: v[:-1],
    "2D": lambda v: v.reshape(1, -1),
    "gaps": spread_out,
    "expanded": lambda v: v[:1].expand(v.shape),
    "negative": lambda v: torch._neg_view(v),
    "zero": lambda v: torch._efficientzerotensor(v.shape, dtype=v.dtype),
    "sparse": lambda v: v.to_sparse(),
    "meta": lambda v: v.to("meta"),
}


@pytest.mark.parametrize("kind", list(UNUSUAL_VECTORS))
@pytest.mark.parametrize("which", range(4), ids=["weight", "bias", "running_mean", "running_var"])
def test_unusual_vectors_are_looked_at_closely(kind, which):
    given = list(vectors())
    given[which] = UNUSUAL_VECTORS[kind](given[which])
    assert _tensors.at_sight(batch(), *given) is None


def test_under_forward_mode_and_a_trace_nothing_is_usual():
    from torch.autograd import forward_ad

    x, given, seen = batch(), vectors(), []
    with forward_ad.dual_level():
        assert _tensors.at_sight(x, *given) is None

    def traced(value):
        seen.append(_tensors.at_sight(value, *given))
        return value * 1

    torch.jit.trace(traced, x, check_trace=False)
    assert seen == [None]
    assert _tensors.at_sight(x, *given) is not None


ALL = (True, True, True, True)


def number_of(vector):
    return -1 if vector is None else _supported.TYPES[vector.dtype]


def saved_pass(like, weight_like, bias_like, needed, gate=None):
    """A pass over tensors of these forms, without its round."""
    _, channels_last, packed = _tensors.described(like)
    types = (like.shape[1], number_of(weight_like), number_of(bias_like), _library.DEVICE_CPU, 0)
    saved = _functions.Pass(None, like.shape, packed, channels_last, types, (), gate)
    saved.needed = needed
    return saved


def backward_sight(dy, x, like, weight, weight_like, bias_like=None, needed=ALL, gate=None):
    saved = saved_pass(like, weight_like, bias_like, needed)
    return _tensors.backward_sight(dy, x, weight, saved.shape, saved.packed, saved.types, needed, gate)


def in_words(arguments):
    """Arguments of a backward pass, without the addresses of new memory: who is there, and of what form."""
    gradients, inputs, outputs, kept = arguments
    forms = [None if g is None else (g.shape, g.dtype, g.stride(), type(g), g.requires_grad) for g in gradients]
    written = _library.BackwardOutputs.from_buffer_copy(outputs)
    types = [vector.type for vector in (written.d_weight, written.d_bias) if vector.data]
    return forms, inputs, [bool(written.dx), bool(written.d_residual), types]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(), (5,), (4, 5), (2, 4, 5)], ids=lambda sizes: f"{2 + len(sizes)}D")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "neither"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "relu"])
def test_usual_gradients_are_made_as_by_the_close_look(dtype, sizes, layout, affine, gated):
    if layout == torch.channels_last and len(sizes) != 2:
        sizes = (3, 2)
    x = batch(dtype, sizes).contiguous(memory_format=layout)
    dy = x.clone(memory_format=torch.preserve_format)
    weight = torch.nn.Parameter(vectors()[0]) if "weight" in affine else None
    bias = torch.nn.Parameter(vectors()[1]) if "bias" in affine else None
    gate = torch.zeros((x.numel() + 7) // 8, dtype=torch.uint8) if gated else None
    for needed in itertools.product((True, False), repeat=4):
        found = backward_sight(dy, x, x, weight, weight, bias, needed, gate)
        saved = saved_pass(x, weight, bias, needed, gate)
        assert in_words(found) == in_words(_functions._looked_at(saved, dy, x, weight, gate)), needed
        (dx, d_weight, d_bias, dz), _, outputs, kept = found
        written = _library.BackwardOutputs.from_buffer_copy(outputs)
        assert written.struct_size == len(outputs) == ctypes.sizeof(written)
        if needed[3] and not gated:
            assert dz is dy
        for gradient, address in (
            (dx if needed[0] else kept, written.dx),
            (dz if gated else None, written.d_residual),
            (d_weight, written.d_weight.data),
            (d_bias, written.d_bias.data),
        ):
            assert address == (None if gradient is None else gradient.data_ptr())


def test_a_bias_of_another_type_is_looked_at_closely():
    x, weight = batch(), vectors()[0]
    assert backward_sight(x, x, x, weight, weight, weight.float()) is None
    assert backward_sight(x, x, x, weight, weight, weight.float(), (True, True, False, False)) is not None
    assert backward_sight(x, x, x, None, None, weight) is None


UNUSUAL_GRADIENTS = {
    **{kind: change for kind, change in UNUSUAL_INPUTS.items() if kind != "turned"},
    "other shape": lambda x: x.flip(0)[1:],
    "other layout": lambda x: x.contiguous(memory_format=torch.channels_last),
    "other type": lambda x: x.float(),
}


@pytest.mark.parametrize("kind", list(UNUSUAL_GRADIENTS))
@pytest.mark.parametrize("which", range(2), ids=["dy", "x"])
def test_unusual_gradients_are_looked_at_closely(kind, which):
    given, weight = [batch(), batch()], vectors()[0]
    given[which] = UNUSUAL_GRADIENTS[kind](given[which])
    assert backward_sight(*given, batch(), weight, weight) is None
    if kind == "other layout":
        assert backward_sight(*given, given[which], weight, weight) is None


@pytest.mark.parametrize("kind", list(UNUSUAL_VECTORS) + ["absent", "unexpected"])
def test_unusual_weights_are_looked_at_closely(kind):
    weight = vectors()[0]
    given = None if kind == "absent" else UNUSUAL_VECTORS.get(kind, lambda v: v)(weight)
    expected = None if kind == "unexpected" else weight
    assert backward_sight(batch(), batch(), batch(), given, expected) is None


def test_an_interrupt_stays_one():
    """Torch asks a mode about each attribute, in Python, where Ctrl-C may come."""
    from torch.overrides import TorchFunctionMode

    class Interrupted(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise KeyboardInterrupt

    x, given = batch(), vectors()
    saved = saved_pass(x, None, None, ALL)
    with Interrupted(), pytest.raises(KeyboardInterrupt):
        _tensors.at_sight(x, *given)
    with Interrupted(), pytest.raises(KeyboardInterrupt):
        _tensors.backward_sight(x, x, None, saved.shape, saved.packed, saved.types, ALL, None)


def test_wrong_arguments_are_refused():
    for function in (_tensors.forward_sight, _tensors.backward_sight):
        with pytest.raises(TypeError):
            function()
        with pytest.raises(TypeError):
            function(*[batch()] * 10)


def test_looking_keeps_nothing():
    x, given = batch(), vectors()
    sparse = x.to_sparse()

    def look():
        for _ in range(100):
            _tensors.at_sight(x, *given)
            _tensors.at_sight(sparse, *given)
            backward_sight(x, x, x, given[0], given[0])
            backward_sight(sparse, x, x, given[0], given[0])

    objects = (x, sparse, *given, x.dtype, None, torch.Tensor, RuntimeError, _supported.TYPES, "shape", *_tensors._SIGHT)
    look()
    counts = [sys.getrefcount(value) for value in objects]
    look()
    # Others hold and leave what everybody knows; a reference lost in each call would show by the hundred.
    assert all(abs(sys.getrefcount(value) - before) < 50 for value, before in zip(objects, counts))


def with_data(name, change):
    """A change of what a parameter or buffer holds, the object staying the same."""

    def apply(layer):
        vector = getattr(layer, name)
        vector.data = change(vector.data)

    return apply


def with_object(name, change):
    """A change of the object."""

    def apply(layer):
        old = getattr(layer, name)
        new = change(old.detach())
        setattr(layer, name, torch.nn.Parameter(new) if isinstance(old, torch.nn.Parameter) else new)

    return apply


def state_loaded(layer):
    layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()})


def moved_away_and_back(layer):
    dtype = layer.weight.dtype
    layer.half().to(dtype)


def frozen(layer):
    layer.weight.requires_grad_(False)


def without_bias(layer):
    layer.bias = None


def without_statistics(layer):
    layer.track_running_stats = False


NAMES = ("weight", "bias", "running_mean", "running_var")
CHANGES = {
    **{f"{name}: other values": with_object(name, lambda v: v * 2 + 0.5) for name in NAMES},
    **{f"{name}: other memory": with_data(name, lambda v: v * 2 + 0.5) for name in NAMES},
    **{f"{name}: gaps": with_data(name, spread_out) for name in NAMES},
    **{f"{name}: gaps, other object": with_object(name, spread_out) for name in NAMES},
    **{f"{name}: expanded": with_data(name, lambda v: v[:1].clone().expand(v.shape)) for name in ("weight", "bias")},
    **{f"{name}: negative": with_object(name, lambda v: torch._neg_view(v.clone())) for name in ("weight", "bias")},
    **{f"{name}: subclass": with_object(name, lambda v: v.as_subclass(Subclass)) for name in ("running_mean", "running_var")},
    "state loaded": state_loaded,
    "moved": moved_away_and_back,
    "frozen": frozen,
    "without bias": without_bias,
    "without statistics": without_statistics,
}


def plain(tensor):
    return None if tensor is None else tensor.detach().as_subclass(torch.Tensor).clone()


def train_a_step(layer, x, dy):
    own = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = layer(own)
    y.backward(dy)
    parameters = [p for p in (layer.weight, layer.bias) if p is not None]
    statistics = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    return [plain(y), plain(own.grad), *(plain(p.grad) for p in parameters), *map(plain, statistics)]


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_changes_between_steps_are_noticed(group, change, layout):
    x, dy = batch(), batch().flip(0)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)

    def steps(layer, rows):
        found = [train_a_step(layer, x[rows], dy[rows])]
        CHANGES[change](layer)
        return found + [train_a_step(layer, x[rows], dy[rows]) for _ in range(2)]

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        return steps(layer, slice(0, 2) if worker.rank == 0 else slice(2, None))

    whole = steps(torch.nn.BatchNorm2d(CHANNELS, dtype=torch.float64), slice(None))
    for step, (first, second) in zip(whole, zip(*group(2, run))):
        for i, wanted in enumerate(step):
            parts = (first[i], second[i])
            if wanted is None:
                assert parts == (None, None)
            elif i < 2:  # y and dx.
                torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-10, atol=1e-10, check_stride=False)
            elif i < len(step) - 3:  # The gradients of parameters.
                torch.testing.assert_close(parts[0] + parts[1], wanted, rtol=1e-10, atol=1e-10)
            else:
                for part in parts:
                    torch.testing.assert_close(part, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_another_type_between_steps_is_noticed(group, dtype):
    """A layer that becomes one of another type gives the bits of a layer that has been so from the beginning."""

    def run(worker):
        x, dy = batch(dtype), batch(dtype).flip(0)
        changed = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="changed", dtype=torch.float64, momentum=None)
        train_a_step(changed, batch(), batch())
        changed.to(dtype)
        changed.reset_running_stats()
        fresh = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="fresh", dtype=dtype, momentum=None)
        return [(train_a_step(changed, x, dy), train_a_step(fresh, x, dy)) for _ in range(2)]

    for mine, wanted in group(1, run)[0]:
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted))


def test_fewer_channels_at_the_same_address_are_refused(group):
    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker, layer="bn", dtype=torch.float64)
        layer(batch())
        layer.bias.data = layer.bias.data[:-1]
        with pytest.raises(RuntimeError, match="bias has 2 elements, and the layer 3 channels"):
            layer(batch())
        assert int(layer.num_batches_tracked) == 1

    group(1, run)
