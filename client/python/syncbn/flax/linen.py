"""flax.linen.BatchNorm over all workers."""

from typing import Any, Optional

import flax.linen
import jax.numpy as jnp

from syncbn import _names
from syncbn.flax import _training


class BatchNorm(flax.linen.BatchNorm):
    """flax.linen.BatchNorm whose statistics in training are those of the batches of all workers.

    The variables, and the arguments that are not named here, are Flax's: a checkpoint of one fits the other. Initialization
    and evaluation are Flax's own, without a round. In training, every worker calls and differentiates the same layers, each
    as often as the others; a batch may be empty.

    Args:
      worker: default `syncbn.default_worker()`, when the module is traced.
      layer: the same name at every worker. Default: the module's path, such as "ResNet_0/BatchNorm_3".
      axis: one axis.
      axis_name: the axis of vmap whose elements belong to one batch. Those of pmap and shard_map are refused: a process is
        one worker, and jit may spread its batch over its devices.
      use_fast_variance: ignored: squares are summed about the mean.

    Raises: as `syncbn.jax.sync_batch_norm`; ValueError for `axis_index_groups`.
    """

    worker: Any = None
    layer: Optional[str] = None

    def __call__(self, x: Any, use_running_average: Optional[bool] = None, *, mask: Any = None) -> Any:
        """Normalizes x.

        Args:
          use_running_average: whether to take the running statistics. Default: the module's attribute.
          mask: True where a position counts; it broadcasts to x, and is the same for all channels.
        Returns: an array of x's shape.
        """
        _training.check(self.worker, self.axis, self.axis_index_groups)
        local = flax.linen.merge_param("use_running_average", self.use_running_average, use_running_average)
        if local or self.is_initializing():
            return super().__call__(x, use_running_average, mask=mask)
        return self._train(x, mask)

    @flax.linen.compact
    def _train(self, x: Any, mask: Any) -> Any:
        shape, kind = (x.shape[self.axis],), self.param_dtype
        kept = jnp.float32 if getattr(self, "force_float32_reductions", True) else kind
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(shape, kept))
        var = self.variable("batch_stats", "var", lambda: jnp.ones(shape, kept))
        scale = self.param("scale", self.scale_init, shape, kind) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, kind) if self.use_bias else None
        name = self.layer or _names.derived("/".join(self.path)) or "batch_norm"
        y, new = _training.normalize(self, x, scale, bias, (mean.value, var.value), mask, name, self.dtype)
        mean.value, var.value = new
        return y
