"""The structs of the C interface, packed without making them."""

import ctypes
import itertools

import pytest

from syncbn import _library

PACKED = [
    (_library.PassOptions, _library.PASS_OPTIONS),
    (_library.ForwardOutputs, _library.FORWARD_OUTPUTS),
    (_library.BackwardInputs, _library.BACKWARD_INPUTS),
    (_library.BackwardOutputs, _library.BACKWARD_OUTPUTS),
]


def fill(struct, numbers):
    """Gives every member a number of its own; returns them in order."""
    given = []
    for name, kind in struct._fields_:
        if issubclass(kind, ctypes.Structure):
            given += fill(getattr(struct, name), numbers)
        else:
            given.append(next(numbers))
            setattr(struct, name, given[-1])
    return given


@pytest.mark.parametrize("kind, layout", PACKED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_packed_struct_has_the_bytes_of_one_that_was_made(kind, layout):
    struct = kind.from_buffer(bytearray(ctypes.sizeof(kind)))  # Zeros where no member is.
    members = fill(struct, itertools.count(1))
    assert layout.size == ctypes.sizeof(kind)
    assert layout.pack(*members) == bytes(struct)


def test_a_packed_null_is_a_null():
    outputs = _library.BackwardOutputs.from_buffer_copy(
        _library.BACKWARD_OUTPUTS.pack(_library.BACKWARD_OUTPUTS.size, 0, 0, 0, 0, 0, 0)
    )
    assert outputs.struct_size == ctypes.sizeof(outputs)
    assert (outputs.dx, outputs.d_residual, outputs.d_weight.data, outputs.d_bias.data) == (None,) * 4
