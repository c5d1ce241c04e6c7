"""Layers as a worker declares them to its group."""

import ctypes
import threading
from typing import Any, ContextManager, Dict, Optional, Tuple

from syncbn import _arguments, _library, errors
from syncbn._library import call, lib, text


class Declares:
    """The part of a worker that makes layers known, and names those that have no name."""

    def __init__(self) -> None:
        self._layers: Dict[str, Tuple[Any, ...]] = {}  # As declared last, by name.
        self._changed_layers: Dict[str, str] = {}
        self._unnamed_layers = 0
        self._naming = threading.RLock()  # A signal's handler may name a layer, too.

    def handle(self) -> ContextManager[int]:
        """The worker's C handle, kept alive for the length of a `with` block."""
        raise NotImplementedError

    def declare_layer(
        self,
        name: str,
        channels: int,
        *,
        eps: float = 1e-5,
        eps_mode: str = "add",
        momentum: Optional[float] = 0.1,
        numeric: str = "refuse",
        biased_running_variance: bool = False,
    ) -> None:
        """Makes a batch-norm layer known. What is known already costs nothing.

        Args:
          eps_mode: "add" (1/sqrt(var+eps)) or "clamp" (1/sqrt(max(var,eps))).
          momentum: for the master's own running statistics; None: the cumulative average.
          numeric: "refuse" fails rounds with NaN or infinity; "propagate" lets them flow.
        """
        declared = (channels, eps, eps_mode, momentum, numeric, biased_running_variance)
        known = self._layers.get(name)
        if known == declared:
            return
        channels = _arguments.integer("channels", channels, 1, _arguments.MOST_CHANNELS)
        eps = _arguments.not_negative("eps", eps)
        momentum = None if momentum is None else _arguments.number("momentum", momentum)
        options = _library.LayerOptions(
            name=text(_arguments.text("the layer's name", name)),
            channels=channels,
            kind=_library.LAYER_BATCH_NORM,
            eps=eps,
            eps_mode=_arguments.choice("eps_mode", eps_mode, _library.EPS_MODES),
            numeric_policy=_arguments.choice("numeric", numeric, _library.NUMERIC_POLICIES),
            has_momentum=momentum is not None,
            momentum=momentum or 0.0,
            biased_running_variance=_arguments.truth("biased_running_variance", biased_running_variance),
        )
        with self.handle() as handle:
            call(lib.syncbn_worker_declare_layer, handle, ctypes.byref(options))
        self._layers[name] = declared
        if known is not None:
            self._changed_layers[name] = _difference(known, declared)

    def _declare_width(self, name: str, channels: int) -> None:
        """Declares a known layer anew, alike but for its channels."""
        _, eps, eps_mode, momentum, numeric, biased = self._layers[name]
        self.declare_layer(
            name,
            channels,
            eps=eps,
            eps_mode=eps_mode,
            momentum=momentum,
            numeric=numeric,
            biased_running_variance=biased,
        )

    def _advise(self, error: errors.LayerMismatch) -> None:
        """Adds what may have led to a mismatch, where this worker itself has used the name for two layers."""
        change = self._changed_layers.get(error.layer)
        if change is not None:
            error.add_note_to_message(
                f"this worker has used the name {error.layer!r} for two layers ({change}): if they are two models, tell them "
                "apart with convert_sync_batchnorm(..., prefix=), or with names of their own"
            )

    def name_unnamed_layer(self) -> str:
        """A name for a layer that has none: numbered by first use, so that workers that run alike name alike."""
        with self._naming:
            self._unnamed_layers += 1
            return f"sync_batch_norm_{self._unnamed_layers - 1}"


def _difference(before: Tuple[Any, ...], after: Tuple[Any, ...]) -> str:
    """Between two declarations of one name: "channels 16 and 32"."""
    names = ("channels", "eps", "eps_mode", "momentum", "numeric", "biased_running_variance")
    pairs = [f"{name} {a} and {b}" for name, a, b in zip(names, before, after) if a != b]
    return ", ".join(pairs)
