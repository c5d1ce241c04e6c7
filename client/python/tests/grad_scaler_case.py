"""A float16 model under DistributedDataParallel and a gradient scaler, beside torch's own layer on the whole batch.

Run by torch.distributed.run with a folder: every rank writes {rank}.json there. The scale begins so high that the first
steps overflow.
"""

import copy
import json
import pathlib
import sys
from typing import Any, List

import torch

import syncbn.torch as sync

SEED = 7
STEPS = 12
SCALE = 2.0**28


class HalfBatchNorm2d(torch.nn.BatchNorm2d):
    """torch's layer on float16 values, for versions that do not have it on a CPU: in float32, rounded to float16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).half()


class Model(torch.nn.Module):
    """A model with float16 in and around the batch normalization, as under autocast on a GPU."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 4, 3, bias=False)
        self.norm = norm
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).half()
        x = torch.relu(self.norm(x).float()) * 4.0
        return self.head(x.mean((2, 3)))


class Scaler:
    """Follows the rules of torch.amp.GradScaler, for versions that have it only on a GPU."""

    def __init__(self, device: str, init_scale: float, growth_interval: int) -> None:
        self._scale, self._interval, self._good, self._finite = init_scale, growth_interval, 0, True

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self._scale

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for gradient in gradients:
            gradient.div_(self._scale)
        self._finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        if self._finite:
            optimizer.step()

    def update(self) -> None:
        self._good = self._good + 1 if self._finite else 0
        if not self._finite:
            self._scale *= 0.5
        elif self._good == self._interval:
            self._scale, self._good = self._scale * 2.0, 0

    def get_scale(self) -> float:
        return self._scale


def make_scaler(scale: float) -> Any:
    kind = getattr(getattr(torch, "amp", None), "GradScaler", None) or Scaler
    return kind("cpu", init_scale=scale, growth_interval=4)


def train(model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor, scale: float, divisor: float) -> List[float]:
    """The scale before each step."""
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), make_scaler(scale)
    scales = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        loss = torch.nn.functional.cross_entropy(model(x), labels, reduction="sum") / divisor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return scales


def main() -> None:
    torch.distributed.init_process_group("gloo")
    with sync.join() as worker:
        world = worker.world_size
        generator = torch.Generator().manual_seed(SEED)
        sizes = [3, 5][:world]
        x = torch.randn((sum(sizes), 2, 6, 6), generator=generator) * 2 + 1
        labels = torch.arange(sum(sizes)) % 3
        torch.manual_seed(SEED)
        model = Model(torch.nn.BatchNorm2d(4))
        whole = Model(HalfBatchNorm2d(4))
        whole.load_state_dict(model.state_dict())
        model = sync.convert_sync_batchnorm(model, worker)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        before = copy.deepcopy(model.state_dict())
        # The mean over the workers' gradients is the whole batch's where each loss is times the number of workers; the
        # scale is less by as much, so that the same values overflow.
        own = [v.split(sizes)[worker.rank] for v in (x, labels)]
        mine = train(parallel, *own, SCALE / world, sum(sizes) / world)
        expected = train(whole, x, labels, SCALE, sum(sizes))
        state, wanted = model.state_dict(), whole.state_dict()
        difference = max(float((state[n].double() - wanted[n].double()).abs().max()) for n in wanted)
        moved = max(float((state[n].double() - before[n].double()).abs().max()) for n in ("conv.weight", "head.weight"))
        result = {
            "scales": [scale * world for scale in mine],
            "expected": expected,
            "difference": difference,
            "moved": moved,
            "finite": all(bool(v.isfinite().all()) for v in state.values()),
        }
        (pathlib.Path(sys.argv[1]) / f"{worker.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
