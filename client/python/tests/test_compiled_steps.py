"""torch.compile of a whole training step, its backward pass and its optimizer included: the compiler leaves rounds alone."""

import warnings

import pytest

torch = pytest.importorskip("torch")

import syncbn.torch as sync

pytestmark = pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch has no compiler")

CHANNELS = 4


class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(CHANNELS)

    def forward(self, x):
        if isinstance(self.norm, sync.SyncBatchNorm):
            return self.norm(x, torch.ones(len(x), 1))
        return self.norm(x)


class Moments(torch.nn.Module):
    """Normalizes by moments alone; torch's own where there is no worker."""

    worker = None

    def forward(self, x):
        if self.worker is None:
            mean, var = x.mean(0, keepdim=True), x.var(0, keepdim=True, unbiased=False)
        else:
            mean, var = sync.moments(x, (0,), layer="moments", keepdim=True, worker=self.worker)
        return (x - mean) * torch.rsqrt(var + 1e-5)


KINDS = {
    "layer": lambda: torch.nn.BatchNorm1d(CHANNELS),
    "masked": Masked,
    "moments": Moments,
}


def trained(kind, worker=None):
    """Returns the parameters and buffers after three steps, and the warnings."""
    torch.manual_seed(77)
    model = torch.nn.Sequential(torch.nn.Linear(3, CHANNELS), KINDS[kind](), torch.nn.Tanh()).double()
    if worker is not None:
        sync.convert_sync_batchnorm(model, worker)
        model[1].worker = worker
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(x):
        optimizer.zero_grad()
        model(x).pow(3).mean().backward()
        optimizer.step()

    run = step if worker is None else torch.compile(step, backend="aot_eager")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for seed in range(3):
            run(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).double())
    return model.state_dict(), [str(warning.message) for warning in told]


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_trains_as_one_that_is_not(group, kind):
    torch._dynamo.reset()
    expected, _ = trained(kind)
    [(found, told)] = group(1, lambda worker: trained(kind, worker), timeout=300.0)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)
    assert [text for text in told if "Dynamo" in text] == []
