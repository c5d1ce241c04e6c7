"""Arrays of other frameworks as NumPy arrays, without a copy.

NumPy's own `from_dlpack` knows neither bfloat16 nor, before 1.22, itself; the exchange's structs are read here instead.
The memory stays its owner's: the NumPy array keeps the exchange's capsule, and the capsule its owner.
"""

import ctypes
from typing import Any, Optional, Tuple

import numpy as np

_CPU, _CUDA, _CUDA_HOST, _ROCM_HOST = 1, 2, 3, 11
_HOST_MEMORY = (_CPU, _CUDA_HOST, _ROCM_HOST)
_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _BOOL = 0, 1, 2, 4, 5, 6
_LETTERS = {_INT: "i", _UINT: "u", _FLOAT: "f", _COMPLEX: "c", _BOOL: "b"}
_READ_ONLY = 1


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned. Its predecessor, DLManagedTensor, begins with the tensor."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))


class _Owner:
    """Memory that NumPy makes an array of, and keeps as the array's base."""

    def __init__(self, capsule: Any, interface: Any) -> None:
        self.capsule = capsule
        self.__array_interface__ = interface


def bfloat16() -> Optional[np.dtype]:
    """NumPy's name for bfloat16, if the package that brings it is there (JAX and TensorFlow do)."""
    try:
        import ml_dtypes
    except ImportError:
        return None
    return np.dtype(ml_dtypes.bfloat16)


def _capsule(value: Any) -> Any:
    try:
        return value.__dlpack__(max_version=(1, 0))
    except TypeError:  # Older than that argument.
        return value.__dlpack__()


def _read(capsule: Any) -> Tuple[_Tensor, bool]:
    """The tensor, and whether it is read-only."""
    if _is_valid(capsule, b"dltensor_versioned"):
        address = _pointer_of(capsule, b"dltensor_versioned")
        versioned = ctypes.cast(address, ctypes.POINTER(_Versioned)).contents
        if versioned.major != 1:
            raise TypeError(f"version {versioned.major} of DLPack")
        return versioned.tensor, bool(versioned.flags & _READ_ONLY)
    return ctypes.cast(_pointer_of(capsule, b"dltensor"), ctypes.POINTER(_Tensor)).contents, False


def _type_of(tensor: _Tensor) -> np.dtype:
    if tensor.lanes == 1 and tensor.bits % 8 == 0:
        if tensor.code == _BFLOAT and tensor.bits == 16:
            found = bfloat16()
            if found is None:
                raise TypeError("bfloat16, which NumPy has only with the package ml_dtypes")
            return found
        if tensor.code in _LETTERS:
            return np.dtype(f"{_LETTERS[tensor.code]}{tensor.bits // 8}")
    raise TypeError(f"a type that NumPy lacks (DLPack's code {tensor.code}, {tensor.bits} bits)")


def _view(capsule: Any) -> np.ndarray:
    tensor, read_only = _read(capsule)
    dtype = _type_of(tensor)
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(s * dtype.itemsize for s in tensor.strides[: tensor.ndim]) if tensor.strides else None
    if not tensor.data or 0 in shape:
        return np.empty(shape, dtype)
    interface = {
        "version": 3,
        "shape": shape,
        "strides": strides,
        "data": (tensor.data + tensor.byte_offset, read_only),
        "typestr": f"|V{dtype.itemsize}",
    }
    return np.asarray(_Owner(capsule, interface)).view(dtype)


def to_numpy(value: Any) -> np.ndarray:
    """Anything with `__dlpack__` as an array over the same memory; what else NumPy takes as NumPy takes it.

    Raises TypeError, with the reason, where that cannot be: memory of a GPU, a tensor that records gradients.
    """
    if isinstance(value, np.ndarray):
        return value
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if not hasattr(value, "__dlpack__"):
        if hasattr(value, "__cuda_array_interface__"):
            raise TypeError(f"a {kind} is in a GPU's memory; here arrays are in the host's")
        return np.asarray(value)
    try:
        device = int(value.__dlpack_device__()[0]) if hasattr(value, "__dlpack_device__") else _CPU
        if device not in _HOST_MEMORY:
            where = "a GPU" if device == _CUDA else f"a device of DLPack's type {device}"
            raise TypeError(f"it is in the memory of {where}; here arrays are in the host's")
        return _view(_capsule(value))
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"cannot take a {kind} through DLPack: {error}") from error
