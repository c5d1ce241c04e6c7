"""Trials: whether a forward makes a row of its output from that row alone, once its synchronized statistics are given.

The forward of a class that is not known may take statistics in any way: by a product with ones, on another thread, within
an operation of its own, in NumPy. No list of operations is complete. So the forward is run again, on its input and with
other values in half of the rows, while every synchronized normalization in it answers with the same statistics. A forward
that synchronizes all of its statistics, or takes none, gives the other rows the same output each time. One that takes
statistics of the local batch does not.

Nothing of a trial is left: neither rounds nor changed buffers, attributes, random generators or gradients.
"""

import contextlib
import math
import random
import threading
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import torch

from syncbn.torch import _batches, _checkpointing, _evaluation, _supported

_local = threading.local()
# A trial's own hooks for saved tensors take the place of a checkpoint's, which count what a forward saves.
_saved_tensors_hooks: Any = getattr(torch.autograd, "graph").saved_tensors_hooks
_autograd: Any = torch.autograd
_ROWS = 2  # The fewest rows of a trial.
_SIZE_IN_HALF = 1e4  # Keeps values that are made larger than the input's within float16.


class OwnRounds(Exception):
    """The forward begins rounds by other means than a layer's normalization: it synchronizes by itself."""


class Unknown(Exception):
    """The trial has shown nothing, for the reason that it carries."""


class Verdicts(Dict[Any, Any]):
    """The outcomes of a layer's trials. They belong to one process: copies and pickles begin anew."""

    LIMIT = 16

    def __deepcopy__(self, memo: Any) -> "Verdicts":
        return Verdicts()

    def __reduce__(self) -> Any:
        return Verdicts, ()


def verdicts(module: torch.nn.Module) -> Verdicts:
    """Those of a layer, to be added to."""
    state = vars(module)
    found: Optional[Verdicts] = state.get("_verdicts")
    if found is None:
        found = state["_verdicts"] = Verdicts()
    return found


class _Run(NamedTuple):
    x: torch.Tensor
    outputs: List[torch.Tensor]
    running: List[torch.Tensor]


def current() -> Optional["Trial"]:
    """The trial that this thread runs."""
    return getattr(_local, "trial", None)


def refuse_rounds() -> None:
    """Raises OwnRounds within a trial."""
    if current() is not None:
        raise OwnRounds


