"""The structs of the C interface, packed without making them."""

import ctypes
import itertools

import pytest

from syncbn import _library

PACKED = [
    (_library.Tensor, _library.TENSOR),
    (_library.Vector, _library.VECTOR),
    (_library.PassOptions, _library.PASS_OPTIONS),
    (_library.ForwardOutputs, _library.FORWARD_OUTPUTS),
    (_library.BackwardInputs, _library.BACKWARD_INPUTS),
    (_library.BackwardOutputs, _library.BACKWARD_OUTPUTS),
    (_library.EvaluateOptions, _library.EVALUATE_OPTIONS),
]


def fill(struct, numbers):
    """Gives every member a number of its own."""
    for name, kind in struct._fields_:
        if issubclass(kind, ctypes.Structure):
            fill(getattr(struct, name), numbers)
        else:
            setattr(struct, name, next(numbers))


def arguments(struct):
    """The members as the layout takes them: Vectors in a row as their bytes, a Tensor as its address and the rest."""
    given = []
    for kind, fields in itertools.groupby(struct._fields_, lambda field: field[1]):
        members = [getattr(struct, name) for name, _ in fields]
        if kind is _library.Vector:
            given.append(b"".join(map(bytes, members)))
        elif kind is _library.Tensor:
            for tensor in members:
                given += [tensor.data, bytes(tensor)[_library.ADDRESS_SIZE :]]
        else:
            given += members
    return given


@pytest.mark.parametrize("kind, layout", PACKED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_packed_struct_has_the_bytes_of_one_that_was_made(kind, layout):
    struct = kind.from_buffer(bytearray(ctypes.sizeof(kind)))  # Zeros where no member is.
    fill(struct, itertools.count(1))
    assert layout.size == ctypes.sizeof(kind)
    assert layout.pack(*arguments(struct)) == bytes(struct)


def test_a_packed_null_is_a_null():
    outputs = _library.BackwardOutputs.from_buffer_copy(
        _library.BACKWARD_OUTPUTS.pack(_library.BACKWARD_OUTPUTS.size, 0, 0, bytes(2 * ctypes.sizeof(_library.Vector)))
    )
    assert outputs.struct_size == ctypes.sizeof(outputs)
    assert (outputs.dx, outputs.d_residual, outputs.d_weight.data, outputs.d_bias.data) == (None,) * 4
