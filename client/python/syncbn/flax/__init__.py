"""Batch normalization over all workers for Flax: the layers of Linen and of NNX, with Flax's variables and arguments.

    norm = syncbn.flax.BatchNorm(momentum=0.9)                    # Linen; syncbn.flax.linen.BatchNorm is the same.
    model = syncbn.flax.nnx.convert_sync_batchnorm(model)         # NNX.
"""

from syncbn.flax import linen, nnx
from syncbn.flax.linen import BatchNorm

__all__ = ["BatchNorm", "linen", "nnx"]
