"""Subclasses of torch's batch normalizations, synchronized without being replaced.

A class that adds something to batch normalization, such as an activation, keeps its own forward. It runs under a
`torch.overrides.TorchFunctionMode` that answers its calls of `torch.nn.functional.batch_norm` in training with the
synchronized operation. The object stays what it is; its class becomes a subclass of its own class, made here once for
each, so that `isinstance` holds and every attribute, hook and reference stays.
"""

import abc
import contextlib
import copyreg
import functools
import sys
import threading
from types import FunctionType
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.overrides import TorchFunctionMode

from syncbn.torch import _checkpointing, _graphs, _replicas, _synchronized

_CALL = getattr(torch.nn.Module, "_call_impl").__code__
_jit: Any = torch.jit  # Its hints name no classes.
_lock = threading.Lock()
_classes: Dict[type, type] = {}


class _Call(NamedTuple):
    """The arguments of torch.nn.functional.batch_norm."""

    input: torch.Tensor
    running_mean: Optional[torch.Tensor]
    running_var: Optional[torch.Tensor]
    weight: Optional[torch.Tensor] = None
    bias: Optional[torch.Tensor] = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


def _of_torch(
    input: torch.Tensor,
    weight: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    running_mean: Optional[torch.Tensor],
    running_var: Optional[torch.Tensor],
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> _Call:
    """The arguments of torch.batch_norm."""
    return _Call(input, running_mean, running_var, weight, bias, training, momentum, eps)


_aten: Any = getattr(torch, "ops").aten  # Unknown to the hints of some versions.
_BATCH_NORMS: Dict[Any, Callable[..., _Call]] = {
    torch.nn.functional.batch_norm: _Call,
    torch.batch_norm: _of_torch,
    _aten.batch_norm: _of_torch,
    _aten.batch_norm.default: _of_torch,
}
_COUNTS = (torch.Tensor.add_, torch.Tensor.__iadd__)

# A forward that takes statistics of its own with one of these would stay a local one.
_NAMES = ("mean", "var", "std", "var_mean", "std_mean", "sum", "native_batch_norm", "batch_norm_stats")
_STATISTICS = {
    getattr(owner, name) for owner in (torch, torch.Tensor, _aten) for name in _NAMES if hasattr(owner, name)
}


class _Answers(TorchFunctionMode):
    """Answers the batch normalization in one call of a module's own forward."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self._place = _replicas.current()
        self._tracked = module.num_batches_tracked
        self._added: List[Any] = []  # The amounts that the forward has added to `num_batches_tracked`.
        self.counted = False  # The running statistics have taken the batch, or are about to.
        self._to_be_counted = False
        self._seen = False
        self._in_own_forward = False
        self._other_statistics = False
        self._versions = self._buffer_versions()
        self._records = torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Optional[Dict[str, Any]] = None) -> Any:
        kwargs = kwargs or {}
        if self._in_own_forward:
            return func(*args, **kwargs)
        if func in _BATCH_NORMS and self._is_own_call():
            call = _BATCH_NORMS[func](*args, **kwargs)
            if self._is_own_size(call.input):
                self._seen = True
                if call.training:
                    self._refuse_functions()
                    _checkpointing.context(run_forward.__code__).run_second_halves_by(self._again)
                    return self.module._normalize_with_others(call.input, self._step(call))
        elif func in _COUNTS and args and args[0] is self._tracked and self._tracked is not None:
            if self._place is not None:
                return self._count_with_replicas(self._place, func, args, kwargs)
            self._added.append(args[1])
            with _checkpointing.unseen():  # `uncount` takes it back in the second half alone.
                return func(*args, **kwargs)
        elif getattr(func, "overloadpacket", func) in _STATISTICS and self._is_own_call():
            self._other_statistics = True
        return func(*args, **kwargs)

    def _refuse_functions(self) -> None:
        """Refuses a normalization within a torch.autograd.Function, which has a backward pass of its own."""
        if not self._records or torch.is_grad_enabled():  # Within a Function, autograd records nothing.
            return
        frame = sys._getframe(2)
        while frame is not None and frame.f_code is not run_forward.__code__:
            names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
            context = frame.f_locals.get(names[0]) if names else None
            if isinstance(context, FunctionCtx) and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
                raise RuntimeError(
                    f"layer {self.module.layer!r}: its forward normalizes within a torch.autograd.Function, whose backward "
                    "knows of no other worker. Let the forward call torch.nn.functional.batch_norm outside of it, or revert "
                    "the layer"
                )
            frame = frame.f_back  # type: ignore[assignment]

    def _again(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A part of the forward that is checkpointed: torch runs it again during backward, when this mode has ended."""
        module = self.module
        return lambda *args, **kwargs: run_forward(module, function, args, kwargs)

    def _count_with_replicas(self, place: _replicas.Place, func: Any, args: Any, kwargs: Dict[str, Any]) -> Any:
        """Adds to the count once, since the replicas of one step are one batch, and before any of them reads it."""

        def count(_: List[Any]) -> List[Any]:
            func(*args, **kwargs)
            return [args[0]] * place.group.size

        counted = place.group.meet(place.replica, f"the batch count of {self.module.layer}", None, count)
        if place.replica == 0:  # It takes back what was added, if the batch is not taken.
            self._added.append(args[1])
        return counted

    @contextlib.contextmanager
    def own_forward(self) -> Iterator[None]:
        """The forward of SyncBatchNorm, which synchronizes and counts by itself."""
        self._seen = self._in_own_forward = True
        try:
            yield
        finally:
            self._in_own_forward = False

    def _step(self, call: _Call) -> _synchronized.Step:
        self._to_be_counted = True
        return _Step(self, call)

    def tracked_batches(self) -> Optional[torch.Tensor]:
        """The number of batches, where the forward has added 1 to it in its place."""
        in_place = self.module.num_batches_tracked is self._tracked
        return self._tracked if in_place and self._added == [1] else None

    def _is_own_call(self) -> bool:
        """Tells whether the module's forward made the call, and no module within it."""
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code is run_forward.__code__:
                return frame.f_locals["module"] is self.module
            if frame.f_code is _CALL and frame.f_locals.get("self") is not self.module:
                return False
            frame = frame.f_back  # type: ignore[assignment]
        return False

    def _is_own_size(self, x: torch.Tensor) -> bool:
        module = self.module
        vectors = [v for v in (module.running_mean, module.weight, module.bias) if v is not None]
        return x.dim() < 2 or x.size(1) == (vectors[0].numel() if vectors else module.num_features)

    def _buffer_versions(self) -> List[int]:
        buffers = (self.module.running_mean, self.module.running_var)
        return [b._version for b in buffers if b is not None and not b.is_inference()]

    def uncount(self) -> None:
        """Takes back what the forward has counted, if the running statistics have not taken the batch."""
        if self.counted or self._tracked is None or not self._to_be_counted:
            return
        if self.module.num_batches_tracked is not self._tracked:
            self.module.num_batches_tracked = self._tracked
        with torch.no_grad(), _checkpointing.unseen():
            for added in self._added:
                self._tracked.sub_(added)

    def check(self) -> None:
        """Refuses a forward that has normalized by other means."""
        if self._seen or not (self._other_statistics or self._versions != self._buffer_versions()):
            return
        kind = self.module.original_class or type(self.module)
        raise RuntimeError(
            f"layer {self.module.layer!r}: the forward of {kind.__module__}.{kind.__qualname__} normalizes its channels "
            "without torch.nn.functional.batch_norm, or within torch.jit, so that it cannot be synchronized. Revert the "
            "layer, or let its forward call torch.nn.functional.batch_norm"
        )


class _Step(_synchronized.Step):
    """The normalization that a module's own forward has called for; the forward counts the batch by itself."""

    __slots__ = ("_answers", "_momentum")

    def __init__(self, answers: _Answers, call: _Call) -> None:
        vectors = (call.weight, call.bias, call.running_mean, call.running_var)
        super().__init__(answers.module, *vectors, call.eps, True)
        self._answers, self._momentum = answers, call.momentum

    def _count_batch(self) -> float:
        self._answers.counted = True
        return self._momentum

    def _uncount_batch(self) -> None:
        self._answers.counted = False

    def _tracked_batches(self) -> Optional[torch.Tensor]:
        return self._answers.tracked_batches()


def run_forward(module: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A forward of the module in training, synchronized."""
    running = _running()
    if any(answers.module is module for answers in running):  # A forward that calls another of the same module: of its class, or what it was patched over.
        return function(*args, **kwargs)
    answers = _Answers(module)
    running.append(answers)
    try:
        with answers:
            result = function(*args, **kwargs)
        answers.check()
        return result
    finally:
        running.pop()
        answers.uncount()


_run_outside_of_graphs: Any = _graphs.outside_of_graphs(run_forward)
_local = threading.local()


def _running() -> List[_Answers]:
    """The synchronized forwards that this thread runs."""
    if not hasattr(_local, "running"):
        _local.running = []
    running: List[_Answers] = _local.running
    return running


def in_own_forward(module: Any) -> Any:
    """A context for the forward of SyncBatchNorm, if one that was assigned to the module may have called it."""
    for answers in getattr(_local, "running", ()):
        if answers.module is module:
            return answers.own_forward()
    return None


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
    return _run_outside_of_graphs(module, function, args, kwargs)


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
    if issubclass(kind, _LazyNormBase):
        namespace["cls_to_become"] = _what_a_lazy_one_becomes(kind.cls_to_become)
    return _class_unseen(type(kind), kind.__name__, bases, namespace)


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
