"""The update of a module's running statistics where the library does not make it: replicas and masked batches."""

from typing import Any, Optional

import numpy as np
import torch

from syncbn import _passes
from syncbn.torch import _tensors


def reciprocal(batches: Optional[torch.Tensor]) -> float:
    """The weight of the newest of so many batches in their average; waits for a GPU that has not counted them yet."""
    return 0.0 if batches is None else 1.0 / float(batches)


def count_batch(layer: Any) -> float:
    """Counts a batch; returns the weight of the new values in the running statistics."""
    momentum: Optional[float] = layer._count_batch()
    return reciprocal(layer._tracked_batches()) if momentum is None else momentum


def update(layer: Any, count: int, mean: np.ndarray, var: np.ndarray) -> None:
    """Updates in float64 and rounds once, as the library does.

    Args:
      layer: a SyncBatchNorm, which may keep none, or one of the two; the batch is counted nevertheless.
      count: values in each channel, over all workers. 0: nothing changes.
      mean, var: the merged ones, var biased.
    """
    if not layer.track_running_stats or count == 0:
        return
    observed = _passes.observed_variance(count, var, layer.biased_running_variance)
    rate = count_batch(layer)
    with torch.no_grad():
        for running, new in ((layer.running_mean, mean), (layer.running_var, observed)):
            if running is not None and new is not None:
                wide = running.double() * (1 - rate) + torch.from_numpy(new).to(running.device) * rate
                running.copy_(_tensors.rounded(wide, running.dtype))
