"""Synchronized batch normalization in MMEngine, and so in MMCV, MMSegmentation, MMDetection and others.

    custom_imports = dict(imports=["syncbn.mmengine"])  # In a config, or `import syncbn.mmengine` in a script.

Then "SyncBN" in the registry MODELS, which every `norm_cfg=dict(type="SyncBN")` names, is this package's layer.
`sync_bn="syncbn"` in a config converts all batch normalization of the model, where "torch" and "mmcv" convert to other
layers. A runner in a single process reverts all of them, as it does with torch's.
"""

import importlib
import importlib.util
import sys
from typing import Any

import mmengine.model.utils
import mmengine.registry
import torch

from syncbn.torch import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm

__all__ = ["SyncBatchNorm"]

# Modules that import the framework's two converters: they are loaded before the converters are replaced.
_USERS = ("mmengine.model", "mmengine.runner", "mmengine._strategy")


def _extend(name: str, function: Any) -> None:
    """Puts a function in the place of one of mmengine's, wherever it has been imported to. It gets that one first."""
    own: Any = getattr(mmengine.model.utils, name)

    def extended(module: torch.nn.Module, *arguments: Any, **options: Any) -> torch.nn.Module:
        changed: torch.nn.Module = function(own, module, *arguments, **options)
        return changed

    for holder in list(sys.modules.values()):
        if holder.__name__.partition(".")[0] == "mmengine" and vars(holder).get(name) is own:
            setattr(holder, name, extended)


def _convert(own: Any, module: torch.nn.Module, implementation: str = "torch") -> torch.nn.Module:
    if implementation == "syncbn":
        return convert_sync_batchnorm(module)
    converted: torch.nn.Module = own(module, implementation)
    return converted


def _revert(own: Any, module: torch.nn.Module) -> torch.nn.Module:
    reverted: torch.nn.Module = own(revert_sync_batchnorm(module))
    return reverted


if importlib.util.find_spec("mmcv") is not None:
    importlib.import_module("mmcv.cnn")  # It registers its own "SyncBN", and would do so later.
for _user in _USERS:
    importlib.import_module(_user)
mmengine.registry.MODELS.register_module("SyncBN", module=SyncBatchNorm, force=True)
_extend("convert_sync_batchnorm", _convert)
_extend("revert_sync_batchnorm", _revert)
