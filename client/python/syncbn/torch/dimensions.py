"""Classes of converted layers: each is a SyncBatchNorm and one of torch's BatchNorm classes as well.

Whatever looks for torch.nn.BatchNorm2d in a model, in order to freeze it, to fuse it or to give its parameters no weight
decay, finds it after a conversion too; and it is a SyncBatchNorm. torch.nn.SyncBatchNorm has no such class:
DistributedDataParallel refuses its instances on a CPU.
"""

from typing import Any

import torch

from syncbn.torch.modules import LazySyncBatchNorm, SyncBatchNorm


class _OfItsRank(SyncBatchNorm):
    """Takes the inputs that the class of torch takes."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        self.reverts_to._check_input_dim(self, input)
        super()._check_input_dim(input)


class SyncBatchNorm1d(_OfItsRank, torch.nn.BatchNorm1d):
    """A SyncBatchNorm and a torch.nn.BatchNorm1d, for [N, C] and [N, C, L]."""

    reverts_to: Any = torch.nn.BatchNorm1d


class SyncBatchNorm2d(_OfItsRank, torch.nn.BatchNorm2d):
    """A SyncBatchNorm and a torch.nn.BatchNorm2d, for [N, C, H, W]."""

    reverts_to: Any = torch.nn.BatchNorm2d


class SyncBatchNorm3d(_OfItsRank, torch.nn.BatchNorm3d):
    """A SyncBatchNorm and a torch.nn.BatchNorm3d, for [N, C, D, H, W]."""

    reverts_to: Any = torch.nn.BatchNorm3d


class LazySyncBatchNorm1d(_OfItsRank, LazySyncBatchNorm, torch.nn.LazyBatchNorm1d):
    """Becomes a SyncBatchNorm1d with its first input."""

    cls_to_become: Any = SyncBatchNorm1d
    reverts_to: Any = torch.nn.LazyBatchNorm1d


class LazySyncBatchNorm2d(_OfItsRank, LazySyncBatchNorm, torch.nn.LazyBatchNorm2d):
    """Becomes a SyncBatchNorm2d with its first input."""

    cls_to_become: Any = SyncBatchNorm2d
    reverts_to: Any = torch.nn.LazyBatchNorm2d


class LazySyncBatchNorm3d(_OfItsRank, LazySyncBatchNorm, torch.nn.LazyBatchNorm3d):
    """Becomes a SyncBatchNorm3d with its first input."""

    cls_to_become: Any = SyncBatchNorm3d
    reverts_to: Any = torch.nn.LazyBatchNorm3d


SYNCHRONIZED = {
    kind.reverts_to: kind
    for kind in (
        SyncBatchNorm1d,
        SyncBatchNorm2d,
        SyncBatchNorm3d,
        LazySyncBatchNorm1d,
        LazySyncBatchNorm2d,
        LazySyncBatchNorm3d,
    )
}
