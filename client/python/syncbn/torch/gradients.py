"""Averaging gradients through the statistics service, for models small enough to go that way."""

from typing import List, Optional

import numpy as np
import torch

from syncbn.core import Worker, default_worker


def all_reduce_gradients(
    model: torch.nn.Module, worker: Optional[Worker] = None, weight: float = 1.0, *, name: str = "gradients"
) -> float:
    """Replaces each gradient with sum(grad) / sum(weight), the sums over all workers.

    Either of these gives the gradient of the mean over the global batch:
      - losses *summed* over the local batch, and `weight` = its size, for batches of any sizes;
      - losses averaged over the local batch, and the default weight, for batches of one size.
    Averages over uneven batches, weighted here, would not: a synchronized layer adds up the workers' gradients in the
    middle of backward, and there each of them already needs its place in the one global loss.

    A parameter without gradient counts as zeros at that worker; without gradient at every worker it stays without. All
    gradients travel as one float64 vector, so the result is the same bits at every worker.

    Args:
      model: the same parameters in the same order at every worker.
      worker: default `syncbn.default_worker()`.
      weight: this worker's, not negative.
      name: the vector's at the master; tells several models of one worker apart.
    Returns:
      The sum of the weights.
    """
    worker = worker or default_worker()
    parameters: List[torch.nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
    vector = np.zeros(1 + len(parameters) + sum(p.numel() for p in parameters))
    vector[0] = weight
    offset = 1 + len(parameters)
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None:
            vector[1 + index] = 1.0
            gradient = parameter.grad.detach().to(device="cpu", dtype=torch.float64).reshape(-1).numpy()
            vector[offset : offset + gradient.size] = gradient
        offset += parameter.numel()
    total = worker.all_reduce(name, vector)
    if total[0] <= 0:
        raise ValueError("the workers' weights sum up to nothing")
    offset = 1 + len(parameters)
    for index, parameter in enumerate(parameters):
        if total[1 + index] > 0:
            mean = torch.from_numpy(total[offset : offset + parameter.numel()] / total[0]).reshape(parameter.shape)
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            with torch.no_grad():
                parameter.grad.copy_(mean)
        offset += parameter.numel()
    return float(total[0])
