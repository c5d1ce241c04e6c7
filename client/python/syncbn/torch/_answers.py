"""The normalization that a module's own forward calls for, answered by the synchronized operation.

The forward runs under a `torch.overrides.TorchFunctionMode`, which sees the calls of `torch.nn.functional.batch_norm` that
it makes. Whatever else it takes statistics with, and whatever no mode sees, a trial of the forward shows (see `_trials`).
"""

import contextlib
import functools
import sys
import threading
import warnings
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import torch
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from syncbn.torch import _checkpointing, _elementwise, _graphs, _replicas, _synchronized, _trials

_CALL = getattr(torch.nn.Module, "_call_impl").__code__
# Off within a torch.autograd.Function, as no_grad does not leave it.
_records_forward: Callable[[], bool] = getattr(getattr(torch, "_C"), "_is_fwd_grad_enabled", lambda: True)


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

    def __init__(self, module: Any, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.module = module
        self._place = None if _trials.current() else _replicas.current()
        self._tracked = module.num_batches_tracked
        self._added: List[Any] = []  # The amounts that the forward has added to `num_batches_tracked`.
        self.counted = False  # The running statistics have taken the batch, or are about to.
        self._to_be_counted = False
        self._seen = False  # There was a batch normalization, in training or not.
        self._synchronized = False
        self._in_own_forward = False
        self._other_statistics = False
        self._verdicts = _trials.verdicts(module)
        # Later calls that go the same way have to be told from others, and that costs less.
        self._calls = _elementwise.Calls() if self._verdicts else _elementwise.Flow(module, args, kwargs)
        self._versions = self._buffer_versions()
        self._records = torch.is_grad_enabled()

    @_graphs.outside_of_graphs
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Optional[Dict[str, Any]] = None) -> Any:
        kwargs = kwargs or {}
        if self._in_own_forward:
            return func(*args, **kwargs)
        if func in _BATCH_NORMS and self._is_own_call():
            call = _BATCH_NORMS[func](*args, **kwargs)
            if self._is_own_size(call.input):
                self._seen = True
                result = self._normalize(call) if call.training else func(*args, **kwargs)
                return self._calls.apart(args, kwargs, result)
        elif func in _COUNTS and args and args[0] is self._tracked and self._tracked is not None:
            if self._place is not None:
                return self._count_with_replicas(self._place, func, args, kwargs)
            self._added.append(args[1])
            with _checkpointing.unseen():  # `uncount` takes it back in the second half alone.
                return func(*args, **kwargs)
        elif getattr(func, "overloadpacket", func) in _STATISTICS and self._is_own_call():
            self._other_statistics = True
        return self._calls.through(func, args, kwargs, func(*args, **kwargs))

    def _normalize(self, call: _Call) -> Any:
        checkpoint = _checkpointing.context(run_forward.__code__)
        self._refuse_functions(checkpoint)
        checkpoint.run_second_halves_by(self._again)
        self._synchronized = True
        return self.module._normalize_with_others(call.input, self._step(call))

    def _refuse_functions(self, checkpoint: _checkpointing.Context) -> None:
        """Refuses a normalization within a torch.autograd.Function, which has a backward pass of its own."""
        if not self._records or torch.is_grad_enabled():  # Within a Function, autograd records nothing.
            return
        if not (_records_forward() or torch.is_inference_mode_enabled() or checkpoint.gradient_follows):
            self._refuse_function()
        frame = sys._getframe(2)
        while frame is not None and frame.f_code is not run_forward.__code__:
            names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
            context = frame.f_locals.get(names[0]) if names else None
            if isinstance(context, FunctionCtx) and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
                self._refuse_function()
            frame = frame.f_back  # type: ignore[assignment]

    def _refuse_function(self) -> None:
        raise _synchronized.NotSynchronized(
            f"layer {self.module.layer!r}: its forward normalizes within a torch.autograd.Function, whose backward "
            "knows of no other worker. Let the forward call torch.nn.functional.batch_norm outside of it, or revert "
            "the layer"
        )

    def _again(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A part of the forward that is checkpointed: torch runs it again during backward, when this mode has ended."""
        module = self.module
        return lambda *args, **kwargs: run_forward(module, function, args, kwargs, again=True)

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
        self._seen = self._synchronized = self._in_own_forward = True
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

    def check(self, result: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Refuses a forward that has normalized by other means, and warns of one that also has.

        A way through the forward is tried once: the operations that it has called tell it from others.
        """
        changed = not self._synchronized and self._versions != self._buffer_versions()
        way = (self._synchronized, self._records, changed, frozenset(self._calls.others))
        if way in self._verdicts:
            self._judge(self._verdicts[way], changed)
            return
        whole = self._seen and self._calls.is_whole(result)
        judge = functools.partial(self._judge_new, way, changed, whole, functools.partial(_trial, self.module, function, args, kwargs))
        if self._place is None:
            judge()
        else:  # Replicas may share the module, which a trial changes for the time that it takes.
            self._place.group.afterwards(judge)

    def _judge_new(self, way: Any, changed: bool, whole: bool, trial: Callable[[], "_Verdict"]) -> None:
        verdict = self._verdicts.get(way)
        if verdict is None and len(self._verdicts) >= _trials.Verdicts.LIMIT:
            verdict = _Verdict(unknown="it goes too many ways")
        elif verdict is None:
            verdict = self._verdicts[way] = _Verdict() if whole else trial()
            self._warn(verdict)
        self._judge(verdict, changed)

    def _judge(self, verdict: "_Verdict", changed: bool) -> None:
        suspected = verdict.unknown and (self._other_statistics or changed)
        if not self._synchronized and (suspected or verdict.local in ("output", "running statistics")):
            raise _synchronized.NotSynchronized(
                f"layer {self.module.layer!r}: the forward of {self._kind()} normalizes its channels without a call of "
                "torch.nn.functional.batch_norm in training, or out of sight (within torch.jit, an operation of its own or another "
                "module, on another thread), so that it cannot be synchronized. Let it call "
                "torch.nn.functional.batch_norm, or take its moments by syncbn.torch.moments, or revert the layer"
            )

    def _warn(self, verdict: "_Verdict") -> None:
        """Tells of a part that stays local beside one that is synchronized, and of a forward that nothing is known of."""
        text = f"layer {self.module.layer!r}: in the forward of {self._kind()}, "
        if verdict.local == "gradient" or (self._synchronized and verdict.local):
            verb = "depend" if verdict.local == "running statistics" else "depends"
            text += f"the {verdict.local} {verb} on other rows of this worker's batch in ways that are not synchronized, and stay local"
        elif verdict.unknown and not (self._synchronized or self._other_statistics):
            text += (
                "no call of torch.nn.functional.batch_norm in training was seen, and whether it takes statistics of this worker's batch "
                f"by other means could not be found out ({verdict.unknown})"
            )
        else:
            return
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _kind(self) -> str:
        kind = self.module.original_class or type(self.module)
        return f"{kind.__module__}.{kind.__qualname__}"


class _Verdict(NamedTuple):
    """The outcome of a trial."""

    local: Optional[str] = None  # The part that depends on other rows of the local batch.
    unknown: str = ""  # The reason, where the trial has shown nothing.


def _trial(module: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> _Verdict:
    forward = lambda *args, **kwargs: run_forward(module, function, args, kwargs)  # noqa: E731
    try:
        return _Verdict(_trials.Trial(module, forward, args, kwargs).local_part())
    except _trials.OwnRounds:
        return _Verdict()
    except _trials.Unknown as reason:
        return _Verdict(unknown=str(reason))


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


def run_forward(module: Any, function: Callable[..., Any], args: Any, kwargs: Any, again: bool = False) -> Any:
    """A forward of the module in training, synchronized. again: a part of one that has been run."""
    running = _running()
    if any(answers.module is module for answers in running):  # A forward that calls another of the same module: of its class, or what it was patched over.
        return function(*args, **kwargs)
    answers = _Answers(module, args, kwargs)
    running.append(answers)
    try:
        with answers:
            result = function(*args, **kwargs)
    finally:
        running.pop()
        answers.uncount()
    if not again and _trials.current() is None:
        answers.check(result, function, args, kwargs)
    return result


run_outside_of_graphs: Any = _graphs.outside_of_graphs(run_forward)
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

