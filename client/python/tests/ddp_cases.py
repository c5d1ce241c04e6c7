"""The cases that torch's distributed tests have for torch.nn.SyncBatchNorm, under DistributedDataParallel over gloo.

To be run by torch.distributed.run: `ddp_cases.py FOLDER`. Each rank writes FOLDER/RANK.json: for each case null, or
what went wrong. test_ddp_cases.py runs it.
"""

import contextlib
import copy
import json
import pathlib
import sys
import traceback
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.distributed as dist
import torch.utils.checkpoint

import syncbn
import syncbn.torch as sync

SEED = 611
RANK = WORLD = 0  # Set by main.
Case = Callable[[syncbn.Worker], None]
CASES: Dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


class Net(torch.nn.Module):
    """The network of torch's cases: [N, 2] -> [N, 4], a batch normalization of 4 channels and 10 positions in it."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(2, 40, bias=False)
        self.bn = torch.nn.BatchNorm1d(4, affine=affine)
        self.fc2 = torch.nn.Linear(40, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.fc1(x).reshape(-1, 4, 10))
        return torch.softmax(self.fc2(x.reshape(-1, 40)), 1)


def normal(*size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Returns the same batch at every rank and call."""
    return torch.randn(size, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64).to(dtype)


def seeded(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(SEED)
    return make()


def train_beside_whole(
    worker: syncbn.Worker,
    model: torch.nn.Module,
    x: torch.Tensor,
    sizes: List[int],
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-10,
    process_group: Any = None,
    member: Optional[int] = None,
) -> torch.nn.Module:
    """Runs three steps of DDP on the rank's part, and of one float64 process on all; both must give the same result.

    `member`: the place in the process group, whose batches `sizes` are. Returns the trained model.
    """
    member = RANK if member is None else member
    whole = copy.deepcopy(model).double()
    mine = sync.convert_sync_batchnorm(model, worker)
    parallel = torch.nn.parallel.DistributedDataParallel(mine, process_group=process_group, broadcast_buffers=False)
    memory = torch.preserve_format
    part = x.split(sizes)[member].to(dtype)
    if x.dim() > 3:  # Keep the channels where they are after the split.
        memory = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        part = part.contiguous(memory_format=memory)
    target = 0.5
    runs = ((parallel, part, len(sizes) / sum(sizes)), (whole, x.to(dtype).double(), 1 / sum(sizes)))
    for trained, batch, scale in runs:
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.5) if list(trained.parameters()) else None
        for _ in range(3):
            y = trained(batch)
            if x.dim() > 3 and trained is parallel and y.numel():
                assert y.is_contiguous(memory_format=memory), "the layout was lost"
            if optimizer is not None:
                optimizer.zero_grad()
                ((y - target).double().square().sum() * scale).backward()
                optimizer.step()
    bounds = {"rtol": tolerance, "atol": tolerance}
    for name, wanted in whole.state_dict().items():
        actual = mine.state_dict()[name].double()
        torch.testing.assert_close(actual, wanted.double(), **bounds, msg=lambda text: f"{name}: {text}")
    return mine


@case
def basic(worker: syncbn.Worker) -> None:
    train_beside_whole(worker, seeded(Net).double(), normal(4 * WORLD, 2), [4] * WORLD)


@case
def no_affine(worker: syncbn.Worker) -> None:
    train_beside_whole(worker, seeded(lambda: Net(affine=False)).double(), normal(4 * WORLD, 2), [4] * WORLD)


@case
def two_dimensional_input(worker: syncbn.Worker) -> None:
    model = seeded(lambda: torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.BatchNorm1d(5))).double()
    train_beside_whole(worker, model, normal(3 * WORLD, 2), [3] * WORLD)


@case
def single_input_for_each_process(worker: syncbn.Worker) -> None:
    model = seeded(lambda: torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.BatchNorm1d(5))).double()
    train_beside_whole(worker, model, normal(WORLD, 2), [1] * WORLD)


@case
def channels_last_4d(worker: syncbn.Worker) -> None:
    train_beside_whole(worker, torch.nn.BatchNorm2d(3).double(), normal(2 * WORLD, 3, 4, 5), [2] * WORLD)


@case
def channels_last_5d(worker: syncbn.Worker) -> None:
    train_beside_whole(worker, torch.nn.BatchNorm3d(3).double(), normal(2 * WORLD, 3, 2, 3, 4), [2] * WORLD)


