"""syncbn.mmengine: the registry, and the runner's converters."""

import mmcv.cnn
import mmengine.model
import mmengine.runner.runner
import pytest
import torch

import syncbn.mmengine
import syncbn.torch

BOUND = 1e-9


def test_two_workers_train_as_one_process_on_the_whole_batch(example):
    (difference,) = example.torchrun("mmengine/train.py")
    assert difference < BOUND


def test_a_single_process_reverts(example):
    """No worker is made: there is no master at that address."""
    (difference,) = example("mmengine/train.py", SYNCBN_TARGET="127.0.0.1:1", SYNCBN_JOIN_TIMEOUT=0.1)
    assert difference < BOUND


def test_the_registry_has_the_layer():
    name, layer = mmcv.cnn.build_norm_layer(dict(type="SyncBN", requires_grad=False), 4, postfix=1)
    assert name == "bn1" and type(layer) is syncbn.torch.SyncBatchNorm and not layer.weight.requires_grad


@pytest.mark.parametrize("holder", [mmengine.model, mmengine.runner.runner])
def test_the_converters(holder):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 3))
    converted = holder.convert_sync_batchnorm(model, "syncbn")
    assert isinstance(converted[0], syncbn.torch.SyncBatchNorm)
    assert type(holder.revert_sync_batchnorm(converted)[0]) is torch.nn.BatchNorm2d
    theirs = holder.convert_sync_batchnorm(model)
    assert type(theirs[0]) is torch.nn.SyncBatchNorm
    assert not isinstance(holder.revert_sync_batchnorm(theirs)[0], torch.nn.SyncBatchNorm)
    with pytest.raises(ValueError, match="nothing"):
        holder.convert_sync_batchnorm(model, "nothing")
