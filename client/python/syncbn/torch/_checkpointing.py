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
"""

import sys
from types import FrameType
from typing import Any, Dict, List, NamedTuple, Optional

import torch

_MODULE = "torch.utils.checkpoint"
_ATTRIBUTE = "_syncbn_segment"
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
    if getattr(values.get("gen"), "gi_frame", None) is not None:
        owner = values["gen"].gi_frame.f_locals.get("new_frame")
        return None if owner is None else _Site(owner, False, False)
    if name == "unpack_hook" and "frame" in values:
        return _Site(values["frame"], True, False)
    return None


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

    @staticmethod
    def _segment(site: _Site) -> _Segment:
        segment = getattr(site.owner, _ATTRIBUTE, None)
        if segment is None:
            segment = _Segment()
            setattr(site.owner, _ATTRIBUTE, segment)
        return segment


_NO_CHECKPOINT = Context([])


def context() -> Context:
    """The caller's."""
    module = sys.modules.get(_MODULE)
    if module is None:  # Nobody has imported it: no frame is of it.
        return _NO_CHECKPOINT
    namespace, sites = module.__dict__, []
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is namespace:
            site = _site(frame)
            if site is not None:
                sites.append(site)
        frame = frame.f_back
    return Context(sites) if sites else _NO_CHECKPOINT