@case
def half(worker: syncbn.Worker) -> None:
    """Inputs are float16, parameters float32."""
    train_beside_whole(worker, torch.nn.BatchNorm1d(3), normal(4 * WORLD, 3, 5), [4] * WORLD, torch.float16, 5e-3)


@case
def half_module(worker: syncbn.Worker) -> None:
    """Parameters are float16, too."""
    model = torch.nn.BatchNorm1d(3).half()
    train_beside_whole(worker, model, normal(4 * WORLD, 3), [4] * WORLD, torch.float16, 5e-3)


@case
def gradient_accumulation(worker: syncbn.Worker) -> None:
    """Two batches, the first under no_sync: DDP reduces once, and each batch still has its rounds."""
    whole = seeded(Net).double()
    mine = torch.nn.parallel.DistributedDataParallel(sync.convert_sync_batchnorm(copy.deepcopy(whole), worker))
    for step in range(2):
        x = normal(3 * WORLD, 2) * (step + 1)
        whole(x).square().sum().backward()
        with mine.no_sync() if step == 0 else contextlib.nullcontext():
            (mine(x.chunk(WORLD)[RANK]).square().sum() * WORLD).backward()
    for (name, parameter), wanted in zip(mine.module.named_parameters(), whole.parameters()):
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-9, atol=1e-11, msg=lambda m: f"{name}: {m}")


@case
def shared_layer(worker: syncbn.Worker) -> None:
    """One layer at two places of the model."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
    train_beside_whole(
        worker, seeded(lambda: model.append(model[1])).double(), normal(3 * WORLD, 2), [3] * WORLD
    )


class Checkpointed(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The first input needs a gradient; without it, the reentrant kind computes none.
        return torch.utils.checkpoint.checkpoint(self.model, x.requires_grad_(), use_reentrant=self.reentrant)


def compiled(worker: syncbn.Worker, reentrant: Optional[bool]) -> None:
    """torch.compile around and within DDP, maybe with a checkpointed segment; the backend needs no C++ compiler."""
    sizes = [2 + rank for rank in range(WORLD)]
    x = normal(sum(sizes), 2)
    for outside in (True, False):
        torch._dynamo.reset()
        whole = seeded(Net).double()
        mine = sync.convert_sync_batchnorm(copy.deepcopy(whole), worker, prefix=f"{outside} ")
        model: Any = mine if reentrant is None else Checkpointed(mine, reentrant)
        parallel = torch.nn.parallel.DistributedDataParallel
        run = (
            torch.compile(parallel(model), backend="aot_eager")
            if outside
            else parallel(torch.compile(model, backend="aot_eager"))
        )
        for trained, batch, scale in ((run, x.split(sizes)[RANK].clone(), WORLD / len(x)), (whole, x, 1 / len(x))):
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
            for _ in range(3):
                optimizer.zero_grad()
                (trained(batch).square().sum() * scale).backward()
                optimizer.step()
        for name, wanted in whole.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[name], wanted, rtol=1e-10, atol=1e-10, msg=name)


if hasattr(torch, "compile"):
    CASES["compiled"] = lambda worker: compiled(worker, None)
    CASES["compiled and checkpointed"] = lambda worker: compiled(worker, False)
    CASES["compiled and checkpointed, reentrant"] = lambda worker: compiled(worker, True)


@case
def inference(worker: syncbn.Worker) -> None:
    """Evaluation is local to one rank, also without running statistics."""
    layer = sync.SyncBatchNorm(2, track_running_stats=False, worker=worker, layer="inference")
    parallel, x = torch.nn.parallel.DistributedDataParallel(layer), normal(5, 2, 4, 4, dtype=torch.float32)
    if RANK == 0:
        parallel.eval()
        for _ in range(3):
            torch.testing.assert_close(parallel(x), torch.nn.BatchNorm2d(2, track_running_stats=False).eval()(x))
    dist.barrier()


@case
def uneven_inputs_stop(worker: syncbn.Worker) -> None:
    """DDP's join: where rank 0 runs out of batches first, all stop with an error, and none hangs in a round."""
    model = sync.convert_sync_batchnorm(seeded(Net).double(), worker)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    steps = 0
    try:
        with parallel.join(throw_on_early_termination=True):
            for _ in range(2 if RANK == 0 else 4):
                parallel(normal(3, 2)).sum().backward()
                steps += 1
    except RuntimeError as error:
        assert "exhausted" in str(error), error
        assert steps == 2
    else:
        raise AssertionError("the join ended without an error")


