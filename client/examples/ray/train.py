"""Ray Train: convert the model before `prepare_model`.

    python client/examples/ray/train.py
"""

import pathlib
import sys
import tempfile
from typing import Any, Dict

import ray.train
import ray.train.torch
import torch

import syncbn.torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import whole_batch
import local_cluster

WORKERS = 2


def loop(config: Dict[str, Any]) -> None:
    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    model = syncbn.torch.convert_sync_batchnorm(whole_batch.make_model())
    parallel = syncbn.torch.weighted_ddp(ray.train.torch.prepare_model(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=whole_batch.LEARNING_RATE)
    for x, y in whole_batch.batches(rank, WORKERS):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(parallel(x), y).backward()
        optimizer.step()
    if rank == 0:
        torch.save(syncbn.torch.revert_sync_batchnorm(model), config["file"])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, local_cluster.start({"num_cpus": WORKERS + 1}):
        file = f"{folder}/model.pt"
        trainer = ray.train.torch.TorchTrainer(
            loop,
            train_loop_config={"file": file},
            scaling_config=ray.train.ScalingConfig(num_workers=WORKERS),
            run_config=ray.train.RunConfig(storage_path=folder),
        )
        trainer.fit()
        whole_batch.compare(torch.load(file, weights_only=False), WORKERS, "Ray Train")


if __name__ == "__main__":
    main()
