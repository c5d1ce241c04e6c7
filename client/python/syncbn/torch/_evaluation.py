"""Normalization without other workers, by torch's own operation, so that whatever handles that one handles this:
tracing, compiling, exporting, CUDA graphs, subclasses of Tensor, torch.func, any number of derivatives."""

import itertools
from typing import Any, FrozenSet, Optional, Tuple

import torch

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _mixes() -> FrozenSet[Tuple[Any, Any]]:
    """The types of inputs and vectors that this torch takes together on a CPU, by trying."""
    taken = set()
    for kind, vectors in itertools.product(_TYPES, _TYPES):
        with torch.enable_grad():
            x = torch.ones(2, 1, dtype=kind, device="cpu", requires_grad=True)
            v = torch.ones(1, dtype=vectors, device="cpu")
            try:
                torch.nn.functional.batch_norm(x, v, v, v, v, False, 0.0, 1e-5).sum().backward()
                taken.add((kind, vectors))
            except RuntimeError:
                pass
    return frozenset(taken)


_ON_CPU = _mixes()
_ON_OTHERS = frozenset([(t, t) for t in _TYPES] + [(t, torch.float32) for t in (torch.float16, torch.bfloat16)])


def batch_norm(
    x: torch.Tensor,
    mean: Optional[torch.Tensor],
    var: Optional[torch.Tensor],
    weight: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    training: bool,
    eps: float,
) -> torch.Tensor:
    """torch.nn.functional.batch_norm for any mix of floating-point types; y has x's.

    What torch does not mix is computed in float32, or in float64 if one of them is.
    """
    vectors = [v for v in (mean, var, weight, bias) if v is not None]
    mixes = _ON_CPU if x.device.type == "cpu" else _ON_OTHERS
    known = x.dtype in _TYPES and all(v.dtype in _TYPES for v in vectors)
    alike = all(v.dtype == vectors[0].dtype for v in vectors)
    kind = vectors[0].dtype if vectors else x.dtype
    if not known or (alike and (x.dtype, kind) in mixes):  # Torch refuses unknown types in its own words.
        return torch.nn.functional.batch_norm(x, mean, var, weight, bias, training, 0.0, eps)
    wide = torch.float64 if torch.float64 in [x.dtype] + [v.dtype for v in vectors] else torch.float32
    mean, var, weight, bias = (None if v is None else v.to(wide) for v in (mean, var, weight, bias))
    return torch.nn.functional.batch_norm(x.to(wide), mean, var, weight, bias, training, 0.0, eps).to(x.dtype)
