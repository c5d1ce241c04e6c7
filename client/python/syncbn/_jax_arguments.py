"""Checks of what callers of the JAX front pass, and the shapes that it computes with."""

import math
from typing import Any, Tuple

import jax
import jax.numpy as jnp
import numpy as np


def floating(value: Any, name: str) -> Any:
    """An array of a real floating type."""
    if isinstance(value, (list, tuple)):
        raise TypeError(f"{name} is a {type(value).__name__}; an array of a floating type is needed")
    given = getattr(value, "dtype", None)
    try:
        array = value if isinstance(value, jax.Array) else jnp.asarray(value)
    except (TypeError, ValueError) as error:
        kind = type(value).__name__ if given is None else given
        raise TypeError(f"{name} is {kind}; an array of a floating type is needed") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} is {array.dtype if given is None else given}; a floating type is needed")
    if given is not None and np.dtype(given).itemsize > 8:  # JAX would round it without a word.
        raise TypeError(f"{name} is {given}; the widest type is float64")
    return array


def vector(value: Any, channels: int, name: str) -> Any:
    array = floating(value, name)
    if array.shape != (channels,):
        raise ValueError(f"{name} has shape {array.shape}, and x {channels} channels")
    return array


def positions(mask: Any, x: Any, axis: int) -> Tuple[Any, Any]:
    """The mask as booleans that broadcast over x, with a channel axis of size 1; and what is wrong with its values.

    The latter are two numbers for the host, since a traced mask has no values: whether some are neither 0 nor 1, and
    whether some differ between channels.
    """
    if isinstance(mask, (list, tuple)):
        raise TypeError(f"mask is a {type(mask).__name__}; an array is needed")
    mask = jnp.asarray(mask)
    if not (mask.dtype == jnp.bool_ or jnp.issubdtype(mask.dtype, jnp.integer) or jnp.issubdtype(mask.dtype, jnp.floating)):
        raise TypeError(f"mask is {mask.dtype}; booleans are needed, or numbers that are 0 or 1")
    positions = x.shape[:axis] + x.shape[axis + 1 :]
    whole = positions[:axis] + (mask.shape[axis] if mask.ndim == x.ndim else 1,) + positions[axis:]
    if mask.ndim < x.ndim:
        mask = mask.reshape((1,) * (x.ndim - 1 - mask.ndim) + mask.shape)
        mask = jnp.expand_dims(mask, axis)
    fits = mask.ndim == x.ndim and all(have in (1, want) for have, want in zip(mask.shape, whole))
    if not fits or mask.shape[axis] not in (1, x.shape[axis]):
        raise ValueError(
            f"mask does not fit: it broadcasts over positions, here {positions}, with or without a "
            f"channel axis of size 1, and x has shape {x.shape}"
        )
    faults = jnp.zeros(2, bool)
    if mask.dtype != jnp.bool_:
        faults = faults.at[0].set(jnp.any((mask != 0) & (mask != 1)))
        mask = mask != 0
    if mask.shape[axis] > 1:
        first = jax.lax.slice_in_dim(mask, 0, 1, axis=axis)
        faults = faults.at[1].set(jnp.any(mask != first))
        mask = first
    return jnp.broadcast_to(mask, positions[:axis] + (1,) + positions[axis:]), faults


def flattened(mask: Any, x: Any, over: Tuple[int, ...], kept: Tuple[int, ...]) -> Any:
    """A mask that broadcasts to x, as [positions, 1], or [positions, C] where it has several values for a position."""
    mask = jnp.asarray(mask)
    missing = x.ndim - mask.ndim
    shape = (1,) * missing + mask.shape
    if missing < 0 or any(have not in (1, want) for have, want in zip(shape, x.shape)):
        raise ValueError(f"mask has shape {mask.shape}, which does not broadcast to x's, {x.shape}")
    several = any(shape[axis] > 1 for axis in kept)
    whole = [x.shape[axis] if axis in over or several else 1 for axis in range(x.ndim)]
    mask = jnp.broadcast_to(mask.reshape(shape), whole).transpose(*over, *kept)
    return mask.reshape(math.prod(whole[axis] for axis in over), math.prod(whole[axis] for axis in kept))


def reduced_axes(axes: Any, x: Any, axis_name: Any) -> Tuple[int, ...]:
    """`axes` as numbers from 0 on, ascending."""
    given = (axes,) if isinstance(axes, (int, np.integer)) and not isinstance(axes, bool) else tuple(axes)
    for axis in given:
        if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
            raise TypeError(f"axes is {axes!r}; whole numbers are needed")
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"axes has {axis}; x of shape {x.shape} has the axes 0 .. {x.ndim - 1}")
    found = sorted({int(axis) % x.ndim for axis in given})
    if len(found) != len(given) or not (found or axis_name is not None):
        raise ValueError(f"axes is {axes!r}; it names at least one axis, and each once")
    return tuple(found)


def addend(z: Any, x: Any) -> Any:
    """z as an array of x's shape and type."""
    array = floating(z, "z")
    if (array.shape, array.dtype) != (x.shape, x.dtype):
        raise ValueError(f"z is {array.dtype}{list(array.shape)}, and x {x.dtype}{list(x.shape)}: they have to be alike")
    return array


def activation_of(activation: Any) -> bool:
    """Returns whether it is a ReLU."""
    if activation not in (None, "relu"):
        raise ValueError(f'activation is None or "relu", not {activation!r}')
    return activation == "relu"


def axis_of(axis: Any, x: Any, axis_name: Any) -> int:
    """The channel axis, counted from 0."""
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise TypeError(f"axis is a whole number, not {axis!r}")
    if x.ndim < (2 if axis_name is None else 1):
        raise ValueError(f"expected [batch, ..., channels], got {list(x.shape)}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis}, and x has {x.ndim} dimensions")
    found = int(axis) % x.ndim
    if x.shape[found] == 0:
        raise ValueError(f"x has shape {x.shape}, with no channels in axis {axis}")
    return found
