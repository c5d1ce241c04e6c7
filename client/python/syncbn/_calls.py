"""The calls that a pass makes in every step: by functions that the library makes for Python, which take a tenth of the time
of ctypes; by ctypes in an interpreter that has not what they need.

Handles are addresses, structs their bytes. Every function but `has_log` and those that look a number up gives up the
interpreter's lock, and raises the error of the call. The nanoseconds of a wait that has ended are appended to the list
`waits`, or ~nanoseconds if its round has failed.
"""

import ctypes
import sys
import time
from ctypes import c_char_p, c_size_t, c_void_p
from types import SimpleNamespace
from typing import Any, Callable, List, Optional

from syncbn import _library, errors
from syncbn._library import lib

# Functions of Python that client/c/python.h takes, in its order.
_PYTHON = (
    "PyLong_AsVoidPtr",
    "PyLong_FromVoidPtr",
    "PyLong_AsLongLong",
    "PyLong_FromLongLong",
    "PyBytes_AsStringAndSize",
    "PyBytes_FromStringAndSize",
    "PyList_Size",
    "PyList_Append",
    "PyTuple_Size",
    "PyTuple_GetItem",
    "PyDict_GetItem",
    "Py_BuildValue",
    "PyErr_Occurred",
    "PyErr_ExceptionMatches",
    "PyErr_Clear",
    "PyErr_BadArgument",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
    "PyObject_Type",
    "PyObject_GetAttr",
    "PyObject_IsTrue",
    "PyObject_Call",
    "PyObject_CallFunctionObjArgs",
    "Py_DecRef",
    "PyCFunction_NewEx",
)


def _waited(function: Any, handle: int, timeout_ns: int, waits: List[int]) -> int:
    begun = time.monotonic_ns()
    try:
        code = _library.call(function, handle, timeout_ns)
    except errors.Error:
        waits.append(~(time.monotonic_ns() - begun))
        raise
    if code == 0:
        waits.append(time.monotonic_ns() - begun)
    return code


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
    def forward_end(
        handle: int, timeout_ns: int, x: bytes, outputs: bytes, waits: List[int], ended: List[int]
    ) -> int:
        """The wait and, from two values in each channel on, the finish: that number, or PENDING. With the finish, the number
        is appended to `ended`, whatever comes between this and the caller, as Ctrl-C does.
        """
        if _waited(lib.syncbn_forward_wait, handle, timeout_ns, waits):
            return _library.PENDING
        count = ByCtypes.forward_count(handle)
        if count >= 2:
            ByCtypes.forward_finish(handle, x, outputs)
            ended.append(count)
        return count

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
    def backward(
        forward: int, inputs: bytes, options: bytes, outputs: bytes, timeout_ns: int, waits: List[int]
    ) -> int:
        """A backward pass: its start, the wait unless `timeout_ns` is negative, and the finish. Returns 0, or the handle of a
        pass whose round goes on.
        """
        made = _library.begin(lib.syncbn_backward_start, forward, inputs, options)
        pending = False
        try:
            pending = timeout_ns >= 0 and _waited(lib.syncbn_backward_wait, made, timeout_ns, waits) != 0
            if not pending:
                ByCtypes.backward_finish(made, inputs, outputs)
        finally:
            if not pending:
                ByCtypes.backward_destroy(made)
        return made if pending else 0

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


def _attend(code: int, error: int) -> None:
    """Delivers the log. With a failed call's code: raises its error, and destroys the library's own."""
    try:
        _library.deliver_log()
    except BaseException:
        lib.syncbn_error_destroy(error)
        raise
    if code != 0:
        raise _library.take_error(code, c_void_p(error))


def _maker() -> Optional[Callable[[str, Any], Any]]:
    """A maker of the library's functions, by their names and an object that they keep. None: the interpreter has not what
    they need, or the library takes something else.
    """
    if sys.implementation.name != "cpython":
        return None
    try:
        addresses = [ctypes.cast(getattr(ctypes.pythonapi, name), c_void_p) for name in _PYTHON]
    except AttributeError:
        return None
    # Another way to the same function: it is called with the interpreter's lock.
    make = ctypes.PyDLL(str(_library.PATH), handle=lib._handle).syncbn_python_function
    make.restype = c_void_p  # With py_object, a NULL ends the process.
    make.argtypes = [c_void_p, c_size_t, c_char_p, ctypes.py_object]
    python = (c_void_p * len(addresses))(*addresses)

    def made(name: str, kept: Any) -> Any:
        address = make(python, len(addresses), name.encode(), kept)
        if address is None:
            return None
        found = ctypes.cast(address, ctypes.py_object).value
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(found))  # The reference that the library has given away.
        return found

    # A library of another version may take other functions of Python.
    return None if made("has_log", None) is None else made


function: Optional[Callable[[str, Any], Any]] = _maker()


def by_library() -> Any:
    """The calls as functions that the library makes, if it can."""
    if function is None:
        return None
    names = [name for name in vars(ByCtypes) if not name.startswith("_")]
    return SimpleNamespace(**{name: function(name, _attend) for name in names})


calls: Any = by_library() or ByCtypes
