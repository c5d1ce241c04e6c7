"""float16 with a gradient scaler: gradients that overflow come out as torch's layer gives them, the step is skipped, and
training goes on."""

import json
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import syncbn.torch as sync
from syncbn.torch import compat

from test_distributed import torchrun

SEED = 19
CASE = pathlib.Path(__file__).resolve().parent / "grad_scaler_case.py"
INF, NAN = float("inf"), float("nan")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_overflowing_steps_are_skipped_and_training_goes_on(tmp_path):
    output, code = torchrun(2, CASE, tmp_path)
    assert code == 0, output
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        skipped = sum(later < earlier for earlier, later in zip(result["scales"], result["scales"][1:]))
        assert result["scales"] == result["expected"]
        assert 2 <= skipped < len(result["scales"]) - 4, "no step overflowed, or all did"
        assert result["finite"] and result["moved"] > 0.01 and result["difference"] < 2e-3, result


def kinds(tensor):
    """0: a number; 1: infinite or not a number."""
    return (~tensor.detach().isfinite()).int().tolist()


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("replicas", [0, 2])
def test_gradients_that_are_not_finite(group, value, dtype, replicas):
    generator = torch.Generator().manual_seed(SEED)
    x, dy = (torch.randn((5, 3, 2, 2), generator=generator) for _ in range(2))
    dy[4, 1, 0, 1] = value
    whole, whole_x = torch.nn.BatchNorm2d(3), x.clone().requires_grad_()
    whole(whole_x).backward(dy)

    def run(worker):
        layer = sync.SyncBatchNorm(3, worker=worker, layer="bn")
        runner = compat.DataParallelWithCallback(layer, replicas=replicas) if replicas else layer
        part = x.split([2, 3])[worker.rank].clone().to(dtype).requires_grad_()
        y = runner(part)
        finite = [None]
        for _ in range(2):  # The second pass travels as a sum.
            part.grad = layer.weight.grad = layer.bias.grad = None
            y.backward(dy.split([2, 3])[worker.rank].to(dtype), retain_graph=True)
            finite.append((kinds(part.grad), kinds(layer.weight.grad), kinds(layer.bias.grad)))
        assert finite[1] == finite[2]
        runner(part).sum().backward()  # The layer goes on.
        return finite[1], part.grad.isfinite().all()

    results = group(2, run)
    assert results[0][0][0] + results[1][0][0] == kinds(whole_x.grad)
    assert results[1][0][1] == kinds(whole.weight.grad) and results[1][0][2] == kinds(whole.bias.grad)
    assert results[0][0][1] == results[0][0][2] == [0, 0, 0]  # Parameters' gradients are each worker's own.


def test_reduced_gradients_that_are_not_finite(group):
    def run(worker):
        model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(1).half())])
        model[0].grad = torch.tensor([[INF, NAN, 1.0, INF], [1.0, 1.0, 1.0, -INF]][worker.rank])
        model[1].grad = torch.tensor([60000.0]).half()
        sync.all_reduce_gradients(model, worker)
        first = [p.grad.tolist() for p in model]
        for p in model:
            p.grad = torch.ones_like(p)
        sync.all_reduce_gradients(model, worker)
        return first, [p.grad.tolist() for p in model]

    for first, second in group(2, run):
        np.testing.assert_array_equal(first[0], [INF, NAN, 1.0, NAN])
        assert first[1] == [60000.0] and second == [[1.0] * 4, [1.0]]
