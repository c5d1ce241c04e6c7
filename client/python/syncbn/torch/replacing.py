"""Putting SyncBatchNorm where programs look for torch.nn.SyncBatchNorm, in this process and in those that it spawns."""

import multiprocessing.spawn
import pathlib
import sys
import warnings
from typing import Any, Dict, List

import torch

from syncbn.torch.modules import SyncBatchNorm

# torch.nn.modules keeps it: DistributedDataParallel looks there for layers that it refuses on a CPU.
_TORCHS: Any = torch.nn.modules.SyncBatchNorm


_spawn: Any = multiprocessing.spawn
_get_preparation_data: Any = _spawn.get_preparation_data


class _Installing:
    """Installs where it is unpickled. Only built-in functions can be called there: no path is set yet."""

    def __reduce__(self) -> Any:
        folder = str(pathlib.Path(__file__).resolve().parents[2])
        return exec, (f"import sys; sys.path.append({folder!r}); import syncbn.torch; syncbn.torch.install()",)


def _preparation_data_that_installs(name: str) -> Dict[str, Any]:
    """What multiprocessing hands to a new process of its spawn and forkserver methods, before that runs the script again."""
    return {**_get_preparation_data(name), "syncbn": _Installing()}


def _holders() -> List[str]:
    """Modules other than torch's that have taken torch's class, by name or as a base class."""
    found = {kind.__module__ for kind in _TORCHS.__subclasses__()}
    for name, module in list(sys.modules.items()):
        if getattr(module, "__dict__", {}).get("SyncBatchNorm") is _TORCHS:
            found.add(name)
    return sorted(name for name in found if name.partition(".")[0] not in ("torch", "syncbn"))


def install() -> None:
    """Makes `torch.nn.SyncBatchNorm` this package's class until `uninstall`, in this process and in those that
    multiprocessing starts from it meanwhile.

        import syncbn.torch
        syncbn.torch.install()
        import detectron2                                      # And whatever else names torch.nn.SyncBatchNorm.

    Programs that make `torch.nn.SyncBatchNorm(C)`, or call `torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)`, then get
    layers that synchronize through the statistics service. A module that imports the class itself, or derives one from it,
    keeps what it has: it has to be imported afterwards, and a RuntimeWarning names those that are there already. Twice is
    harmless. `python -m syncbn.torch SCRIPT` does this before it runs a script.
    """
    setattr(torch.nn, "SyncBatchNorm", SyncBatchNorm)
    _spawn.get_preparation_data = _preparation_data_that_installs
    holders = _holders()
    if holders:
        warnings.warn(
            f"{', '.join(holders)} had torch.nn.SyncBatchNorm before syncbn.torch.install(), and will use torch's class: call "
            "install() before these are imported",
            RuntimeWarning,
            stacklevel=2,
        )


def uninstall() -> None:
    """Undoes `install`: torch.nn.SyncBatchNorm is torch's class again. Layers that were made meanwhile stay as they are."""
    setattr(torch.nn, "SyncBatchNorm", _TORCHS)
    if _spawn.get_preparation_data is _preparation_data_that_installs:
        _spawn.get_preparation_data = _get_preparation_data
