"""Subclasses of torch's batch normalizations, synchronized without being replaced.

A class that adds something to batch normalization, such as an activation, keeps its own forward, whose calls of
`torch.nn.functional.batch_norm` in training are answered with the synchronized operation (see `_answers`). The object stays what it is; its class becomes a subclass of its own class, made here once for
each, so that `isinstance` holds and every attribute, hook and reference stays.
"""

import abc
import copyreg
import functools
import threading
from types import FunctionType
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from syncbn.torch import _answers, _synchronized

_jit: Any = torch.jit  # Its hints name no classes.
_lock = threading.Lock()
_classes: Dict[type, type] = {}


class PatchedForward:
    """A forward that was assigned to the module itself."""

    def __init__(self, module: Any, function: Callable[..., Any]) -> None:
        self.module, self.function = module, function
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _dispatch(self.module, self.function, args, kwargs)


def patched(module: Any, function: Any) -> Any:
    """The function that is assigned to a module as its forward, synchronized."""
    own = getattr(function, "__func__", None) is type(module).forward and function.__self__ is module
    return function if own or isinstance(function, PatchedForward) else PatchedForward(module, function)


def _dispatch(module: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    node = _synchronized.leaf_call(module, args, kwargs)
    if node is not None:
        return node
    if not module.training:
        return function(*args, **kwargs)
    return _answers.run_outside_of_graphs(module, function, args, kwargs)


class Subclass(_synchronized.Synchronized):
    """Mixed into the classes made here."""

    def __init_subclass__(cls, **options: Any) -> None:
        if "_made_of" not in vars(cls):  # Programs hear of their own classes alone: they may register or refuse them.
            super().__init_subclass__(**options)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, patched(self, value) if name == "forward" else value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made anew where a pickle is read."""
        kind: Any = plain_class(type(self))
        reduced = super().__reduce_ex__(max(2, protocol))
        if not isinstance(reduced, tuple):
            return reduced
        function, args, *rest = reduced
        if function is getattr(copyreg, "__newobj__"):
            return (_new, (kind,) + tuple(args[1:]), *rest)
        state = {name: vars(self).get(name) for name in ("worker", "layer", "eps_mode", "numeric", "original_class")}
        return (_made, (function, args, state), *rest)

    def extra_repr(self) -> str:
        inherited: Any = super()
        return f"{inherited.extra_repr()}, eps_mode={self.eps_mode}, layer={self.layer}"


def _new(kind: Any, *args: Any) -> Any:
    made: Any = synchronized_class(kind)
    return kind.__new__(made, *args)


def _made(function: Callable[..., Any], args: Tuple[Any, ...], state: Dict[str, Any]) -> Any:
    module = function(*args)
    if not isinstance(module, Subclass):
        module.__class__ = synchronized_class(type(module))
    vars(module).update(state)
    return module


class _TorchsOwn(torch.nn.modules.SyncBatchNorm):
    """Stands before torch.nn.SyncBatchNorm, so that a subclass's `super().forward` comes to no process group."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _BatchNorm.forward(self, input)


def plain_class(kind: Any) -> Any:
    """The class that a synchronized one was made of."""
    return next(c for c in kind.__mro__ if "_made_of" in vars(c))._made_of


def synchronized_class(kind: Any) -> Any:
    """A subclass of a batch normalization's class whose forward synchronizes; one for each class."""
    with _lock:
        if kind not in _classes:
            _classes[kind] = _make(kind)
        return _classes[kind]


def _class_unseen(metaclass: Any, name: str, bases: Tuple[type, ...], namespace: Dict[str, Any]) -> Any:
    """Makes a class of a program's metaclass, which may register or refuse what it makes, without asking it."""
    maker: Any = abc.ABCMeta if issubclass(metaclass, abc.ABCMeta) else type
    return maker.__new__(metaclass, name, bases, namespace)


def _make(kind: Any) -> type:
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _dispatch(self, functools.partial(kind.forward, self), args, kwargs)

    bases: Tuple[type, ...] = (Subclass, kind)
    if issubclass(kind, torch.nn.modules.SyncBatchNorm):
        bases += (_TorchsOwn,)
    namespace = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__slots__": (),
        "_made_of": kind,
        "forward": forward,
    }
    if kind.__call__ is not torch.nn.Module.__call__:  # It may normalize there, before or without its forward.
        namespace["__call__"] = _own_call(kind)
    if issubclass(kind, _LazyNormBase):
        namespace["cls_to_become"] = _what_a_lazy_one_becomes(kind.cls_to_become)
    return _class_unseen(type(kind), kind.__name__, bases, namespace)


def _own_call(kind: Any) -> Any:
    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _dispatch(self, functools.partial(kind.__call__, self), args, kwargs)

    return call


def _what_a_lazy_one_becomes(kind: Any) -> Any:
    return None if kind is None else _classes.setdefault(kind, _make(kind))


def scripted_helper(module: torch.nn.Module) -> Optional[str]:
    """A TorchScript function that the module's own forward may normalize with, which no mode sees into."""
    attributes: Dict[str, Any] = dict(vars(module))
    for kind in reversed(type(module).__mro__):
        if kind.__module__.startswith("torch."):
            continue
        for name, value in vars(kind).items():
            attributes[name] = value
            function = getattr(value, "__func__", value)
            if isinstance(function, FunctionType):
                names = function.__code__.co_names
                attributes.update((n, function.__globals__[n]) for n in names if n in function.__globals__)
                attributes.update(_closure(function))
    for name, value in attributes.items():
        if normalizes(getattr(value, "__func__", value)):
            return name
    return None


def _closure(function: FunctionType) -> Dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or ())
    return {name: cell.cell_contents for name, cell in cells if cell != type(cell)()}


def normalizes(value: Any) -> bool:
    """Tells whether something of TorchScript has a batch normalization in it."""
    if not isinstance(value, (_jit.ScriptFunction, _jit.ScriptModule)):
        return False
    if isinstance(value, _jit.ScriptModule) and any("BatchNorm" in str(m.original_name) for m in value.modules()):
        return True
    try:
        return "batch_norm" in str(value.inlined_graph)
    except (AttributeError, RuntimeError):  # A module without a forward.
        return False
