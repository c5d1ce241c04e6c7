"""Right gradients for uneven batches, where each worker's loss is the mean over its own batch."""

from typing import Any, Callable, Optional

import torch

from syncbn.torch import _batches

Weight = Callable[..., Any]


class _Scale(torch.autograd.Function):
    """The same values; the gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (factor,) = ctx.saved_tensors
        return gradient * factor.to(gradient.dtype), None


def _rows(inputs: Any, kwargs: Any, output: Any) -> int:
    """The size of the batch: that of the inputs' first tensor."""
    tensors = _batches.tensors((inputs, kwargs))
    if not tensors:
        raise ValueError(
            "the model's inputs have no tensor that tells the size of the batch: give weighted_ddp a function, weight="
        )
    return int(tensors[0].size(0))


def weighted_ddp(model: torch.nn.Module, weight: Optional[Weight] = None) -> torch.nn.Module:
    """Makes DistributedDataParallel's gradients those of the mean over the global batch, for batches of any sizes.

        model = DistributedDataParallel(syncbn.torch.convert_sync_batchnorm(model))
        model = syncbn.torch.weighted_ddp(model)
        cross_entropy(model(x), y).backward()                  # The mean over this worker's batch.

    DistributedDataParallel averages the workers' gradients as if their batches were of one size. A communication hook that
    weighted the finished gradients would come too late, since synchronized layers exchange gradients in the middle of the
    backward pass. So the weight is put where that pass begins: with n values of this worker, N of all W workers, the gradients
    of the model's outputs are multiplied by n * W / N. Outputs keep their values, and terms of the loss that do not depend on
    them, such as a penalty on the parameters, keep their gradients.

    Each forward pass with gradients enabled sums the weights of all processes, so all have to run it, as under
    DistributedDataParallel anyway. A batch may be empty. A second call, for the model or for one around it, takes the place of
    the first.

    Args:
      model: a DistributedDataParallel, or a module that will be within one over the default process group.
      weight: weight(inputs, kwargs, output), the positional and named arguments of the model's forward and what it returned:
        the number of values that this worker's loss is the mean of, such as its labelled tokens. Default: the first dimension
        of the inputs' first tensor.

    Returns: the model itself.
    Errors: TypeError for what is no module; at a forward pass, ValueError for a weight that is negative or not finite, and
    TypeError for an output in which no tensor with a gradient is found.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a torch.nn.Module, not a {type(model).__qualname__}")
    for module in model.modules():
        _remove_hooks(module)
    hook = _Hook(weight or _rows)
    register: Any = model.register_forward_hook
    try:
        register(hook, with_kwargs=True)
    except TypeError:  # torch 1.13: the hook does not see named arguments.
        register(hook)
    return model


def _remove_hooks(module: torch.nn.Module) -> None:
    """Removes the hooks of an earlier call."""
    hooks: Any = module._forward_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
        del hooks[key]
        getattr(module, "_forward_hooks_with_kwargs", {}).pop(key, None)


class _Hook:
    """A forward hook, which scales the gradients of the outputs."""

    def __init__(self, weight: Weight) -> None:
        self._weight = weight

    def __call__(self, module: torch.nn.Module, inputs: Any, *rest: Any) -> Any:
        kwargs, output = rest if len(rest) == 2 else ({}, *rest)
        if not torch.is_grad_enabled():
            return output
        weight = float(self._weight(inputs, kwargs, output))
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight is {weight}; a worker's weight is at least 0 and finite")
        factor = self._factor(module, weight)

        found = 0

        def scaled(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal found
            if not tensor.requires_grad:
                return tensor
            found += 1
            result: torch.Tensor = _Scale.apply(tensor, factor.to(tensor.device))
            return result

        made = _batches.mapped(output, scaled)
        if not found and any(parameter.requires_grad for parameter in module.parameters()):
            raise TypeError(
                f"the model's output, a {type(output).__qualname__}, has no tensor with a gradient where weighted_ddp finds it: "
                "return tensors, or lists, tuples, dictionaries or dataclasses of them"
            )
        return made

    @staticmethod
    def _factor(module: torch.nn.Module, weight: float) -> torch.Tensor:
        """n * W / N. A tensor of the parameters' device, so that the host does not wait for it."""
        distributed: Any = torch.distributed
        group = getattr(module, "process_group", None)
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        total = torch.tensor(weight, dtype=torch.float64, device=device)
        distributed.all_reduce(total, group=group)
        own = weight * distributed.get_world_size(group)
        factor: torch.Tensor = own / total
        return factor.masked_fill(total == 0, 0.0)  # Where nobody has a value, nobody has a gradient.
