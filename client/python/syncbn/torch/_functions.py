"""The differentiable operations under the modules."""

from typing import Any, Optional, Tuple

import torch
from torch.autograd.function import once_differentiable

from syncbn import _passes
from syncbn._library import BackwardInputs, BackwardOutputs, EvaluateOptions, ForwardOutputs
from syncbn.torch import _tensors

_Gradients = Tuple[Optional[torch.Tensor], ...]


def _gradient_buffers(
    needed: Tuple[bool, ...], x: torch.Tensor, weight: Optional[torch.Tensor], bias: Optional[torch.Tensor]
) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Memory for dx, d_weight and d_bias, where they are needed."""
    dx = _tensors.empty_like(x) if needed[0] else None
    d_weight = torch.empty_like(weight) if weight is not None and needed[1] else None
    d_bias = torch.empty_like(bias) if bias is not None and needed[2] else None
    return dx, d_weight, d_bias


def _outputs(
    dx: Optional[torch.Tensor], d_weight: Optional[torch.Tensor], d_bias: Optional[torch.Tensor]
) -> BackwardOutputs:
    return BackwardOutputs(
        dx=None if dx is None else dx.data_ptr() or None,
        d_weight=_tensors.vector(d_weight),
        d_bias=_tensors.vector(d_bias),
    )


class Normalize(torch.autograd.Function):
    """y = weight * (x - mean) * invstd + bias, mean and invstd those of a forward pass over all workers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        anchor: Optional[torch.Tensor],
        forward_pass: _passes.ForwardPass,
        running_mean: Optional[torch.Tensor],
        running_var: Optional[torch.Tensor],
        momentum: float,
    ) -> torch.Tensor:
        """x is dense, and the vectors contiguous. `anchor` makes y differentiable where nothing else does."""
        channels_last = _tensors.is_channels_last(x)
        y = _tensors.empty_like(x)
        outputs = ForwardOutputs(
            weight=_tensors.vector(weight),
            bias=_tensors.vector(bias),
            running_mean=_tensors.vector(running_mean),
            running_var=_tensors.vector(running_var),
            momentum=momentum,
            y=_tensors.describe(y, channels_last),
        )
        device, _, _ = _tensors.execution(x)
        with device:
            forward_pass.finish(_tensors.describe(x, channels_last), outputs)
        ctx.save_for_backward(x, weight, bias)
        ctx.forward_pass = forward_pass
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> _Gradients:
        x, weight, bias = ctx.saved_tensors
        channels_last = _tensors.is_channels_last(x)
        dy = _tensors.dense(dy, channels_last)
        if ctx.forward_pass.backward_passes and ctx.forward_pass.has_backward_round:
            return _backward_again(ctx, x, weight, bias, dy) + (None,) * 5
        dx, d_weight, d_bias = _gradient_buffers(ctx.needs_input_grad, x, weight, bias)
        inputs = BackwardInputs(
            dy=_tensors.describe(dy, channels_last), x=x.data_ptr() or None, weight=_tensors.vector(weight)
        )
        device, threads, stream = _tensors.execution(x)
        with device:
            ctx.forward_pass.backward(inputs, _outputs(dx, d_weight, d_bias), num_threads=threads, stream=stream)
        return dx, d_weight, d_bias, None, None, None, None, None


def _backward_again(
    ctx: Any, x: torch.Tensor, weight: Optional[torch.Tensor], bias: Optional[torch.Tensor], dy: torch.Tensor
) -> _Gradients:
    """A later backward pass through one forward pass (retain_graph), in float64.

    The protocol has one backward round for each forward round, so the sums of the later ones travel as plain vectors.
    """
    forward_pass, channels = ctx.forward_pass, x.size(1)
    shape = [1, channels] + [1] * (x.dim() - 2)
    others = [dim for dim in range(x.dim()) if dim != 1]
    mean, var = (torch.from_numpy(v(channels)).to(x.device) for v in (forward_pass.mean, forward_pass.var))
    clamped = var < forward_pass.eps if forward_pass.clamp else torch.zeros_like(var, dtype=torch.bool)
    invstd = (var.clamp(min=forward_pass.eps) if forward_pass.clamp else var + forward_pass.eps).rsqrt()
    xmu, wide_dy = x.double() - mean.view(shape), dy.double()
    own = torch.stack([wide_dy.sum(others), (wide_dy * xmu).sum(others)])
    merged = forward_pass.worker.all_reduce(f"{forward_pass.layer}/retained", own.cpu().numpy())
    sum_dy, sum_dy_xmu = torch.from_numpy(merged).to(x.device) / forward_pass.count
    slope = (invstd * invstd * sum_dy_xmu).masked_fill(clamped, 0.0)
    scale = invstd if weight is None else invstd * weight.double()
    dx = scale.view(shape) * (wide_dy - sum_dy.view(shape) - xmu * slope.view(shape))
    return (
        dx.to(x.dtype) if ctx.needs_input_grad[0] else None,
        (own[1] * invstd).to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None,
        own[0].to(bias.dtype) if bias is not None and ctx.needs_input_grad[2] else None,
    )


class Evaluate(torch.autograd.Function):
    """y = weight * (x - mean) / sqrt(var + eps) + bias with given statistics, for types that torch does not mix."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        eps: float,
    ) -> torch.Tensor:
        channels_last = _tensors.is_channels_last(x)
        y = _tensors.empty_like(x)
        device, threads, stream = _tensors.execution(x)
        with device:
            _passes.evaluate(
                _tensors.describe(x, channels_last),
                Evaluate._options(mean, var, weight, bias, eps, threads, stream),
                y.data_ptr() or None,
            )
        ctx.save_for_backward(x, mean, var, weight, bias)
        ctx.eps = eps
        return y

    @staticmethod
    def _options(
        mean: torch.Tensor,
        var: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        eps: float,
        threads: int,
        stream: Optional[int],
    ) -> EvaluateOptions:
        return EvaluateOptions(
            num_threads=threads,
            stream=stream,
            mean=_tensors.vector(mean),
            var=_tensors.vector(var),
            weight=_tensors.vector(weight),
            bias=_tensors.vector(bias),
            eps=eps,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> _Gradients:
        x, mean, var, weight, bias = ctx.saved_tensors
        channels_last = _tensors.is_channels_last(x)
        dy = _tensors.dense(dy, channels_last)
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        dx, d_weight, d_bias = _gradient_buffers(needed, x, weight, bias)
        inputs = BackwardInputs(
            dy=_tensors.describe(dy, channels_last),
            x=x.data_ptr() or None,
            weight=_tensors.vector(weight),
            bias=_tensors.vector(bias),
        )
        device, threads, stream = _tensors.execution(x)
        with device:
            _passes.evaluate_backward(
                inputs,
                Evaluate._options(mean, var, weight, bias, ctx.eps, threads, stream),
                _outputs(dx, d_weight, d_bias),
            )
        return dx, None, None, d_weight, d_bias, None