class Trial:
    """A trial of one forward of a module, with the arguments of one call."""

    def __init__(self, module: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self._module, self._forward, self._given = module, forward, (args, kwargs)
        self._statistics: List[Tuple[torch.Tensor, torch.Tensor]] = []
        self._next = 0
        self._checkpoints = False

    def normalize(self, x: torch.Tensor, weight: Any, bias: Any, eps: float) -> torch.Tensor:
        """Takes the place of a synchronized normalization. The n-th one of each run has the statistics of the first run's."""
        self._checkpoints = self._checkpoints or _checkpointing.context().active
        if self._next == len(self._statistics):
            dims = [dim for dim in range(x.dim()) if dim != 1]
            kind = x.dtype if x.dtype == torch.float64 else torch.float32
            var, mean = torch.var_mean(x.detach().to(kind), dims, unbiased=False)
            self._statistics.append((mean, var))
        mean, var = self._statistics[self._next]
        self._next += 1
        return _evaluation.batch_norm(x, mean, var, weight, bias, False, eps)

    def local_part(self) -> Optional[str]:
        """Returns what depends on other rows of the local batch ("output", "running statistics", "gradient"), None for nothing.

        Errors: OwnRounds; Unknown.
        """
        hooks = _saved_tensors_hooks(lambda x: x, lambda x: x) if _checkpointing.context().active else None
        try:
            with _checkpointing.unseen(), hooks or contextlib.nullcontext():
                return self._local_part()
        except (OwnRounds, Unknown):
            raise
        except Exception as error:  # Whatever a program's forward raises where it is run by itself.
            raise Unknown(f"{type(error).__name__}: {error}") from error

    def _local_part(self) -> Optional[str]:
        x = self._input()
        rows, arguments = self._rows(x)
        base = torch.nan_to_num(rows, 0.0, 1.0, -1.0)
        kept = len(rows) - len(rows) // 2
        first = self._run(base, arguments)
        again = self._run(base, arguments)
        if any(_differ(first.outputs, again.outputs)) or any(_differ(first.running, again.running)):
            raise Unknown("two runs with the same input differ")
        moved = []
        for changed in (slice(kept, None), slice(0, len(rows) - kept)):
            others = [self._run(x, arguments) for x in _changed(base, changed)]
            if any(any(_differ(first.running, other.running)) for other in others):
                return "running statistics"
            with torch.no_grad():
                differences = [_differences(first.outputs, other.outputs) for other in others]
                moved.append([torch.stack(found).any(0) for found in zip(*differences)])
        # Rows may have changed places, so what counts is how many values have changed.
        if any(int(m.sum()) * len(rows) > m.numel() * (len(rows) - kept) for m in (*moved[0], *moved[1])):
            return "output"
        return "gradient" if self._gradient_is_local(first, moved[0], kept) else None

    def _input(self) -> torch.Tensor:
        """The tensor that is normalized: the first one with rows of floating-point numbers."""
        for tensor in _batches.tensors(self._given):
            if tensor.is_floating_point() and tensor.dim() > 1:
                if type(tensor) not in _supported.PLAIN:
                    raise Unknown(f"the input is a {type(tensor).__name__}")
                return tensor
        raise Unknown("the forward is given no tensor of floating-point numbers")

    def _rows(self, x: torch.Tensor) -> Tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        """The input with at least two rows, and a function from another input to all the arguments."""
        count = len(x)

        def enough(tensor: torch.Tensor) -> torch.Tensor:
            if count >= _ROWS or tensor.dim() == 0 or len(tensor) != count:
                return tensor.detach().clone()
            if count == 0:
                return tensor.new_ones((_ROWS,) + tensor.shape[1:])
            return tensor.detach()[[0] * _ROWS]

        def arguments(value: torch.Tensor) -> Any:
            return _batches.mapped(self._given, lambda tensor: value if tensor is x else enough(tensor))

        return enough(x), arguments

    def _run(self, x: torch.Tensor, arguments: Callable[[torch.Tensor], Any]) -> _Run:
        self._next = 0
        wanted = torch.is_grad_enabled() and self._input().requires_grad
        leaf = x.clone().requires_grad_(wanted)
        # A forward may change its input in place, which a leaf does not allow.
        args, kwargs = arguments(leaf.clone())
        outer, _local.trial = current(), self
        try:
            with _unchanged(self._module), _same_randomness(self._module, x.device):
                result = self._forward(*args, **kwargs)
                found = (getattr(self._module, name, None) for name in ("running_mean", "running_var"))
                running = [v.detach().clone() for v in found if isinstance(v, torch.Tensor)]
        finally:
            _local.trial = outer
        outputs = [t for t in _batches.tensors([result]) if t.is_floating_point() and t.dim() > 1]
        if not outputs:
            raise Unknown("the forward returns no tensor of floating-point numbers")
        # Others than the first may be statistics, or a loss, that the forward gives away beside its output.
        return _Run(leaf, outputs[:1] + [t for t in outputs[1:] if len(t) == len(x)], running)

    def _gradient_is_local(self, run: _Run, moved: List[torch.Tensor], kept: int) -> bool:
        """Tells whether the gradient reaches rows that the output does not depend on."""
        if self._checkpoints or not run.x.requires_grad:
            return False
        pairs = [(y, m) for y, m in zip(run.outputs, moved) if y.requires_grad and len(y) == len(run.x)]
        if not pairs or any(bool(m[:kept].any()) for _, m in pairs):
            return False
        cotangents = []
        for y, _ in pairs:
            dy = torch.linspace(1.0, 2.0, max(1, y.numel()), dtype=torch.float32, device=y.device)[: y.numel()]
            dy = dy.to(y.dtype).reshape(y.shape).clone()
            dy[kept:] = 0.0
            cotangents.append(dy)
        (dx,) = _autograd.grad([y for y, _ in pairs], [run.x], cotangents, allow_unused=True)
        return dx is not None and any(_differ([torch.zeros_like(dx[kept:])], [dx[kept:]], float(dx.abs().max())))


def _changed(x: torch.Tensor, rows: slice) -> List[torch.Tensor]:
    """The input with other values in some rows: all above its own, and all below."""
    size = min(float(x.abs().max()), _SIZE_IN_HALF) + 1.0
    steps = torch.linspace(1.5, 3.0, max(1, x[rows].numel()), device=x.device)[: x[rows].numel()].reshape(x[rows].shape)
    made = []
    for sign in (1.0, -1.0):
        made.append(x.clone())
        made[-1][rows] = (sign * size * steps).to(x.dtype)
    return made


def _differences(some: List[torch.Tensor], others: List[torch.Tensor]) -> List[torch.Tensor]:
    """The places at which tensors differ by more than roundings."""
    if [t.shape for t in some] != [t.shape for t in others]:
        raise Unknown("the shape of the output depends on the values of the input")
    return [~_close(a.detach(), b.detach()) for a, b in zip(some, others)]


def _differ(some: List[torch.Tensor], others: List[torch.Tensor], size: Optional[float] = None) -> Iterator[bool]:
    """Tells, one after another, whether tensors differ by more than roundings. size: that of the values of which they are a part."""
    for a, b in zip(some, others):
        yield a.shape != b.shape or not bool(_close(a.detach(), b.detach(), size).all())


def _close(a: torch.Tensor, b: torch.Tensor, size: Optional[float] = None) -> torch.Tensor:
    tolerance = math.sqrt(torch.finfo(a.dtype).eps) if a.is_floating_point() else 0.0
    if size is None:
        finite = a[torch.isfinite(a)]
        size = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.isclose(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True)


# ---- What a forward may change ----


@contextlib.contextmanager
def _unchanged(module: torch.nn.Module) -> Iterator[None]:
    """A context in which a forward's changes to the module and those within it are made to copies, and dropped in the end.

    Hooks of the modules within it are left out, since programs gather values by them.
    """
    saved = []
    for m in module.modules():
        state = vars(m)
        # Replicas share their verdicts.
        kept = {k: v for k, v in state.items() if isinstance(v, (dict, list, set)) and not isinstance(v, Verdicts)}
        saved.append((m, dict(state), {name: container.copy() for name, container in kept.items()}))
    try:
        for m, before, _ in saved:
            for name, value in before.items():
                if name.endswith("_hooks") and name.startswith(("_forward", "_backward")) and m is not module:
                    value.clear()
                elif isinstance(value, torch.Tensor):
                    vars(m)[name] = _copied(value)
            buffers: Dict[str, Any] = before["_buffers"]
            buffers.update({name: _copied(buffer) for name, buffer in buffers.items()})
        yield
    finally:
        for m, before, contents in saved:
            vars(m).clear()
            vars(m).update(before)
            for name, content in contents.items():
                _refill(before[name], content)


def _copied(value: Any) -> Any:
    plain = type(value) is torch.Tensor and not value.requires_grad
    return value.clone() if plain else value


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


@contextlib.contextmanager
def _same_randomness(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """A context after which random generators stand where they stood before it."""
    own = [v for m in module.modules() for v in vars(m).values() if isinstance(v, torch.Generator)]
    states: List[Tuple[Callable[[Any], Any], Any]] = [(generator.set_state, generator.get_state()) for generator in own]
    states.append((torch.set_rng_state, torch.get_rng_state()))
    states += [(random.setstate, random.getstate()), (np.random.set_state, np.random.get_state())]
    if device.type == "cuda":
        states.append((lambda state: torch.cuda.set_rng_state(state, device), torch.cuda.get_rng_state(device)))
    try:
        yield
    finally:
        for restore, state in states:
            restore(state)
