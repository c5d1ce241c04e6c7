"""The calls that a pass makes in every step: by functions that the library makes for Python, which take a tenth of the time
of ctypes; by ctypes in an interpreter that has not what they need.

Handles are addresses, structs their bytes. Every function but `has_log` and those that look a number up gives up the
interpreter's lock, and raises the error of the call.
"""

import ctypes
import sys
from ctypes import c_char_p, c_size_t, c_void_p
from types import SimpleNamespace
from typing import Any

from syncbn import _library, errors
from syncbn._library import lib

# Functions of Python that python_calls.cc takes, in its order.
_PYTHON = (
    "PyLong_AsVoidPtr",
    "PyLong_FromVoidPtr",
    "PyLong_AsLongLong",
    "PyLong_FromLongLong",
    "PyBytes_AsString",
    "PyErr_Occurred",
    "PyErr_BadArgument",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
    "PyObject_CallFunctionObjArgs",
    "Py_DecRef",
    "PyCFunction_NewEx",
)


class ByCtypes:
    """The functions, by ctypes."""

    @staticmethod
    def forward_start(worker: int, layer: bytes, x: bytes, options: bytes, send: bool) -> int:
        """The handle of a forward pass whose round has begun. send: the contribution goes out at once."""
        made = _library.begin(lib.syncbn_forward_start, worker, layer, x, options)
        if send:
            try:
                _library.compute(lib.syncbn_worker_flush, worker)
            except errors.Error:
                lib.syncbn_forward_destroy(made)
                raise
        return made

    @staticmethod
    def forward_wait(handle: int, timeout_ns: int) -> int:
        """0, or PENDING."""
        return _library.call(lib.syncbn_forward_wait, handle, timeout_ns)

    @staticmethod
    def forward_finish(handle: int, x: bytes, outputs: bytes) -> int:
        _library.compute(lib.syncbn_forward_finish, handle, x, outputs)
        return 0

    @staticmethod
    def forward_count(handle: int) -> int:
        return int(lib.syncbn_forward_count(handle))

    @staticmethod
    def forward_backward_required(handle: int) -> int:
        return int(lib.syncbn_forward_backward_required(handle))

    @staticmethod
    def forward_destroy(handle: int) -> int:
        lib.syncbn_forward_destroy(handle)
        return 0

    @staticmethod
    def backward_start(forward: int, inputs: bytes, options: bytes) -> int:
        """The handle of a backward pass whose round has begun, if it has one."""
        return _library.begin(lib.syncbn_backward_start, forward, inputs, options)

    @staticmethod
    def backward_wait(handle: int, timeout_ns: int) -> int:
        """0, or PENDING."""
        return _library.call(lib.syncbn_backward_wait, handle, timeout_ns)

    @staticmethod
    def backward_finish(handle: int, inputs: bytes, outputs: bytes) -> int:
        _library.compute(lib.syncbn_backward_finish, handle, inputs, outputs)
        return 0

    @staticmethod
    def backward_destroy(handle: int) -> int:
        lib.syncbn_backward_destroy(handle)
        return 0

    @staticmethod
    def has_log() -> int:
        """1 if the library has something to say, which `deliver_log` gives to the logger."""
        return int(lib.syncbn_log_take(None, 0))


def _raise(code: int, error: int) -> None:
    """Raises the error of a failed call, and destroys the library's own."""
    if lib.syncbn_log_take(None, 0):
        _library.deliver_log()
    raise _library.take_error(code, c_void_p(error))


def by_library() -> Any:
    """The functions that the library makes; None: the interpreter has not what they need."""
    if sys.implementation.name != "cpython":
        return None
    try:
        addresses = [ctypes.cast(getattr(ctypes.pythonapi, name), c_void_p) for name in _PYTHON]
    except AttributeError:
        return None
    # Another way to the same function: it is called with the interpreter's lock.
    make = ctypes.PyDLL(str(_library.PATH), handle=lib._handle).syncbn_python_function
    make.restype = ctypes.py_object
    make.argtypes = [c_void_p, c_size_t, c_char_p, ctypes.py_object]
    python = (c_void_p * len(addresses))(*addresses)
    names = [name for name in vars(ByCtypes) if not name.startswith("_")]
    return SimpleNamespace(**{name: make(python, len(addresses), name.encode(), _raise) for name in names})


calls: Any = by_library() or ByCtypes
