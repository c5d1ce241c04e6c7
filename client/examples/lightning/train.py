"""Lightning: the Trainer synchronizes batch normalization through the service, over batches of different sizes.

    python client/examples/lightning/train.py [--strategy ddp_spawn]
"""

import argparse
import pathlib
import sys

import lightning.pytorch as pl
import torch

import syncbn.lightning

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import whole_batch


class Module(pl.LightningModule):
    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size, self.model = world_size, whole_batch.make_model()

    def training_step(self, batch: whole_batch.Batch, index: int) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=whole_batch.LEARNING_RATE)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        own = whole_batch.batches(self.global_rank, self.world_size)
        return torch.utils.data.DataLoader(own, batch_size=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=arguments.workers,
        strategy=arguments.strategy,
        sync_batchnorm=True,
        plugins=[syncbn.lightning.SyncBatchNorm()],
        callbacks=[syncbn.lightning.WeightedBatches()],
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module(arguments.workers)
    trainer.fit(module)
    assert type(module.model[1]) is torch.nn.BatchNorm2d  # Reverted.
    if trainer.is_global_zero:
        whole_batch.compare(module.model, arguments.workers, f"Lightning, {arguments.strategy}")


if __name__ == "__main__":
    main()
