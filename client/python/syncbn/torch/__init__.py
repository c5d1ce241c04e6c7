"""Synchronized batch normalization for PyTorch, in place of torch.nn.SyncBatchNorm.

    with syncbn.torch.init_worker() as worker:
        model = syncbn.torch.convert_sync_batchnorm(model, worker)
        cross_entropy(model(x), y, reduction="sum").backward()
        syncbn.torch.all_reduce_gradients(model, worker, weight=len(x))
        optimizer.step()
"""

import importlib

from syncbn.torch._synchronized import NotSynchronized
from syncbn.torch.convert import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.torch.functional import moments
from syncbn.torch.gradients import all_reduce_gradients
from syncbn.torch.launch import init_worker, join
from syncbn.torch.modules import LazySyncBatchNorm, SyncBatchNorm
from syncbn.torch.replacing import install, uninstall
from syncbn.torch.weighting import weighted_ddp

importlib.import_module("syncbn.functional")  # It is there after `import syncbn.torch`, as torch.nn.functional after torch.

__all__ = [
    "LazySyncBatchNorm",
    "NotSynchronized",
    "SyncBatchNorm",
    "all_reduce_gradients",
    "convert_sync_batchnorm",
    "init_worker",
    "install",
    "join",
    "moments",
    "revert_sync_batchnorm",
    "uninstall",
    "weighted_ddp",
]
