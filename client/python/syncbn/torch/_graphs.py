"""Rounds and torch.compile, which cannot trace them."""

import inspect
from typing import Any

import torch


def outside_of_graphs(function: Any) -> Any:
    """A decorator: torch.compile breaks its graph at the function, since a round is no operation that it could trace.

    A backward pass needs it as well: where a whole training step is compiled, the compiler is shown what autograd calls.
    """
    disable: Any = getattr(getattr(torch, "compiler", None), "disable", None)
    if disable is None:
        return function
    if "reason" not in inspect.signature(disable).parameters:
        return disable(function)
    return disable(function, reason="a synchronized layer in training waits for other workers; do not use fullgraph")
