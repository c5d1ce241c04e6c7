"""syncbn.lightning in the Trainer, and Fabric by its recipe."""

import copy

import lightning.pytorch as pl
import pytest
import torch

import syncbn.lightning
import syncbn.torch

BOUND = 1e-9


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_two_workers_train_as_one_process_on_the_whole_batch(example, strategy):
    (difference,) = example("lightning/train.py", "--strategy", strategy)
    assert difference < BOUND


def test_fabric(example):
    (difference,) = example("lightning/fabric.py")
    assert difference < BOUND


def test_the_plugin_reverts_what_it_has_converted():
    plugin = syncbn.lightning.SyncBatchNorm(eps_mode="clamp")
    own = syncbn.torch.SyncBatchNorm(3, activation="relu")  # It has no counterpart to be reverted to.
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), own)
    state = copy.deepcopy(model.state_dict())
    assert plugin.apply(model) is model
    assert isinstance(model[0], syncbn.torch.SyncBatchNorm) and model[0].eps_mode == "clamp"
    assert plugin.revert(model) is model
    assert type(model[0]) is torch.nn.BatchNorm1d and model[1] is own and type(own) is syncbn.torch.SyncBatchNorm
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_single_device_leaves_the_model_as_it_is(tmp_path):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.BatchNorm1d(3)

        def training_step(self, batch, index):
            assert type(self.layer) is torch.nn.BatchNorm1d
            return self.layer(batch).square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        sync_batchnorm=True,
        plugins=[syncbn.lightning.SyncBatchNorm()],
        callbacks=[syncbn.lightning.WeightedBatches()],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader([torch.randn(4, 3)], batch_size=None))
    assert trainer.global_step == 1 and module.layer.num_batches_tracked == 1
