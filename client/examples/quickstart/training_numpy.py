"""As training.py, in NumPy alone: two linear layers, each with a batch normalization, and a linear layer at the end."""

import argparse
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

import syncbn
import syncbn.numpy
from task import GLOBAL_BATCH, LEARNING_RATE, MOMENTUM, SIZES, Record, run

import digits  # After `task`, which says where it is.

WIDTH, EPS, KEPT = 32, 1e-5, 0.9

Parameters = Dict[str, np.ndarray]
# (x, weight, bias, index of the layer) to y, and the function that goes back: dy to the gradients of x, weight and bias.
Norm = Callable[[np.ndarray, np.ndarray, np.ndarray, int], Tuple[np.ndarray, Callable[[np.ndarray], Tuple[Any, ...]]]]


def make_parameters(dtype: Any) -> Parameters:
    """The same initial values in every process."""
    generator = np.random.default_rng(7)
    parameters: Parameters = {}
    for name, rows, columns in (("w0", 64, WIDTH), ("w1", WIDTH, WIDTH), ("w2", WIDTH, 10)):
        parameters[name] = generator.normal(0.0, (2.0 / rows) ** 0.5, (rows, columns))
    for index in range(2):
        parameters[f"gamma{index}"], parameters[f"beta{index}"] = np.ones(WIDTH), np.zeros(WIDTH)
    parameters["b2"] = np.zeros(10)
    return {name: value.astype(dtype) for name, value in parameters.items()}


def longest_sums() -> int:
    """Counts the numbers that are added up, one sum into the next, forward, backward and over the batch."""
    forward = 64 + GLOBAL_BATCH + WIDTH + GLOBAL_BATCH + WIDTH
    return 2 * forward + GLOBAL_BATCH


def plain_norm(running: List[np.ndarray]) -> Norm:
    """Over this process's batch alone."""

    def norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, index: int) -> Any:
        mean, var = x.mean(0), x.var(0)
        invstd = 1 / np.sqrt(var + EPS)
        hat = (x - mean) * invstd
        unbiased = var * (len(x) / max(len(x) - 1, 1))
        for kept, new in zip(running[2 * index : 2 * index + 2], (mean, unbiased)):
            kept[...] = KEPT * kept + (1 - KEPT) * new

        def back(dy: np.ndarray) -> Tuple[Any, ...]:
            dx = weight * invstd * (dy - dy.mean(0) - hat * (dy * hat).mean(0))
            return dx, (dy * hat).sum(0), dy.sum(0)

        return hat * weight + bias, back

    return norm


def synchronized_norm(running: List[np.ndarray], worker: syncbn.Worker, prefix: str) -> Norm:
    """Over the batches of all workers."""

    def norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, index: int) -> Any:
        kept = dict(zip(("running_mean", "running_var"), running[2 * index : 2 * index + 2]))
        y, state = syncbn.numpy.forward(worker, f"{prefix}{index}", x, weight, bias, momentum=1 - KEPT, eps=EPS, **kept)
        return y, lambda dy: state.backward(dy)[:3]

    return norm


def step(p: Parameters, norm: Norm, images: np.ndarray, labels: np.ndarray) -> Tuple[np.ndarray, float, Parameters]:
    """The logits, the summed cross entropy, and its gradients."""
    hidden: List[np.ndarray] = [images]
    backs = []
    for index in range(2):
        y, back = norm(hidden[-1] @ p[f"w{index}"], p[f"gamma{index}"], p[f"beta{index}"], index)
        hidden.append(np.maximum(y, 0))
        backs.append(back)
    logits = hidden[2] @ p["w2"] + p["b2"]
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -float(np.log(probabilities[rows, labels]).sum())
    gradient = probabilities.copy()
    gradient[rows, labels] -= 1
    found = {"w2": hidden[2].T @ gradient, "b2": gradient.sum(0)}
    upper = gradient @ p["w2"].T
    for index in (1, 0):
        dx, found[f"gamma{index}"], found[f"beta{index}"] = backs[index](upper * (hidden[index + 1] > 0))
        found[f"w{index}"] = hidden[index].T @ dx
        upper = dx @ p[f"w{index}"].T
    return logits, loss, {name: found[name] for name in p}


