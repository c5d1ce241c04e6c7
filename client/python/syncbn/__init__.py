"""Batch normalization over the global batch, by way of a statistics service.

    with syncbn.Worker(target="127.0.0.1:50051", rank=0, world_size=4) as worker:
        merged = worker.synchronize("stem.bn", count=x.shape[0], mean=x.mean(0), m2=((x - x.mean(0)) ** 2).sum(0))

`syncbn.torch`, `syncbn.jax` and `syncbn.numpy` hold the layers; none of them is imported here.
"""

from syncbn._library import lib as _lib
from syncbn.core import GradientSums, LayerStats, Master, Moments, Round, Stats, Worker, default_worker
from syncbn.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    Code,
    DeadlineExceeded,
    Deadlock,
    Error,
    FailedPrecondition,
    Fenced,
    InvalidArgument,
    LayerMismatch,
    NotFinite,
    PermissionDenied,
    RankTaken,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    WorkerLost,
)

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Cancelled",
    "Code",
    "DeadlineExceeded",
    "Deadlock",
    "Error",
    "FailedPrecondition",
    "Fenced",
    "GradientSums",
    "InvalidArgument",
    "LayerMismatch",
    "LayerStats",
    "Master",
    "Moments",
    "NotFinite",
    "PermissionDenied",
    "RankTaken",
    "ResourceExhausted",
    "Round",
    "Stats",
    "Unauthenticated",
    "Unavailable",
    "Worker",
    "WorkerLost",
    "__version__",
    "build_info",
    "default_worker",
]

__version__ = str(_lib.syncbn_version().decode())


def build_info() -> str:
    """Names what the library runs on: "cpu=AVX2 cuda=no"."""
    return str(_lib.syncbn_build_info().decode())
