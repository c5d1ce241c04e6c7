"""A worker in PyTorch; also the reference, with torch's own batch normalization on the whole batch."""

from typing import Any, Callable, Tuple

import numpy as np
import torch

import common

Layers = Tuple[torch.nn.Module, torch.nn.Module]


def gradient_through(layers: Layers) -> common.Gradient:
    """Returns a function: the gradient of the network with these layers, whose weight and bias come from the parameters."""

    def gradient(parameters: np.ndarray, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        p = common.unflatten(torch.from_numpy(parameters).clone())
        leaves = {name: p[name].clone().requires_grad_() for name in ("w1", "w2", "w3", "b3")}
        for index, layer in enumerate(layers, 1):
            layer.zero_grad()
            with torch.no_grad():
                layer.weight.copy_(p[f"gamma{index}"])
                layer.bias.copy_(p[f"beta{index}"])
        x = torch.relu(layers[0](torch.from_numpy(images) @ leaves["w1"].T))
        x = torch.relu(layers[1](x @ leaves["w2"].T))
        logits = x @ leaves["w3"].T + leaves["b3"]
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="sum").backward()
        gradients = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
        for index, layer in enumerate(layers, 1):
            gradients[f"gamma{index}"], gradients[f"beta{index}"] = layer.weight.grad.numpy(), layer.bias.grad.numpy()
        return common.flatten(gradients)

    return gradient


def statistics_of(layers: Layers) -> np.ndarray:
    return np.concatenate([v.numpy() for layer in layers for v in (layer.running_mean, layer.running_var)])


def make(worker: Any) -> Tuple[common.Gradient, Callable[[], np.ndarray]]:
    import syncbn.torch

    def layer(name: str) -> torch.nn.Module:
        return syncbn.torch.SyncBatchNorm(
            common.HIDDEN, common.EPS, common.MOMENTUM, dtype=torch.float64, worker=worker, layer=name
        )

    layers = layer("bn1"), layer("bn2")
    return gradient_through(layers), lambda: statistics_of(layers)


def reference(problem: common.Problem, learning_rate: float) -> np.ndarray:
    """Returns the final parameters and running statistics of one process on the whole of each batch."""
    layer = lambda: torch.nn.BatchNorm1d(common.HIDDEN, common.EPS, common.MOMENTUM, dtype=torch.float64)  # noqa: E731
    layers = layer(), layer()
    gradient, parameters = gradient_through(layers), problem.parameters.copy()
    for batch in problem.batches:
        total = gradient(parameters, problem.images[batch], problem.labels[batch])
        parameters -= learning_rate / problem.batches.shape[1] * total
    return np.concatenate([parameters, statistics_of(layers)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    common.work(make)