@case
def different_input_sizes_gradient(worker: syncbn.Worker) -> None:
    """Gradients of the parameters, one backward pass, batches of 1, 2, 3 ... times 2."""
    sizes = [2 * (rank + 1) for rank in range(WORLD)]
    x, whole = normal(sum(sizes), 2), seeded(Net).double()
    mine = torch.nn.parallel.DistributedDataParallel(sync.convert_sync_batchnorm(copy.deepcopy(whole), worker))
    whole(x).square().sum().backward()
    (mine(x.split(sizes)[RANK]).square().sum() * WORLD).backward()
    for (name, parameter), wanted in zip(mine.module.named_parameters(), whole.parameters()):
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-9, atol=1e-11, msg=lambda m: f"{name}: {m}")


@case
def different_input_sizes_running_value(worker: syncbn.Worker) -> None:
    """Momentum 0.5, as in torch's case; the running mean and variance are those of all values, not of all workers."""
    sizes = [rank + 1 for rank in range(WORLD)]
    whole = torch.nn.BatchNorm1d(4, momentum=0.5).double()
    layer = sync.convert_sync_batchnorm(copy.deepcopy(whole), worker)
    x = normal(sum(sizes), 4, 6)
    for step in range(3):
        batch = x * (step + 1) + step
        whole(batch)
        layer(batch.split(sizes)[RANK])
    torch.testing.assert_close(layer.running_mean, whole.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var, whole.running_var, rtol=1e-12, atol=1e-12)


@case
def process_group(worker: syncbn.Worker) -> None:
    """Sub-groups: ranks of one parity synchronize with one another only, layers nested in modules too."""
    ranks = [rank for rank in range(WORLD) if rank % 2 == RANK % 2]
    groups = [dist.new_group([rank for rank in range(WORLD) if rank % 2 == parity]) for parity in (0, 1)]
    name = f"parity {RANK % 2}"
    with syncbn.Worker(worker.target, name, ranks.index(RANK), len(ranks)) as sub_worker:
        nested = sync.convert_sync_batchnorm(
            torch.nn.Sequential(torch.nn.Sequential(Net(), torch.nn.BatchNorm1d(4))), sub_worker
        )
        assert nested[0][0].bn.worker is sub_worker and nested[0][1].worker is sub_worker
        sizes = [1 + 2 * place for place in range(len(ranks))]
        x = normal(sum(sizes), 2) + RANK % 2
        train_beside_whole(
            sub_worker,
            seeded(Net).double(),
            x,
            sizes,
            process_group=groups[RANK % 2],
            member=ranks.index(RANK),
        )


@case
def empty_input(worker: syncbn.Worker) -> None:
    """The last rank has no input."""
    train_beside_whole(worker, seeded(Net).double(), normal(3 * (WORLD - 1), 2), [3] * (WORLD - 1) + [0])


@case
def only_empty_input(worker: syncbn.Worker) -> None:
    layer = torch.nn.parallel.DistributedDataParallel(sync.SyncBatchNorm(2, worker=worker, layer="only empty"))
    x = torch.empty(0, 2, 1, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 2, 1)
    assert layer.module.weight.grad.tolist() == layer.module.bias.grad.tolist() == [0.0, 0.0]
    assert layer.module.running_mean.tolist() == [0.0, 0.0] and layer.module.running_var.tolist() == [1.0, 1.0]


@case
def convert(worker: syncbn.Worker) -> None:
    """Types, devices, parameters and training mode survive; state goes back into torch's own class."""
    before = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm3d(3, affine=False), Net()).half().eval()
    state = {name: value.clone() for name, value in before.state_dict().items()}
    after = sync.convert_sync_batchnorm(copy.deepcopy(before), worker)
    layers = [module for module in after.modules() if isinstance(module, sync.SyncBatchNorm)]
    assert len(layers) == 3 and not any(layer.training for layer in layers)
    for name, value in after.state_dict().items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name])
    before.load_state_dict(after.state_dict())


def main() -> None:
    global RANK, WORLD
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    RANK, WORLD = dist.get_rank(), dist.get_world_size()
    outcomes: Dict[str, Optional[str]] = {}
    with sync.join(timeout=20.0) as worker:
        for name, function in CASES.items():
            # Each in a group of its own, so that a failed case leaves the next ones alone.
            try:
                with syncbn.Worker(worker.target, name, RANK, WORLD, timeout=20.0) as own:
                    function(own)
                outcomes[name] = None
            except Exception:
                outcomes[name] = traceback.format_exc()
    (pathlib.Path(sys.argv[1]) / f"{RANK}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
