"""Conversion from and to torch's own batch normalization: in place, whole, all or nothing.

torch's converters make new layers and copy a list of things into them, so that all else is lost: hooks, attributes,
buffers, parametrizations, a forward of one's own, references from elsewhere. Here each layer stays the object that it
is, and only its class changes; what a layer is beyond that class cannot get lost, since nothing is copied.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch.fx.graph_module import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from syncbn import _names
from syncbn.core import Worker
from syncbn.torch import _naming, _subclasses, _synchronized, _trials, dimensions
from syncbn.torch.modules import BatchNorm, LazyBatchNorm, LazySyncBatchNorm, SyncBatchNorm

# Targets of the classes whose forward is torch's own.
_KINDS: Dict[Any, Any] = {
    **dimensions.SYNCHRONIZED,
    torch.nn.modules.SyncBatchNorm: SyncBatchNorm,
    BatchNorm: SyncBatchNorm,
    LazyBatchNorm: LazySyncBatchNorm,
}
# Inference alone: they never normalize with a batch's statistics.
_QUANTIZED = tuple(f"torch.{package}.quantized." for package in ("nn", "ao.nn", "nn.intrinsic", "ao.nn.intrinsic"))
# Beginnings of the names of classes that torch makes at run time, for parametrizations, fully_shard, and replicate, new and
# old, and puts over a module's own.
_PUT_OVER = ("Parametrized", "FSDP", "Replicate", "DDP")
# Attributes that a synchronized layer has beyond what its own class gives it.
_OWN = ["worker", "layer", "eps_mode", "numeric", "biased_running_variance", "original_class"]
_OWN += ["process_group", "_original_process_group", "_verdicts"]


class Change(NamedTuple):
    """The change that a conversion makes to one module."""

    module: torch.nn.Module
    kind: Any
    attributes: Dict[str, Any]
    removed: Tuple[str, ...] = ()


class _Kept:
    """A process group that a layer had. It belongs to this process: copies share it, and pickles leave it out."""

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> "_Kept":
        return self

    def __reduce__(self) -> Any:
        return _Kept, ()


def apply(changes: List[Change]) -> None:
    """Makes all the changes, or none."""
    done: List[Tuple[torch.nn.Module, Any, Dict[str, Any]]] = []
    try:
        for change in changes:
            module: Any = change.module
            done.append((module, type(module), dict(vars(module))))
            if change.kind is not type(module):
                module.__class__ = change.kind
            vars(module).update(change.attributes)
            for name in change.removed:
                vars(module).pop(name, None)
    except BaseException:
        for module, kind, attributes in reversed(done):
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
        raise


def _is_put_over(kind: Any) -> bool:
    """Returns True for a class that torch has made at run time and put over a module's own."""
    return kind.__module__.startswith("torch.") and kind.__name__.startswith(_PUT_OVER)


def _class_of(module: torch.nn.Module) -> Tuple[Any, List[Any]]:
    """A module's class without those that torch has put over it, and these, outermost first."""
    kind: Any = type(module)
    over = []
    while _is_put_over(kind):
        over.append(kind)
        kind = kind.__bases__[-1]
    return kind, over


def _put_over(kind: Any, over: List[Any]) -> Any:
    """The same classes put over another one."""
    for outer in reversed(over):
        namespace = {k: v for k, v in vars(outer).items() if k not in ("__dict__", "__weakref__")}
        kind = type(outer)(outer.__name__, (*outer.__bases__[:-1], kind), namespace)
    return kind


def _described(module: torch.nn.Module, path: str) -> str:
    kind = type(module)
    return f"{path or 'the module'} ({kind.__module__}.{kind.__qualname__})"


def _refuse_graphs(module: torch.nn.Module, path: str) -> None:
    """Refuses code of batch normalization that has been taken out of its modules."""
    if _subclasses.normalizes(module):
        raise ValueError(
            f"{_described(module, path)} is TorchScript, whose batch normalization cannot be synchronized: convert the "
            "model that it was made of, and leave it as it is for training"
        )
    if isinstance(module, GraphModule):
        for node in module.graph.nodes:
            if node.op == "call_function" and "batch_norm" in getattr(node.target, "__name__", str(node.target)):
                raise ValueError(
                    f"{_described(module, path)} is a torch.fx graph that normalizes by itself, at its node "
                    f"{node.name!r}, and not through a layer: convert the model before it is traced"
                )


