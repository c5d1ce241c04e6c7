"""Averaging gradients through the statistics service, for models small enough to go that way."""

from typing import List, Optional

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from syncbn import _arguments
from syncbn.core import Worker, default_worker
from syncbn.torch import _tensors


_DENSE, _SPARSE = 0, 1


class _Parameter:
    """One parameter's part of the vector: how many workers have a dense gradient, how many a sparse one, their sum."""

    def __init__(self, path: str, parameter: torch.nn.Parameter) -> None:
        if is_lazy(parameter):
            raise ValueError(f"parameter {path!r} has no shape yet: run the model once before its gradients are reduced")
        self._path, self._parameter = path, parameter
        self.length = 2 + parameter.numel() * (2 if parameter.is_complex() else 1)

    def contribution(self) -> List[np.ndarray]:
        """The part's arrays."""
        gradient = self._parameter.grad
        kinds = np.zeros(2)
        if gradient is None:
            return [kinds, np.zeros(self.length - 2)]
        if gradient.layout not in (torch.strided, torch.sparse_coo):
            raise TypeError(f"the gradient of parameter {self._path!r} is {gradient.layout}: make it dense")
        if gradient.device.type == "meta":
            raise TypeError(f"the gradient of parameter {self._path!r} is a meta tensor, without values")
        kinds[_SPARSE if gradient.is_sparse else _DENSE] = 1.0
        values = gradient.detach()
        values = values.to_dense() if values.is_sparse else values.resolve_neg()
        values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
        return [kinds, values.to(device="cpu", dtype=torch.float64).reshape(-1).numpy()]

    def accept(self, total: np.ndarray, weight: float) -> None:
        """Takes the sum over all workers."""
        dense, sparse = total[_DENSE], total[_SPARSE]
        if dense + sparse == 0:
            return
        parameter = self._parameter
        with np.errstate(all="ignore"):
            mean = torch.from_numpy(total[2:] / weight)
        if parameter.is_complex():
            values = torch.view_as_complex(mean.reshape(*parameter.shape, 2)).to(parameter.dtype)
        else:
            values = _tensors.rounded(mean.reshape(parameter.shape), parameter.dtype)
        gradient = parameter.grad
        with torch.no_grad():
            if dense == 0:
                kept = 1 if gradient is None or not gradient.is_sparse else gradient.sparse_dim()
                parameter.grad = values.to_sparse(kept).to(parameter.device)
            elif gradient is None or gradient.is_sparse or _overlaps(gradient):
                parameter.grad = torch.empty_like(parameter).copy_(values)
            else:
                gradient.copy_(values)


def _overlaps(tensor: torch.Tensor) -> bool:
    """Returns True if elements share memory, as those of an expanded tensor do."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride()))


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
    gradients travel as one float64 vector, so the result is the same bits at every worker. A sparse gradient
    (torch.nn.Embedding(sparse=True)) travels as a dense one, and is sparse again where it is so at all workers that have
    one: with the rows that are not zero. Infinity and NaN arrive as they are, for a gradient scaler to find.

    Args:
      model: the same parameters in the same order at every worker.
      worker: default `syncbn.default_worker()`.
      weight: this worker's, not negative.
      name: the vector's at the master; tells several models of one worker apart.
    Returns:
      The sum of the weights.
    Raises:
      TypeError: for a gradient that is neither dense nor sparse in coordinates, naming the parameter; before the round.
      ValueError: for a weight that is negative, NaN or infinite; before the round. If the weights do not sum up to more
        than 0; at every worker.
    """
    weight = _arguments.not_negative("weight", weight)
    worker = worker or default_worker()
    named = [(path, p) for path, p in model.named_parameters() if p.requires_grad]
    parameters = [_Parameter(path, parameter) for path, parameter in named]
    # Sums are prepared before the round: what cannot be sent is refused while no other worker waits for it.
    parts = [np.array([weight])] + [part for parameter in parameters for part in parameter.contribution()]
    total = worker.all_reduce(name, np.concatenate(parts))
    if not total[0] > 0:
        raise ValueError(f"the workers' weights sum up to {total[0]:g}; their sum must be positive")
    offset = 1
    for parameter in parameters:
        parameter.accept(total[offset : offset + parameter.length], float(total[0]))
        offset += parameter.length
    return float(total[0])
