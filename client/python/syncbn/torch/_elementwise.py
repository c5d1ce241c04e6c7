"""Operations that may bring the rows of a batch together, and where their results go.

A forward that normalizes by `batch_norm` and otherwise works on each value by itself takes no other statistics: nothing has
to be tried (see `_trials`). What is tried although it need not be costs time, once, so the list of operations that keep
rows apart only has to be right, and not complete.
"""

import weakref
from typing import Any, Dict, FrozenSet, Iterator, Set

import torch

from syncbn.torch import _batches

_FUNCTIONS = """
    relu relu_ relu6 leaky_relu leaky_relu_ prelu elu elu_ celu selu gelu silu mish hardswish hardsigmoid hardtanh hardtanh_
    softplus softsign logsigmoid tanhshrink softshrink threshold sigmoid sigmoid_ tanh tanh_ dropout dropout1d dropout2d
    dropout3d alpha_dropout feature_alpha_dropout
    add add_ sub sub_ rsub mul mul_ multiply div div_ divide neg abs exp log sqrt rsqrt pow square reciprocal sin cos clamp
    clamp_ clamp_min clamp_max clip minimum maximum lerp addcmul addcdiv where eq ne lt le gt ge isnan isfinite
    __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __div__
    __rdiv__ __idiv__ __pow__ __rpow__ __neg__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __float__ __int__ __bool__ __index__
    item view view_as reshape reshape_as permute transpose movedim swapaxes contiguous unsqueeze squeeze flatten unflatten
    expand expand_as t to float double half bfloat16 type_as clone detach copy_
""".split()
# The values have no part in what these return.
_FORMS = """
    __len__ size dim ndimension numel stride is_contiguous is_floating_point is_complex is_neg is_conj element_size data_ptr type
    requires_grad_ retain_grad _assert
    empty_like zeros_like ones_like full_like rand_like randn_like
""".split()
_OWNERS = (torch, torch.Tensor, torch.nn.functional, getattr(getattr(torch, "_C"), "_nn"))
_DESCRIPTIONS = (torch.Size, torch.dtype, torch.device, torch.layout, bool, str, type(None))
# Reading an attribute of a tensor, such as its shape: another object each time.
_READING = type(getattr(torch.Tensor.shape, "__get__"))


def _named(names: Any) -> FrozenSet[Any]:
    return frozenset(getattr(owner, name) for owner in _OWNERS for name in names if hasattr(owner, name))


_OF_VALUES, _OF_FORMS = _named(_FUNCTIONS), _named(_FORMS)
_KNOWN = _OF_VALUES | _OF_FORMS


class Calls:
    """The calls of one forward: which other operations there are among them."""

    def __init__(self) -> None:
        self.others: Set[str] = set()  # Their names.

    def through(self, function: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Takes note of a call; returns its result."""
        if function not in _KNOWN and type(function) is not _READING:
            self.others.add(str(getattr(function, "__name__", function)))
        return result

    def apart(self, args: Any, kwargs: Any, result: Any) -> Any:
        """Takes note of a call that keeps rows apart; returns its result."""
        return result

    def is_whole(self, output: Any) -> bool:
        """Tells whether all of the output is known to be of its own rows alone."""
        return False


class Flow(Calls):
    """Follows the values that are of their own rows alone: the input, and what such operations have made of it.

    Anything else, and what is made of it, may have brought rows together: by another operation, or by one that is not seen.
    """

    def __init__(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__()
        self._apart: Dict[int, "weakref.ref[torch.Tensor]"] = {}
        self._records = torch.is_grad_enabled()
        self._escaped = False  # A value has gone where no operation shows: into a number, a hook, or other memory.
        self._add((args, tuple(kwargs.values()), tuple(module._buffers.values())))

    def through(self, function: Any, args: Any, kwargs: Any, result: Any) -> Any:
        if function in _OF_VALUES or type(function) is _READING:
            return self.apart(args, kwargs, result)
        if function in _OF_FORMS:
            self._add(result)
            return result
        if not isinstance(result, (torch.Tensor, tuple, list)) or any(self._is_apart(value) for value in _flat((result,))):
            self._escaped = True
        return super().through(function, args, kwargs, result)

    def apart(self, args: Any, kwargs: Any, result: Any) -> Any:
        if all(self._is_apart(value) for value in _flat((args, tuple(kwargs.values())))):
            self._add(result)
        elif isinstance(result, torch.Tensor):
            if self._is_apart(result):  # Written in place, and so into what it is a view of.
                self._escaped = True
        elif not isinstance(result, _DESCRIPTIONS):
            self._escaped = True
        return result

    def is_whole(self, output: Any) -> bool:
        tensors = _batches.tensors([output])
        return not self._escaped and bool(tensors) and all(self._is_apart(tensor) for tensor in tensors)

    def _add(self, values: Any) -> None:
        if torch.is_grad_enabled() != self._records:  # Such as within a Function, whose backward pass may be anything.
            return
        for value in _flat((values,)):
            if isinstance(value, torch.Tensor):
                self._apart[id(value)] = weakref.ref(value)

    def _is_apart(self, value: Any) -> bool:
        """Returns True for a parameter too, and for what is no tensor."""
        if not isinstance(value, torch.Tensor):
            return True
        found = self._apart.get(id(value))
        return (found is not None and found() is value) or isinstance(value, torch.nn.Parameter)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value