def _options(worker: Any, eps_mode: Optional[str], numeric: Optional[str], prefix: Any, module: Any) -> Dict[str, Any]:
    """The arguments of a conversion that were given."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module is a torch.nn.Module, not a {type(module).__qualname__}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix is a str, not a {type(prefix).__qualname__}")
    _synchronized.check_options(worker, "add" if eps_mode is None else eps_mode, numeric or "refuse")
    given = {"worker": worker, "eps_mode": eps_mode, "numeric": numeric}
    return {name: value for name, value in given.items() if value is not None}


def _adopt(module: Any, name: str, prefix: str, options: Dict[str, Any]) -> Change:
    """A layer that is synchronized already takes what is given. A name that was given to it by hand stays."""
    own: Optional[str] = module.layer
    if own is None or isinstance(own, (_naming.NumberedName, _naming.PlaceName)):
        own = _naming.PlaceName(name)
    elif not own.startswith(prefix):
        own = _names.derived(prefix + own)
    return Change(module, type(module), {**options, "layer": own})


def _has_its_own_forward(kind: Any) -> bool:
    """Returns False for a class of torch's that the program has given another forward."""
    found: Any = getattr(kind.forward, "__globals__", {})  # `__module__` of a decorated function may be that of the original.
    return str(found.get("__name__")).startswith(("torch.", "syncbn."))


def _convert(module: Any, path: str, name: str, options: Dict[str, Any], kinds: Dict[Any, Any]) -> Change:
    """A batch normalization becomes a synchronized one."""
    group = getattr(module, "process_group", None)
    if group is not None and "worker" not in options:
        raise ValueError(f"{path or 'the module'} has a process group: give the worker of the group that stands for it")
    kind, over = _class_of(module)
    attributes = {"worker": None, "eps_mode": "add", "numeric": "refuse", "original_class": kind}
    attributes.update(options, layer=_naming.PlaceName(name))
    own_forward = vars(module).get("forward")
    if own_forward is None and kind in _KINDS and _has_its_own_forward(kind):
        target = kinds.get(kind, _KINDS[kind])
        attributes.update(process_group=None, _original_process_group=_Kept(group))
    else:
        helper = _subclasses.scripted_helper(module)
        if helper is not None:
            raise ValueError(
                f"{_described(module, path)} normalizes within {helper!r}, which is TorchScript and cannot be "
                "synchronized: let it call torch.nn.functional.batch_norm outside of torch.jit.script"
            )
        target = _subclasses.synchronized_class(kind)
        attributes["_verdicts"] = _trials.Verdicts()  # Replicas of the layer share it.
        if own_forward is not None:
            attributes["forward"] = _subclasses.PatchedForward(module, own_forward)
    return Change(module, _put_over(target, over), attributes)


def plan(
    module: torch.nn.Module,
    worker: Optional[Worker],
    eps_mode: Optional[str],
    numeric: Optional[str],
    prefix: str,
    kinds: Dict[Any, Any],
) -> List[Change]:
    """Returns the changes of a conversion. Raises what it refuses, having changed nothing."""
    options = _options(worker, eps_mode, numeric, prefix, module)
    found = []
    for path, place, candidate in _naming.walk(module):
        _refuse_graphs(candidate, path)
        if isinstance(candidate, (_BatchNorm, _synchronized.Synchronized)):
            if not type(candidate).__module__.startswith(_QUANTIZED):
                found.append((path, place, candidate))
    places = [place for _, place, _ in found]
    changes = []
    for path, place, layer in found:
        # The wrappers tell two layers apart whose names would be the same without them.
        name = _naming.place_name(prefix, place if places.count(place) == 1 else path)
        if isinstance(layer, _synchronized.Synchronized):
            changes.append(_adopt(layer, name, prefix, options))
        else:
            changes.append(_convert(layer, path, name, options, kinds))
    _refuse_equal_names(found, changes)
    return changes


def _refuse_equal_names(found: List[Any], changes: List[Change]) -> None:
    """Refuses a name that was given to a layer by hand and is another's place."""
    owners: Dict[Any, str] = {}
    for (path, _, layer), change in zip(found, changes):
        worker = change.attributes.get("worker", getattr(layer, "worker", None))
        key = (id(worker), change.attributes["layer"])
        if key in owners:
            raise ValueError(
                f"{path or 'the module'} and {owners[key] or 'the module'} would both be layer {str(key[1])!r}: give "
                "them other names with layer="
            )
        owners[key] = path