def predict(p: Parameters, running: List[np.ndarray], images: np.ndarray) -> np.ndarray:
    hidden = images
    for index in range(2):
        mean, var = running[2 * index : 2 * index + 2]
        normalized = (hidden @ p[f"w{index}"] - mean) / np.sqrt(var + EPS)
        hidden = np.maximum(normalized * p[f"gamma{index}"] + p[f"beta{index}"], 0)
    return (hidden @ p["w2"] + p["b2"]).argmax(1)


def flat(values: Any) -> np.ndarray:
    return np.concatenate([np.asarray(value, np.float64).ravel() for value in values])


def train(
    dtype: Any, steps: int, worker: Optional[syncbn.Worker], prefix: Optional[str], data: digits.Digits
) -> Record:
    """Trains on the worker's rows (None: all) of each batch. `prefix`: of the synchronized layers' names; None: plain."""
    p = make_parameters(dtype)
    running = [np.zeros(WIDTH, dtype), np.ones(WIDTH, dtype), np.zeros(WIDTH, dtype), np.ones(WIDTH, dtype)]
    norm = plain_norm(running) if worker is None or prefix is None else synchronized_norm(running, worker, prefix)
    begin, end = (0, GLOBAL_BATCH) if worker is None else (sum(SIZES[: worker.rank]), sum(SIZES[: worker.rank + 1]))
    velocity = {name: np.zeros_like(value) for name, value in p.items()}
    images, record = data.images.astype(dtype), {"losses": np.zeros(steps)}
    for number, batch in enumerate(digits.batches(len(images), GLOBAL_BATCH, steps)):
        rows = batch[begin:end]
        logits, record["losses"][number], gradients = step(p, norm, images[rows], data.labels[rows])
        summed = flat(gradients.values()) if worker is None else worker.all_reduce("gradients", flat(gradients.values()))
        parts = np.split(summed / GLOBAL_BATCH, np.cumsum([value.size for value in p.values()])[:-1])
        for (name, value), part in zip(p.items(), parts):
            velocity[name] = MOMENTUM * velocity[name] + part.reshape(value.shape).astype(dtype)
            p[name] = value - np.asarray(LEARNING_RATE, dtype) * velocity[name]
        seen = {
            "outputs": logits.astype(np.float64),
            "gradients": summed / GLOBAL_BATCH,
            "statistics": flat(running),
            "parameters": flat(p.values()),
        }
        for when, wanted in (("first", number == 0), ("last", number == steps - 1)):
            if wanted:
                record.update({f"{when}/{name}": value for name, value in seen.items()})
        print("step", flush=True)
    record["accuracy"] = float((predict(p, running, data.test_images.astype(dtype)) == data.test_labels).mean())
    return record


def run_whole(arguments: argparse.Namespace) -> Dict[str, Record]:
    data = digits.load()
    single = train(np.float32, 1, None, None, data)
    single["bound"] = 2.0**-24 * longest_sums()
    return {"main": train(np.dtype(arguments.dtype), arguments.steps, None, None, data), "float32": single}


def run_worker(worker: syncbn.Worker, arguments: argparse.Namespace) -> Dict[str, Record]:
    """With synchronization, in float32 for one step, and without."""
    data, dtype = digits.load(), np.dtype(arguments.dtype)
    return {
        "main": train(dtype, arguments.steps, worker, "bn", data),
        "float32": train(np.float32, 1, worker, "single.bn", data),
        "unsynchronized": train(dtype, arguments.steps, worker, None, data),
    }


if __name__ == "__main__":
    run(__doc__ or "", run_whole, run_worker)
