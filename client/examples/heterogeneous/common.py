"""Shared by the Python workers: the command line, the inputs, the loop. README.md has the rules."""

import argparse
import pathlib
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import numpy as np

HIDDEN = 32
SHAPES: List[Tuple[str, Tuple[int, ...]]] = [
    ("w1", (HIDDEN, 64)),
    ("gamma1", (HIDDEN,)),
    ("beta1", (HIDDEN,)),
    ("w2", (HIDDEN, HIDDEN)),
    ("gamma2", (HIDDEN,)),
    ("beta2", (HIDDEN,)),
    ("w3", (10, HIDDEN)),
    ("b3", (10,)),
]
LENGTH = sum(int(np.prod(shape)) for _, shape in SHAPES)
EPS = 1e-5
MOMENTUM = 0.1


def unflatten(flat: Any) -> Dict[str, Any]:
    """Views of a flat vector, by name; of NumPy, JAX or torch."""
    parts, offset = {}, 0
    for name, shape in SHAPES:
        size = int(np.prod(shape))
        parts[name] = flat[offset : offset + size].reshape(shape)
        offset += size
    return parts


def flatten(parts: Dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.asarray(parts[name], dtype=np.float64).reshape(-1) for name, _ in SHAPES])


class Problem(NamedTuple):
    images: np.ndarray
    labels: np.ndarray
    batches: np.ndarray
    parameters: np.ndarray

    def write(self, folder: pathlib.Path) -> None:
        for name, values in self._asdict().items():
            values.tofile(folder / name)


def read(folder: pathlib.Path, global_batch: int) -> Problem:
    return Problem(
        np.fromfile(folder / "images").reshape(-1, 64),
        np.fromfile(folder / "labels", dtype=np.int64),
        np.fromfile(folder / "batches", dtype=np.int64).reshape(-1, global_batch),
        np.fromfile(folder / "parameters"),
    )


def initial_parameters() -> np.ndarray:
    generator = np.random.default_rng(3)
    parts = {name: np.zeros(shape) for name, shape in SHAPES}
    for name in ("w1", "w2", "w3"):
        parts[name] = generator.normal(size=parts[name].shape) / np.sqrt(parts[name].shape[1])
    parts["gamma1"] += 1.0
    parts["gamma2"] += 1.0
    return flatten(parts)


# The flat gradient of the summed cross entropy, as a function of flat parameters, images and labels.
Gradient = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def work(make: Callable[[Any], Tuple[Gradient, Callable[[], np.ndarray]]]) -> None:
    """A worker's whole life. `make(worker)` gives the gradient function, and one for the running statistics, flat."""
    import syncbn

    parser = argparse.ArgumentParser()
    for name in ("--target", "--group", "--folder", "--output"):
        parser.add_argument(name, required=True)
    for name in ("--rank", "--world-size", "--begin", "--end", "--steps", "--global-batch"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    arguments = parser.parse_args()
    problem = read(pathlib.Path(arguments.folder), arguments.global_batch)
    parameters = problem.parameters.copy()
    with syncbn.Worker(arguments.target, arguments.group, arguments.rank, arguments.world_size, timeout=60.0) as worker:
        worker.wait_for_members(60.0)
        gradient, statistics = make(worker)
        for batch in problem.batches[: arguments.steps]:
            rows = batch[arguments.begin : arguments.end]
            total = worker.all_reduce("gradients", gradient(parameters, problem.images[rows], problem.labels[rows]))
            parameters -= arguments.learning_rate / arguments.global_batch * total
    np.concatenate([parameters, statistics()]).tofile(arguments.output)
