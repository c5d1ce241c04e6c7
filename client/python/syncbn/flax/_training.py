"""Training, as far as the layers of Linen and of NNX have it in common."""

from typing import Any, Optional, Tuple

import jax.numpy as jnp

from syncbn import _arguments
from syncbn import jax as sync
from syncbn.core import Worker


def check(worker: Any, axis: Any, axis_index_groups: Any) -> None:
    """Refuses what Flax's layers take and these do not."""
    if worker is not None and not isinstance(worker, Worker):
        raise TypeError(f"worker is {worker!r}; it has to be a syncbn.Worker")
    if not isinstance(axis, int):
        raise TypeError(f"axis is {axis!r}; it has to be an integer: the workers merge statistics of one channel axis")
    if axis_index_groups is not None:
        raise ValueError(
            f"axis_index_groups is {axis_index_groups!r}; it has to be None: for groups of workers, give each a "
            "syncbn.Worker(group=...)"
        )


def normalize(
    module: Any, x: Any, scale: Any, bias: Any, statistics: Tuple[Any, Any], mask: Any, layer: str, dtype: Optional[Any]
) -> Tuple[Any, Any]:
    """y of the type that Flax's layer returns, and the new running statistics, as Flax updates them."""
    x = jnp.asarray(x)
    given = [value.dtype for value in (x, scale, bias) if value is not None]
    result = jnp.result_type(*given) if dtype is None else jnp.dtype(dtype)
    y, new = sync.sync_batch_norm(
        x.astype(jnp.promote_types(x.dtype, result)),
        scale,
        bias,
        sync.RunningStatistics(*statistics),
        layer=layer,
        worker=module.worker,
        momentum=1.0 - _arguments.number("momentum", module.momentum),  # A number also where it is an array, under jit.
        eps=module.epsilon,
        axis=module.axis,
        mask=None if mask is None else jnp.asarray(mask).astype(bool),
        biased_running_variance=True,
        axis_name=module.axis_name,
    )
    return y.astype(result), new
