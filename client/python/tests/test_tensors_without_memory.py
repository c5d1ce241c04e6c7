"""Tensors whose elements are nowhere: of a storage that has been freed, as FSDP frees that of parameters, or wrapped, as a
DTensor's. They are refused before a round, and are not taken for absent ones."""

import pytest

torch = pytest.importorskip("torch")

import syncbn.torch as sync

CHANNELS = 3


class Wrapping(torch.Tensor):
    """A tensor that holds another one, and has no memory itself."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, requires_grad=held.requires_grad)

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Wrapping({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrapped = [arg.held if isinstance(arg, cls) else arg for arg in args]
        result = function(*unwrapped, **(kwargs or {}))
        return cls(result) if isinstance(result, torch.Tensor) else result


def freed(tensor):
    tensor.storage().resize_(0)
    return tensor


KINDS = {"freed": freed, "wrapped": Wrapping}
NAMES = ("weight", "bias", "running_mean", "running_var", "the input", "z")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_refused_before_a_round(group, kind, name):
    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker)
        made = KINDS[kind](torch.full((CHANNELS,) if name in NAMES[:4] else (4, CHANNELS), 2.0))
        x = made if name == "the input" else torch.randn(4, CHANNELS)
        if name in ("weight", "bias"):
            made = torch.nn.Parameter(made, requires_grad=False)
        if name in NAMES[:4]:
            setattr(layer, name, made)
        with pytest.raises(RuntimeError, match="memory of their own") as caught:
            layer(x, z=made if name == "z" else None)
        assert isinstance(caught.value, TypeError)
        assert worker.stats().rounds == 0 and layer.num_batches_tracked == 0

    group(1, run)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_weight_that_is_freed_before_the_backward_pass(group):
    """Its gradient would be that of a layer without a weight."""

    def run(worker):
        layer = sync.SyncBatchNorm(CHANNELS, worker=worker)
        y = layer(torch.randn(4, CHANNELS, requires_grad=True))
        freed(layer.weight.data)
        with pytest.raises(RuntimeError, match="memory of their own"):
            y.sum().backward()

    group(1, run)
