"""Activation checkpointing: recognising the second forward of a segment.

torch.utils.checkpoint runs a segment's forward twice: once in the forward pass, and again during backward. The second
run must neither begin another round, which would wait for workers that do not checkpoint, nor update running
statistics. torch has no public sign for it, so the Python stack is read: a frame of torch.utils.checkpoint tells that a
segment runs, which half it is, and an object that both halves share. The first half leaves its forward passes with that
object, in the order of its calls; the second half takes them from there. A segment within a segment has its first half
again in the outer one's second half, so what is taken from there is left with the inner one.

    half       use_reentrant=True            use_reentrant=False, torch < 2.1    torch >= 2.1
    first      CheckpointFunction.forward    _checkpoint_without_reentrant       whichever has the generator `gen`
    second     CheckpointFunction.backward   unpack                              unpack_hook
    shared     ctx                           storage                             the _CheckpointFrame

torch.distributed._composable.checkpoint starts such a generator in a hook, so that no frame of it is left while the first
half runs: it is found with the modules on the stack.
"""

import contextlib
import sys
from types import FrameType
from typing import Any, Callable, ContextManager, Dict, List, NamedTuple, Optional

import torch
from torch.utils import _python_dispatch

from syncbn.torch import _supported

_MODULE = "torch.utils.checkpoint"
_COMPOSABLE_MODULE = "torch.distributed._composable.checkpoint_activation"
_ATTRIBUTE = "_syncbn_segment"
_AROUND = "_syncbn_around"
_CALL = getattr(torch.nn.Module, "_call_impl").__code__
# The hooks through which autograd saves tensors, None where there are none.
_saving_hooks: Any = getattr(getattr(getattr(torch, "_C"), "_autograd"), "_top_saved_tensors_default_hooks", lambda _: ())
_graph_task_id = getattr(getattr(torch, "_C"), "_current_graph_task_id", lambda: None)


class _Segment:
    """The forward passes of one checkpointed segment, by layer object, in the order of calls."""

    def __init__(self) -> None:
        self._passes: Dict[int, List[Any]] = {}
        self._next: Dict[int, int] = {}
        self._task: Any = None

    def record(self, layer: object, forward: Any) -> None:
        self._passes.setdefault(id(layer), []).append(forward)

    def replay(self, layer: object) -> Any:
        passes = self._passes.get(id(layer))
        if not passes:
            raise RuntimeError(
                "a checkpointed segment runs a SyncBatchNorm in its second forward that it did not run in its first"
            )
        task = _graph_task_id()
        if task != self._task:  # Another backward pass. It begins anew even if the last one stopped early.
            self._task, self._next = task, {}
        position = self._next.get(id(layer), 0)
        self._next[id(layer)] = position + 1
        return passes[position % len(passes)]


class _Site(NamedTuple):
    owner: Any
    second_half: bool
    reentrant: bool


def _site(frame: FrameType) -> Optional[_Site]:
    """Reads what a frame of torch.utils.checkpoint says, if anything."""
    name, values = frame.f_code.co_name, frame.f_locals
    if name in ("forward", "backward") and "ctx" in values:
        return _Site(values["ctx"], name == "backward", True)
    if name == "_checkpoint_without_reentrant" and "storage" in values:
        return _Site(values["storage"], False, False)
    if name == "unpack" and "storage" in values:
        return _Site(values["storage"], True, False)
    if "gen" in values:
        return _generators_site(values["gen"])
    if name == "unpack_hook" and "frame" in values:
        return _Site(values["frame"], True, False)
    return None


def _generators_site(generator: Any) -> Optional[_Site]:
    """The first half of the segment that a generator of torch.utils.checkpoint goes around."""
    frame = getattr(generator, "gi_frame", None)
    owner = None if frame is None else frame.f_locals.get("new_frame")
    return None if owner is None else _Site(owner, False, False)


def _composed_site(composable: Any, module: torch.nn.Module) -> Optional[_Site]:
    """The first half of the segment that a running module is, by torch.distributed._composable.checkpoint."""
    if not module._forward_pre_hooks:
        return None
    return _generators_site(getattr(composable.checkpoint.state(module), "_ac_generator", None))


class Context:
    """The checkpointed segments that the caller runs in, innermost first."""

    def __init__(self, sites: List[_Site]) -> None:
        self._sites = sites
        self.active = bool(sites)
        # True if gradients are off now, but a second half with gradients will follow.
        self.gradient_follows = any(site.reentrant and not site.second_half for site in sites)

    def replay(self, layer: object) -> Any:
        """The forward pass of the first half if this is a second half, else None."""
        for site in self._sites:
            if site.second_half:
                return self._segment(site).replay(layer)
        return None

    def record(self, layer: object, forward: Any) -> None:
        """Leaves a forward pass with every segment whose first half this is."""
        for site in self._sites:
            if not site.second_half:
                self._segment(site).record(layer, forward)

    def run_second_halves_by(self, around: Callable[[Any], Any]) -> None:
        """Lets `around(function)` take the place of the function that the second half of each segment calls, once for each.

        Errors: RuntimeError where torch leaves no place for that.
        """
        for site in self._sites:
            if not site.second_half and not getattr(site.owner, _AROUND, False):
                name = next((name for name in ("run_function", "recompute_fn") if hasattr(site.owner, name)), None)
                if name is None:
                    raise RuntimeError(
                        "a layer's own forward checkpoints a part of itself, which needs use_reentrant=True in this version of "
                        "torch; or checkpoint the call of the layer, from outside"
                    )
                setattr(site.owner, name, around(getattr(site.owner, name)))
                setattr(site.owner, _AROUND, True)

    @staticmethod
    def _segment(site: _Site) -> _Segment:
        segment = getattr(site.owner, _ATTRIBUTE, None)
        if segment is None:
            segment = _Segment()
            setattr(site.owner, _ATTRIBUTE, segment)
        return segment


_NO_CHECKPOINT = Context([])


def context(within: Any = None) -> Context:
    """The caller's. within: the code of a function: the segments that have begun since its innermost call."""
    module = sys.modules.get(_MODULE)
    if module is None:  # Nobody has imported it: no frame is of it.
        return _NO_CHECKPOINT
    namespace, sites = module.__dict__, []
    composable = sys.modules.get(_COMPOSABLE_MODULE)
    if composable is not None and _saving_hooks(False) is None:  # Its segments save tensors by hooks.
        composable = None
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None and frame.f_code is not within:
        site = None
        if frame.f_globals is namespace:
            site = _site(frame)
        elif composable is not None and frame.f_code is _CALL:
            site = _composed_site(composable, frame.f_locals["self"])
        if site is not None:
            sites.append(site)
        frame = frame.f_back
    return Context(sites) if sites else _NO_CHECKPOINT


# None in torch before 2, which has no selective checkpointing.
_disabled_modes: Any = getattr(_python_dispatch, "_disable_current_modes", None)


def unseen() -> ContextManager[Any]:
    """A context for operations that only one half of a segment makes, or that write to memory.

    Selective checkpointing (create_selective_checkpoint_contexts) hands the results of the first half's operations to those
    of the second half: the n-th of an operation to the n-th. Operations that only one half makes would shift the numbers, so
    that others get wrong results; and memory that is written later is no result.
    """
    for i in range(_supported.dispatch_modes()):
        mode: Any = getattr(torch, "_C")._get_dispatch_stack_at(i)
        if type(mode).__module__ == _MODULE and _disabled_modes is not None:
            disabled: ContextManager[Any] = _disabled_modes()
            return disabled
    return contextlib.nullcontext()
