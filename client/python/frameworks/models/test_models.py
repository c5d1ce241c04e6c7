"""Models of libraries that leave the choice of the normalization to the trainer."""

import pytest

BOUND = 1e-9


@pytest.mark.parametrize("name", ["timm:efficientnet_b0", "torchvision:resnet18", "smp:Unet", "ultralytics:yolov8n.yaml"])
def test_two_workers_train_as_one_process_on_the_whole_batch(example, name):
    (difference,) = example.torchrun("models/train.py", name)
    assert difference < BOUND