def name_layers(module: torch.nn.Module) -> None:
    """Names the layers that have numbered themselves by their paths."""
    found = [(place, layer) for _, place, layer in _naming.walk(module)]
    layers: List[Any] = [(place, m) for place, m in found if isinstance(m, _synchronized.Synchronized)]
    for place, layer in layers:
        if layer.layer is None or isinstance(layer.layer, _naming.NumberedName):
            layer.layer = _naming.place_name("", place)


def convert_sync_batchnorm(
    module: torch.nn.Module,
    worker: Optional[Worker] = None,
    *,
    eps_mode: Optional[str] = None,
    prefix: str = "",
    numeric: Optional[str] = None,
) -> torch.nn.Module:
    """Makes every batch normalization of a model a synchronized one, in place: all of them, or none and an error.

    A torch.nn.BatchNorm*d becomes a layer that is both a SyncBatchNorm and what it was, a LazyBatchNorm*d one that is
    both a LazySyncBatchNorm and what it was, a torch.nn.SyncBatchNorm a SyncBatchNorm. Any other subclass keeps its
    class, as the base of one made for it, and its forward, whose calls of torch.nn.functional.batch_norm are
    synchronized in training. A forward that takes statistics by other means raises NotSynchronized when it is called, or
    warns of a part that stays local beside a synchronized one. So `isinstance` goes on finding every layer. Layers stay the same objects, with the same
    parameters, buffers, hooks, parametrizations and attributes, so an optimizer made before goes on.

    Layers are named by their path in the model, without what wrappers add (`module`, `_orig_mod`,
    `_fsdp_wrapped_module`, `_checkpoint_wrapped_module`); a shared module keeps its first path. Layers that are
    synchronized already take the arguments that are given, and a new name, unless they were named by hand: then they
    keep theirs, behind the prefix.

    Args:
      worker: default `syncbn.default_worker()`, at the time of the call of a layer. Needed for a torch.nn.SyncBatchNorm
        with a process group: it says which workers take the group's place.
      eps_mode: "add" or "clamp", as in SyncBatchNorm. Default: "add".
      prefix: put before the names, to tell two models of one worker apart.
      numeric: "refuse" or "propagate", as in SyncBatchNorm. Default: "refuse".
    Returns:
      The module itself.
    Raises:
      TypeError: for arguments of another type, such as a process group.
      ValueError: for batch normalization within TorchScript or in the nodes of a torch.fx graph; for names that two
        layers would have.
    """
    apply(plan(module, worker, eps_mode, numeric, prefix, {}))
    return module


def _revert(module: Any, path: str) -> Change:
    """A synchronized layer becomes what it was."""
    kind, over = _class_of(module)
    attributes: Dict[str, Any] = {}
    if module.activation is not None:
        raise ValueError(
            f"{_described(module, path)} has the activation {module.activation!r}, which no class of torch's has: put a layer of "
            "its own after it, and revert then"
        )
    if issubclass(kind, _subclasses.Subclass):
        target = _subclasses.plain_class(kind)
    else:
        target = module.original_class or kind.reverts_to
        if not kind.__module__.startswith("syncbn.torch."):
            raise ValueError(f"{_described(module, path)} was made from SyncBatchNorm, and nothing is known to revert it to")
        if issubclass(target, _LazyNormBase) and not issubclass(kind, _LazyNormBase):
            target = target.cls_to_become  # It was lazy when it was converted.
    patched = vars(module).get("forward")
    if isinstance(patched, _subclasses.PatchedForward):
        attributes["forward"] = patched.function
    removed = [name for name in _OWN if name != "process_group" or not issubclass(target, torch.nn.modules.SyncBatchNorm)]
    kept = vars(module).get("_original_process_group")
    if kept is not None and issubclass(target, torch.nn.modules.SyncBatchNorm):
        attributes["process_group"] = kept.group
    return Change(module, _put_over(target, over), attributes, tuple(removed))


def revert_sync_batchnorm(module: torch.nn.Module) -> torch.nn.Module:
    """Undoes `convert_sync_batchnorm` in place: all layers have their own classes again, or none and an error.

    A SyncBatchNorm that was made as one becomes a batch normalization for inputs of any rank.

    Returns:
      The module itself.
    Raises:
      ValueError: for a layer of a class that was derived from SyncBatchNorm.
    """
    found = [(path, layer) for path, _, layer in _naming.walk(module)]
    apply([_revert(layer, path) for path, layer in found if isinstance(layer, _synchronized.Synchronized)])
    return module
