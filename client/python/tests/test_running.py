"""Running statistics get the same bits whether the library updates them or Python does, and count what they have taken."""

import types

import pytest

torch = pytest.importorskip("torch")

import syncbn.torch as sync
from syncbn import _calls, _library, _passes
from syncbn.torch import _running, _tensors

SEED = 8282
CHANNELS = 16


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_bits_of_the_library(group, dtype, biased):
    generator = torch.Generator().manual_seed(SEED)
    print("seed", SEED)

    def run(worker):
        worker.declare_layer("bn", CHANNELS, eps=1e-5, biased_running_variance=biased)
        layer = sync.SyncBatchNorm(CHANNELS, momentum=0.1, dtype=dtype)
        layer.biased_running_variance = biased
        mean, var = layer.running_mean.clone(), layer.running_var.clone()
        for _ in range(40):
            x = torch.randn(7, CHANNELS, generator=generator, dtype=torch.float64) * 3
            y = torch.empty_like(x)
            role = _library.BACKWARD_NONE
            packed = bytes(_tensors.describe(x, False))
            passed = _passes.ForwardPass(worker, "bn", packed, role=role, eps=1e-5, clamp=False)
            passed.wait()
            outputs = _library.ForwardOutputs(
                running_mean=_tensors.vector(mean, x),
                running_var=_tensors.vector(var, x),
                momentum=0.1,
                y=_tensors.describe(y, False),
            )
            passed.finish(packed, bytes(outputs))
            _running.update(layer, passed.count, passed.mean(CHANNELS), passed.var(CHANNELS))
            assert layer.running_mean.dtype == layer.running_var.dtype == dtype
            assert torch.equal(layer.running_mean, mean)
            assert torch.equal(layer.running_var, var)

    group(1, run)


@pytest.mark.parametrize("functions", [_calls.by_library(), _calls.ByCtypes], ids=["by the library", "by ctypes"])
@pytest.mark.parametrize("slice_ns", [_passes.SLICE_NS, 0], ids=["within a slice", "in several slices"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_ctrl_c_leaves_a_batch_that_is_counted_if_it_is_taken(group, monkeypatch, functions, slice_ns, moment):
    """The interpreter looks at signals before and after the call that ends a pass."""

    def interrupted(*arguments):
        if moment == "after" and functions.forward_end(*arguments) == _library.PENDING:
            return _library.PENDING
        raise KeyboardInterrupt

    stand_in = {known: getattr(functions, known) for known in vars(_calls.ByCtypes) if not known.startswith("_")}
    calls = types.SimpleNamespace(**{**stand_in, "forward_end": interrupted})

    def run(worker):
        monkeypatch.setattr(_passes, "SLICE_NS", slice_ns)
        monkeypatch.setattr(_passes, "calls", calls)
        layer = sync.SyncBatchNorm(CHANNELS, momentum=None, worker=worker, layer="bn")
        fresh = {key: value.clone() for key, value in layer.state_dict().items()}
        with pytest.raises(KeyboardInterrupt):
            layer(torch.randn(7, CHANNELS) + 5)
        assert worker._users == []
        monkeypatch.undo()
        taken = not torch.equal(layer.running_mean, fresh["running_mean"])
        assert taken == (moment == "after")
        assert int(layer.num_batches_tracked) == taken

    group(1, run)
