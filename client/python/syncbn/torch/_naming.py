"""Names of layers: given by hand, taken from a layer's place in a model, or numbered.

Workers meet by these names, so a name may depend on nothing in which workers differ: neither on the order in which
layers are first used, nor on what wraps the model at this worker alone.
"""

import threading
import uuid
import weakref
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch

from syncbn import _names
from syncbn.core import Worker

_local = threading.local()
_claims: "weakref.WeakKeyDictionary[Worker, Dict[str, str]]" = weakref.WeakKeyDictionary()

# Attributes under which wrappers of torch keep the module that they wrap.
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"}


class PlaceName(str):
    """A name that a conversion took from the layer's path. A later conversion may replace it."""


class NumberedName(str):
    """A name that a layer gave itself.

    A deep copy is a layer of its own and has a name of its own, numbered by the copies that this thread has made. A
    pickle keeps the name, since it is the same layer in another process.
    """

    def __new__(cls, text: str, identity: Optional[str] = None) -> "NumberedName":
        name = super().__new__(cls, text)
        name.identity = identity or uuid.uuid4().hex
        name._copies = {}
        return name

    identity: str
    _copies: Dict[int, int]
    _claimed_for: Any = None  # A weak reference to the worker that `claim` has last found it to be unique for.

    def __deepcopy__(self, memo: Any) -> "NumberedName":
        thread = threading.get_ident()
        self._copies[thread] = self._copies.get(thread, 0) + 1
        return NumberedName(_names.derived(f"{self}/{self._copies[thread]}"))

    def __reduce__(self) -> Any:
        return NumberedName, (str(self), self.identity)


def number(worker: Optional[Worker]) -> NumberedName:
    """The name of a layer that is made without one: numbered for its worker, or, without a worker, for this thread."""
    if worker is not None:
        return NumberedName(worker.name_unnamed_layer())
    _local.layers = getattr(_local, "layers", 0) + 1
    return NumberedName(f"sync_batch_norm_default_{_local.layers - 1}")


def claim(worker: Worker, name: str) -> None:
    """Refuses a number that two layers of a worker have, which were made on different threads."""
    if isinstance(name, NumberedName):
        if name._claimed_for is not None and name._claimed_for() is worker:
            return
        owner = _claims.setdefault(worker, {}).setdefault(str(name), name.identity)
        if owner != name.identity:
            raise ValueError(
                f"two layers of this worker have numbered themselves {str(name)!r}, since they were made on different "
                "threads: give them names with layer=, or convert the model with convert_sync_batchnorm"
            )
        name._claimed_for = weakref.ref(worker)


def _is_wrapping(parent: torch.nn.Module, child: str) -> bool:
    """Returns True if a child stands for its parent, so that it adds nothing to a name."""
    if child in _WRAPPED:
        return True
    if child != "module":
        return False
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    return isinstance(parent, wrappers) or (len(parent._modules) == 1 and not parent._parameters)


def walk(root: torch.nn.Module) -> Iterator[Tuple[str, str, torch.nn.Module]]:
    """Every module of a tree once, parents first: its path, the path without wrappers, the module."""
    seen = set()
    waiting: List[Tuple[Tuple[str, ...], Tuple[str, ...], torch.nn.Module]] = [((), (), root)]
    while waiting:
        path, place, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield ".".join(path), ".".join(place), module
        for name, child in reversed(list(module._modules.items())):
            if child is not None:
                waiting.append((path + (name,), place if _is_wrapping(module, name) else place + (name,), child))


def place_name(prefix: str, place: str) -> PlaceName:
    return PlaceName(_names.derived(prefix + (place or "batch_norm")))
