"""MMEngine and MMCV: a config whose norm_cfg names SyncBN, as MMSegmentation's default does.

    torchrun --nproc_per_node 2 client/examples/mmengine/train.py
"""

import os
import pathlib
import sys
import tempfile

import mmcv.cnn
import torch
import torch.distributed
from mmengine.model import BaseModel
from mmengine.runner import Runner

import syncbn.mmengine
import syncbn.torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import whole_batch


class Classifier(BaseModel):
    """The layers and the start of `whole_batch.make_model()`, with MMCV's bricks."""

    def __init__(self) -> None:
        super().__init__()
        norm = dict(type="SyncBN")
        self.layers = torch.nn.Sequential(
            mmcv.cnn.ConvModule(3, 8, 3, norm_cfg=norm),
            mmcv.cnn.ConvModule(8, 8, 3, bias=True, norm_cfg=norm),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(8, whole_batch.CLASSES),
        ).double()
        for own, start in zip(self.state_dict().values(), whole_batch.make_model().state_dict().values()):
            own.copy_(start)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, mode: str = "tensor") -> dict:
        return {"loss": torch.nn.functional.cross_entropy(self.layers(inputs), labels)}


def main() -> None:
    torch.set_num_threads(1)
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    if workers > 1:
        torch.distributed.init_process_group("gloo")  # On GPUs, the runner does so itself.
    rank = int(os.environ.get("RANK", "0"))
    batches = [{"inputs": x, "labels": y} for x, y in whole_batch.batches(rank, workers)]
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            model=Classifier(),
            work_dir=folder,
            train_dataloader=torch.utils.data.DataLoader(batches, batch_size=None),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=whole_batch.LEARNING_RATE)),
            default_hooks=dict(checkpoint=None, logger=None, sampler_seed=None),
            launcher="pytorch" if workers > 1 else "none",
            cfg=dict(model_wrapper_cfg=dict(device_ids=None)) if workers > 1 else dict(),  # On a CPU.
            log_level="ERROR",
        )
        if workers > 1:
            syncbn.torch.weighted_ddp(runner.model)
        runner.train()
    model = runner.model.module if workers > 1 else runner.model
    if rank == 0:
        whole_batch.compare(model, workers, "MMEngine")


if __name__ == "__main__":
    main()
