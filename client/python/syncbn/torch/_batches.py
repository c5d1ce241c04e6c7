"""Values that hold tensors: cut into parts for replicas, and the replicas' outputs joined."""

import collections
import copy
import dataclasses
import types
from typing import Any, Callable, List, Sequence

import numpy as np
import torch


# Tokenizers return a UserDict as a batch.
_DICTIONARIES = (dict, collections.UserDict)


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(type(value), "_make")


def _is_record(value: Any) -> bool:
    """Tells whether the value's attributes are its contents."""
    return (dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace)) and not isinstance(value, type)


def _attributes(value: Any) -> List[str]:
    names = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    names = [name for name in names if hasattr(value, name)]
    return names + [name for name in getattr(value, "__dict__", ()) if name not in names]


def _rebuilt(values: Sequence[Any], function: Callable[[List[Any], str], Any]) -> Any:
    """A container of the first one's type, each element made of those of all in its place; else NotImplemented.

    Elements are put into a copy, since nothing is known of the constructors of people's own types.
    """
    first = values[0]
    if isinstance(first, _DICTIONARIES):
        # A dictionary whose attributes are its items has itself for its attributes, which a copy would take apart.
        kind: Any = type(first)
        made = kind(first) if getattr(first, "__dict__", None) is first else copy.copy(first)
        for key in first:
            made[key] = function([value[key] for value in values], f"[{key!r}]")
        return made
    if isinstance(first, (list, tuple, collections.deque)):
        elements = [function(list(items), f"[{index}]") for index, items in enumerate(zip(*values))]
        if isinstance(first, list):
            joined_list = copy.copy(first)
            joined_list[:] = elements
            return joined_list
        if isinstance(first, collections.deque):
            joined_deque = copy.copy(first)  # With its bound.
            joined_deque.clear()
            joined_deque.extend(elements)
            return joined_deque
        kind = type(first)
        return kind._make(elements) if _is_named_tuple(first) else kind(elements)
    if _is_record(first):
        made = copy.copy(first)
        for name in _attributes(first):
            object.__setattr__(made, name, function([getattr(value, name) for value in values], f".{name}"))
        return made
    return NotImplemented


def _shape(value: Any) -> Any:
    """The properties that values share if they can be joined element by element."""
    if isinstance(value, _DICTIONARIES):
        return type(value), list(value)
    if isinstance(value, (list, tuple, collections.deque)):
        return type(value), len(value)
    return type(value), _attributes(value) if _is_record(value) else None


def tensors(value: Any) -> List[torch.Tensor]:
    """The tensors in a value that have a batch dimension."""
    found: List[torch.Tensor] = []

    def visit(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() > 0:
            found.append(tensor)
        return tensor

    mapped(value, visit)
    return found


def cut(value: Any, parts: int) -> List[Any]:
    """Tensors, and what holds tensors, cut along the first dimension; anything else is the same for each part.

    Returns one value for each part; fewer than `parts` for a batch of fewer rows.
    """
    found = tensors(value)
    counts = {len(tensor.chunk(parts)) for tensor in found} or {parts}
    if len(counts) > 1:
        rows = sorted({len(tensor) for tensor in found})
        raise ValueError(f"the inputs have {rows} rows, which cannot be cut into equally many parts for the replicas")
    return [_part(value, parts, index) for index in range(counts.pop())]


def _part(value: Any, parts: int, index: int) -> Any:
    return mapped(value, lambda tensor: tensor if tensor.dim() == 0 else tensor.chunk(parts)[index])


def mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The value with function(tensor) in the place of each of its tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    made = _rebuilt([value], lambda items, _: mapped(items[0], function))
    return value if made is NotImplemented else made


def moved(value: Any, device: Any) -> Any:
    """The value with its tensors on a device."""
    return mapped(value, lambda tensor: tensor.to(device, non_blocking=True))


def joined(values: List[Any], device: Any = None, path: str = "the output") -> Any:
    """The replicas' outputs as one of the same type; tensors along the first dimension, on the device if one is given.

    Raises:
      TypeError: for what cannot be joined and is not the same in all.
    """
    first = values[0]
    if all(isinstance(value, torch.Tensor) for value in values):
        rows = [value.reshape(1) if value.dim() == 0 else value for value in values]
        return torch.cat([row if device is None else row.to(device) for row in rows])
    if all(isinstance(value, np.ndarray) and value.ndim > 0 for value in values):
        return np.concatenate(values)
    if all(_shape(value) == _shape(first) for value in values):
        made = _rebuilt(values, lambda items, step: joined(items, device, path + step))
        if made is not NotImplemented:
            return made
        if all(_equal(value, first) for value in values):
            return first
    shown = ", ".join(f"{value!r:.60}" for value in values[:3])
    raise TypeError(
        f"{path} differs between the replicas and cannot be joined: {shown}{', ...' if len(values) > 3 else ''}. Return "
        "tensors, or lists, tuples, dictionaries or dataclasses of them"
    )


def _equal(value: Any, other: Any) -> bool:
    try:
        return value is other or bool(np.all(value == other))
    except (RuntimeError, TypeError, ValueError):  # A container of tensors has no truth value.
        return False
