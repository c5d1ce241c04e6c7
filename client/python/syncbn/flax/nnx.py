"""flax.nnx.BatchNorm over all workers."""

import threading
from typing import Any, Optional

from flax import nnx

from syncbn import _names
from syncbn.core import Worker
from syncbn.flax import _training

_local = threading.local()


def _numbered() -> str:
    """The name of a layer that is made without one: workers that build alike name alike."""
    _local.layers = getattr(_local, "layers", 0) + 1
    return f"nnx_batch_norm_{_local.layers - 1}"


class BatchNorm(nnx.BatchNorm):
    """flax.nnx.BatchNorm whose statistics in training are those of the batches of all workers.

    The variables, and the arguments that are not named here, are Flax's: a checkpoint of one fits the other. Evaluation is
    Flax's own, without a round. In training, every worker calls and differentiates the same layers, each as often as the
    others; a batch may be empty.

    Args:
      worker: default `syncbn.default_worker()`, when the layer is traced.
      layer: the same name at every worker. Default: numbered, for layers that all workers make in the same order.
        `convert_sync_batchnorm` names by path.
      axis: one axis.
      axis_name: the axis of vmap whose elements belong to one batch. Those of pmap and shard_map are refused: a process is
        one worker, and jit may spread its batch over its devices.
      use_fast_variance: ignored: squares are summed about the mean.

    Raises: as `syncbn.jax.sync_batch_norm`; ValueError for `axis_index_groups`.
    """

    def __init__(
        self, num_features: int, *, worker: Optional[Worker] = None, layer: Optional[str] = None, **arguments: Any
    ) -> None:
        super().__init__(num_features, **arguments)
        _training.check(worker, self.axis, self.axis_index_groups)
        self.worker, self.layer, self.numbered = worker, layer or _numbered(), layer is None

    def __call__(self, x: Any, use_running_average: Optional[bool] = None, *, mask: Any = None) -> Any:
        """Normalizes x.

        Args:
          use_running_average: whether to take the running statistics. Default: the layer's attribute.
          mask: True where a position counts; it broadcasts to x, and is the same for all channels.
        Returns: an array of x's shape.
        """
        local = self.use_running_average if use_running_average is None else use_running_average
        if local or local is None:  # Flax says what is wrong with None.
            return super().__call__(x, local, mask=mask)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        statistics = self.mean[...], self.var[...]
        x, _, _, scale, bias = self.promote_dtype((x, *statistics, scale, bias), dtype=self.dtype)
        y, new = _training.normalize(self, x, scale, bias, statistics, mask, self.layer, self.dtype)
        self.mean[...], self.var[...] = new
        return y


def convert_sync_batchnorm(model: Any, worker: Optional[Worker] = None, prefix: str = "") -> Any:
    """Turns every flax.nnx.BatchNorm of a model into one of this module, in place, with its variables.

    Args:
      worker: that of the layers; default `syncbn.default_worker()`.
      prefix: of the layers' names, which are their paths in the model. Layers that have been given a name keep it.
    Returns: the model.
    Raises: TypeError for a layer of a class that is derived from Flax's, before anything is changed.
    """
    found = [(path, layer) for path, layer in nnx.iter_modules(model) if isinstance(layer, nnx.BatchNorm)]
    for path, layer in found:
        if not isinstance(layer, BatchNorm) and type(layer) is not nnx.BatchNorm:
            kind, place = type(layer).__qualname__, ".".join(map(str, path))
            raise TypeError(f"layer {place} is a {kind}, which adds to flax.nnx.BatchNorm; a plain one is needed")
        _training.check(worker, layer.axis, layer.axis_index_groups)
    for path, layer in found:
        if type(layer) is nnx.BatchNorm:
            layer.__class__ = BatchNorm
            layer.worker, layer.numbered = worker, True
        if layer.numbered:
            layer.layer = _names.derived(prefix + (".".join(map(str, path)) or "batch_norm"))
        layer.worker = worker if layer.worker is None else layer.worker
    return model
