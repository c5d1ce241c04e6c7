"""Second derivatives of a layer of several workers, compared with those of one float64 computation on the whole batch."""

from typing import Any, Callable, Optional, Sequence, Tuple

import torch

import syncbn.torch as sync

CHANNELS = 3
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 + 1


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float64) -> None:
    """Asserts that both agree to `dtype`'s tolerance, relative to the greatest magnitude expected."""
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.detach().double(), expected.detach(), rtol=tolerance, atol=tolerance * scale, check_stride=False
    )


def loss_of(gradients: Sequence[torch.Tensor], factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A number whose gradient needs the derivative of each of the gradients of x, weight and bias."""
    loss = gradients[0].double().sin().sum()
    for gradient, factor in zip(gradients[1:], factors):
        loss = loss + (gradient.double() * factor).sum()
    return loss


def check(
    group: Any,
    sizes: Sequence[int],
    shape: Tuple[int, ...],
    normalize: Callable[[torch.Tensor], torch.Tensor],
    generator: torch.Generator,
    *,
    mask: Optional[torch.Tensor] = None,
    dtype: torch.dtype = torch.float64,
    affine: bool = True,
    mode: str = "add",
    eps: float = 1e-5,
    layout: Optional[str] = None,
    dy_needs: bool = True,
) -> None:
    """Compares workers with batches of these sizes with `normalize`, the layer without weight and bias.

    `normalize` takes the whole batch, in float64, by operations that autograd differentiates twice. `mask` is the whole
    batch's, and goes to the layer as its second argument.
    """
    x, c = (random((sum(sizes), CHANNELS) + shape, generator).to(dtype) for _ in range(2))
    weights = (torch.rand(CHANNELS, generator=generator, dtype=torch.float64) + 0.5).float()
    factors = random((len(sizes), 2, CHANNELS), generator)

    # The oracle: each worker's weight and bias as vectors of their own, so that their gradients come apart.
    rows = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    trailing = (...,) + (None,) * len(shape)
    leaves = [x.double().clone().requires_grad_(), c.double().clone().requires_grad_(dy_needs)]
    own = [weights.double().repeat(len(sizes), 1).requires_grad_(), torch.zeros(len(sizes), CHANNELS).double()]
    own[1].requires_grad_()
    y = normalize(leaves[0])
    if affine:
        y = y * own[0][rows][trailing] + own[1][rows][trailing]
    first = torch.autograd.grad((y * leaves[1]).sum(), [leaves[0], *(own if affine else [])], create_graph=True)
    loss_of(first, [factors[:, 0], factors[:, 1]]).backward()

    def run(worker: Any) -> Tuple[Any, ...]:
        layer = sync.SyncBatchNorm(
            CHANNELS, eps=eps, affine=affine, worker=worker, layer="bn", eps_mode=mode,
            dtype=max(dtype, torch.float32, key=str),
        )
        if affine:
            with torch.no_grad():
                layer.weight.copy_(weights)
        part, dy = (v.split(list(sizes))[worker.rank].clone() for v in (x, c))
        if layout == "channels_last":
            part = part.movedim(1, -1).contiguous().movedim(-1, 1)
        part.requires_grad_(), dy.requires_grad_(dy_needs)
        own_mask = [] if mask is None else [mask.split(list(sizes))[worker.rank].clone()]
        gradients = torch.autograd.grad(
            (layer(part, *own_mask) * dy).sum(), [part, *layer.parameters()], create_graph=True
        )
        loss_of(gradients, factors[worker.rank]).backward()
        return gradients, part.grad, dy.grad, layer.weight.grad if affine else None

    results = group(len(sizes), run)
    close(torch.cat([r[0][0] for r in results]), first[0], dtype)
    close(torch.cat([r[1] for r in results]), leaves[0].grad, dtype)
    if dy_needs:
        close(torch.cat([r[2] for r in results]), leaves[1].grad, dtype)
    else:
        assert all(r[2] is None for r in results)
    if affine:
        close(sum(r[3].double() for r in results), own[0].grad.sum(0), dtype)
