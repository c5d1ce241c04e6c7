"""Synchronized batch normalization in Lightning: a plugin for the Trainer.

    trainer = Trainer(strategy="ddp", devices=4, plugins=[syncbn.lightning.SyncBatchNorm()])

Either package is served, `lightning` and `pytorch_lightning`: the one that the program has imported. With Fabric, convert
the model by `syncbn.torch.convert_sync_batchnorm` before `fabric.setup`.
"""

import importlib
import sys
from typing import Any, List, Optional

import torch

from syncbn.core import Worker
from syncbn.torch import convert_sync_batchnorm, revert_sync_batchnorm, weighted_ddp
from syncbn.torch._synchronized import Synchronized
from syncbn.torch.weighting import Weight

__all__ = ["SyncBatchNorm", "WeightedBatches"]


def _framework() -> Any:
    names = ["lightning.pytorch", "pytorch_lightning"]
    imported = [name for name in names if name in sys.modules]
    try:
        return importlib.import_module((imported or names)[0])
    except ImportError:
        return importlib.import_module(names[1])


_Framework = _framework()
_Plugin: Any = importlib.import_module(f"{_Framework.__name__}.plugins.layer_sync").TorchSyncBatchNorm
_Callback: Any = _Framework.Callback


def _synchronized_layers(model: torch.nn.Module) -> List[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, Synchronized)]


class SyncBatchNorm(_Plugin):  # type: ignore[misc]
    """Converts the model when fitting begins, and reverts it when fitting ends, as Lightning does with torch's layer.

    `Trainer(sync_batchnorm=True)` may stay, and does nothing more. Strategies that synchronize layers use the plugin: ddp
    in all its forms, and fsdp. On a single device the model stays as it is.

    Args:
      worker, eps_mode, numeric: as in `syncbn.torch.convert_sync_batchnorm`.
    """

    def __init__(
        self, worker: Optional[Worker] = None, *, eps_mode: Optional[str] = None, numeric: Optional[str] = None
    ) -> None:
        super().__init__()
        self._options = {"worker": worker, "eps_mode": eps_mode, "numeric": numeric}
        self._converted: List[torch.nn.Module] = []

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        """Converts the model in place. Returns: the model."""
        before = {id(layer) for layer in _synchronized_layers(model)}
        convert_sync_batchnorm(model, **self._options)  # type: ignore[arg-type]
        self._converted = [layer for layer in _synchronized_layers(model) if id(layer) not in before]
        return model

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        """Undoes `apply`: layers that were synchronized before it stay so. Returns: the model."""
        converted, self._converted = self._converted, []
        for layer in converted:
            revert_sync_batchnorm(layer)
        return model


class WeightedBatches(_Callback):  # type: ignore[misc]
    """`syncbn.torch.weighted_ddp` for what the Trainer wraps: right gradients where workers' batches differ in size.

        Trainer(strategy="ddp", plugins=[SyncBatchNorm()], callbacks=[WeightedBatches()])

    The loss that `training_step` returns is the mean over its batch. With manual optimization it has no effect.

    Args:
      weight: weight(inputs, kwargs, output), where `inputs` are training_step's positional arguments and `output` is what
        it returned: the number of values that the loss is the mean of. Default: the first dimension of the batch's first
        tensor.
    """

    def __init__(self, weight: Optional[Weight] = None) -> None:
        super().__init__()
        self._weight = weight

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        model = trainer.strategy.model
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            weighted_ddp(model, self._weight)
