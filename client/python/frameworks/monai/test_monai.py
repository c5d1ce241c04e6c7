"""syncbn.monai: the factory of normalizations."""

import monai.networks.layers.factories as factories
import torch
from monai.networks.layers.utils import get_norm_layer

import syncbn.monai
import syncbn.torch

BOUND = 1e-9


def test_two_workers_train_as_one_process_on_the_whole_batch(example):
    (difference,) = example.torchrun("monai/train.py")
    assert difference < BOUND


def test_the_factory_makes_the_layer():
    assert factories.Norm["syncbn", 3] is syncbn.torch.SyncBatchNorm
    layer = get_norm_layer(("syncbn", {"eps": 1e-3}), spatial_dims=2, channels=5)
    assert type(layer) is syncbn.torch.SyncBatchNorm and (layer.num_features, layer.eps) == (5, 1e-3)
    assert factories.Norm["syncbatch", 3] is torch.nn.SyncBatchNorm  # Theirs stays.
