"""Synchronized batch normalization in MONAI: importing this module adds "syncbn" to the factory of normalizations.

    import syncbn.monai
    model = monai.networks.nets.UNet(..., norm="syncbn")             # Or norm=("syncbn", {"eps": 1e-3}).
"""

from monai.networks.layers.factories import Norm

from syncbn.torch.modules import SyncBatchNorm

__all__ = ["SyncBatchNorm"]

Norm.add_factory_class("syncbn", SyncBatchNorm, "Batch normalization over all workers, by syncbn.")
