"""Running statistics get the same bits whether the library updates them or Python does."""

import pytest

torch = pytest.importorskip("torch")

import syncbn.torch as sync
from syncbn import _library, _passes
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
            passed = _passes.ForwardPass(worker, "bn", _tensors.describe(x, False), role=role, eps=1e-5, clamp=False)
            passed.wait()
            outputs = _library.ForwardOutputs(
                running_mean=_tensors.vector(mean, x),
                running_var=_tensors.vector(var, x),
                momentum=0.1,
                y=_tensors.describe(y, False),
            )
            passed.finish(_tensors.describe(x, False), outputs)
            _running.update(layer, passed.count, passed.mean(CHANNELS), passed.var(CHANNELS))
            assert layer.running_mean.dtype == layer.running_var.dtype == dtype
            assert torch.equal(layer.running_mean, mean)
            assert torch.equal(layer.running_var, var)

    group(1, run)
