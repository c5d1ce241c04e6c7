"""Models of timm, torchvision, segmentation_models_pytorch and ultralytics: convert, and train.

    torchrun --nproc_per_node 2 client/examples/models/train.py timm:efficientnet_b0
    torchrun --nproc_per_node 2 client/examples/models/train.py torchvision:resnet18
    torchrun --nproc_per_node 2 client/examples/models/train.py smp:Unet
    torchrun --nproc_per_node 2 client/examples/models/train.py ultralytics:yolov8n.yaml
"""

import pathlib
import sys
from typing import Any, List

import torch
import torch.distributed

import syncbn.torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import whole_batch


def make_model(name: str) -> torch.nn.Module:
    """A new model of a library, LIBRARY:MODEL, in float64; the same at every call."""
    torch.manual_seed(1)
    library, _, kind = name.partition(":")
    if library == "timm":
        import timm

        return timm.create_model(kind, num_classes=7, drop_rate=0.0, drop_path_rate=0.0).double()
    if library == "torchvision":
        import torchvision

        return torchvision.models.get_model(kind).double()
    if library == "smp":
        import segmentation_models_pytorch

        return segmentation_models_pytorch.create_model(kind, "tu-regnetx_002", encoder_weights=None).double()
    if library == "ultralytics":
        from ultralytics.nn.tasks import DetectionModel

        return DetectionModel(kind, verbose=False).double()
    raise SystemExit(f"{name} names none of timm, torchvision, smp and ultralytics")


def tensors(output: Any) -> List[torch.Tensor]:
    """The tensors in what a model returns: a tensor, or lists, tuples and dictionaries of them."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors(value)]


def train(model: torch.nn.Module, x: torch.Tensor, scale: float) -> None:
    """One step. The loss is a sum over the images, times `scale`."""
    loss = sum(output.square().sum() / output[0].numel() for output in tensors(model(x)))
    (loss * scale).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    sizes = whole_batch.sizes(world_size)
    x = torch.randn(sum(sizes), 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model = syncbn.torch.convert_sync_batchnorm(make_model(sys.argv[1]).train())
    # DistributedDataParallel divides by the number of workers.
    train(torch.nn.parallel.DistributedDataParallel(model), x.split(sizes)[rank], world_size / len(x))
    if rank == 0:
        whole = make_model(sys.argv[1]).train()
        train(whole, x, 1 / len(x))
        whole_batch.report(model, whole, world_size, sys.argv[1], steps=1)


if __name__ == "__main__":
    main()
