"""Lockstep without an exchange: workers wait for each other where synchronized batch normalization would make them.

A step with these waits shows what the waiting costs by itself, whatever exchanges the statistics: the slowest worker of
each part of a step sets the pace.
"""

import os

import numpy as np
import torch

_STRIDE = 8  # Counters stand in cache lines of their own.


class Barrier:
    """A point that processes pass together, by counters in a file that all of them map.

    A process that waits yields its processor, since on a machine with fewer cores than workers the others need it.
    """

    def __init__(self, path: str, rank: int, world_size: int) -> None:
        """Maps a file of 64 * world_size bytes, zeros at first."""
        self._counts = np.memmap(path, np.int64, "r+", shape=(world_size * _STRIDE,))[::_STRIDE]
        self._rank = rank
        self._passed = 0

    def wait(self) -> None:
        """Returns once all processes have called it as often as this one."""
        self._passed += 1
        self._counts[self._rank] = self._passed
        while self._counts.min() < self._passed:
            os.sched_yield()


class _Meet(torch.autograd.Function):
    """The identity, at which workers meet in the forward pass and in the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, barrier: Barrier) -> torch.Tensor:
        ctx.barrier = barrier
        barrier.wait()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        ctx.barrier.wait()
        return gradient, None


class _MeetAfter(torch.nn.Module):
    """A layer, and behind it a point where workers meet."""

    def __init__(self, layer: torch.nn.Module, barrier: Barrier) -> None:
        super().__init__()
        self.layer = layer
        self._barrier = barrier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Meet.apply(self.layer(x), self._barrier)


def wait_at_batch_norms(model: torch.nn.Module, barrier: Barrier) -> torch.nn.Module:
    """Makes workers meet at each BatchNorm2d of a model, which it changes. Returns the model."""
    for name, child in model.named_children():
        if isinstance(child, torch.nn.BatchNorm2d):
            setattr(model, name, _MeetAfter(child, barrier))
        else:
            wait_at_batch_norms(child, barrier)
    return model
