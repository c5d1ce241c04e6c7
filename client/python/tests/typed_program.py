"""A program of a user, for the type checker alone (tools/lint): it has to see the package's types, with --strict."""

from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import numpy.typing as npt
import torch

import syncbn
import syncbn.functional
import syncbn.numpy
import syncbn.torch


def rounds(target: str) -> Tuple[float, int]:
    with syncbn.Worker(target, rank=0, world_size=1, timeout=60.0) as worker:
        merged: syncbn.Moments = worker.synchronize("layer", 2, np.zeros(3), np.ones(3))
        total: npt.NDArray[Any] = worker.all_reduce("loss", [1.0])
        stats: syncbn.Stats = worker.stats()
        waits: Dict[str, syncbn.LayerStats] = dict(stats.layers)
        return float(merged.mean.sum() + total[0]) + stats.seconds_waited, len(waits)


def arrays(worker: syncbn.Worker, x: npt.NDArray[Any]) -> Optional[npt.NDArray[Any]]:
    y, state = syncbn.numpy.forward(worker, "layer", x, relu=True)
    gradients: syncbn.numpy.Gradients = state.backward(np.ones_like(y))
    return gradients.d_weight


def model(worker: Optional[syncbn.Worker] = None) -> torch.nn.Module:
    layer = syncbn.torch.SyncBatchNorm(8, momentum=None, worker=worker, activation="relu")
    y: torch.Tensor = layer(torch.zeros(2, 8), z=torch.zeros(2, 8))
    mean, var = syncbn.torch.moments(y, 0, layer="moments", worker=worker, keepdim=True)
    return syncbn.torch.convert_sync_batchnorm(torch.nn.Sequential(layer, torch.nn.BatchNorm1d(int(mean.numel() + var.numel()))))


def failures() -> List[str]:
    try:
        with syncbn.Master(address="127.0.0.1:0") as master:
            return [master.target, syncbn.build_info()]
    except syncbn.RankTaken as error:
        return [error.reason, error.layer, *map(str, error.ranks)]
