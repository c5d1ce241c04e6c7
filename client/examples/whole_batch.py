"""Common part of the gallery's examples: a task with uneven batches, and its training by one process on the whole batch.

An example trains `make_model()` in its framework, each worker on its part of every batch, and ends with `compare`.
"""

import sys
from typing import List, Tuple

import torch

STEPS, CLASSES, LEARNING_RATE = 5, 4, 0.1
# The largest relative difference that rounding in float64 may amount to after these few steps. It is 1e-3 and more where
# workers normalize over their own batches, or average gradients as if those were of one size.
BOUND = 1e-9

Batch = Tuple[torch.Tensor, torch.Tensor]


def sizes(world_size: int) -> List[int]:
    """The workers' parts of each batch: 2, 5, 8 and so on."""
    return [2 + 3 * rank for rank in range(world_size)]


def make_model() -> torch.nn.Module:
    torch.manual_seed(1)  # The same start for all.
    layers = [torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)]
    layers += [torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(8, CLASSES)).double()


def whole_batches(world_size: int) -> List[Batch]:
    generator = torch.Generator().manual_seed(2)
    count = sum(sizes(world_size))
    return [
        (
            torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (count,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def batches(rank: int, world_size: int) -> List[Batch]:
    """This worker's parts: images [n, 3, 8, 8] and labels [n]."""
    own = sizes(world_size)
    return [(x.split(own)[rank], y.split(own)[rank]) for x, y in whole_batches(world_size)]


def train_whole(world_size: int) -> torch.nn.Module:
    """Trains a new model on the whole batches, by torch alone; the loss is the mean over each batch. Returns: the model."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for x, y in whole_batches(world_size):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def relative_difference(actual: torch.nn.Module, expected: torch.nn.Module) -> float:
    """The largest difference of a parameter's or buffer's elements, relative to its largest element (at least 1)."""
    pairs = list(zip(actual.state_dict().values(), expected.state_dict().values()))
    assert len(pairs) == len(actual.state_dict()) == len(expected.state_dict())
    return max(float((own - whole).abs().max()) / max(1.0, float(whole.abs().max())) for own, whole in pairs)


def report(model: torch.nn.Module, whole: torch.nn.Module, world_size: int, title: str, steps: int = STEPS) -> None:
    """Prints how far a model is from the one that was trained on the whole batches. Ends the program if that is too far."""
    difference = relative_difference(model, whole)
    print(
        f"{title}: {world_size} workers on batches of {sizes(world_size)} are {difference:.1e} from one process on the whole "
        f"batch after {steps} steps (bound {BOUND:.0e})",
        flush=True,
    )
    if not difference <= BOUND:
        sys.exit(1)


def compare(model: torch.nn.Module, world_size: int, title: str) -> None:
    """As `report`, for what began as `make_model()`."""
    report(model, train_whole(world_size), world_size, title)
