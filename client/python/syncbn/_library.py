"""libsyncbn.so through ctypes: the structs and prototypes of syncbn.h, and nothing above them.

`ctypes.CDLL` releases the interpreter's lock for the length of each call.
"""

import atexit
import ctypes
import itertools
import logging
import os
import pathlib
import struct
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from syncbn import _forks, errors

API_MAJOR, API_MINOR = 0, 1

PENDING = -1
NEXT_SEQUENCE = 2**64 - 1
MISSING_FAIL, MISSING_PROCEED, MISSING_WAIT = 1, 2, 3
LAYER_BATCH_NORM, LAYER_SUM = 1, 2
PHASE_FORWARD, PHASE_BACKWARD, PHASE_SUM = 1, 2, 3
EPS_MODES = {"add": 0, "clamp": 1}
NUMERIC_POLICIES = {"refuse": 0, "propagate": 1}
BACKWARD_REQUIRED, BACKWARD_IF_REQUIRED, BACKWARD_NONE = 1, 2, 3
FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = 0, 1, 2, 3
CHANNELS_FIRST, CHANNELS_LAST = 0, 1
DEVICE_CPU, DEVICE_CUDA = 0, 1


class _Options(ctypes.Structure):
    """A struct that begins with its size, as the interface's options do."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(type(self)), **fields)


TARGET_FUNCTION = ctypes.CFUNCTYPE(c_int32, POINTER(ctypes.c_char), c_size_t, c_void_p)


class MasterOptions(_Options):
    _fields_ = [
        ("struct_size", c_size_t),
        ("address", c_char_p),
        ("insecure", c_int32),
        ("cert_file", c_char_p),
        ("key_file", c_char_p),
        ("trusted_ca_file", c_char_p),
        ("client_cert_auth", c_int32),
        ("token", c_char_p),
        ("state_dir", c_char_p),
    ]


class WorkerOptions(_Options):
    _fields_ = [
        ("struct_size", c_size_t),
        ("target", c_char_p),
        ("job", c_char_p),
        ("group", c_char_p),
        ("rank", c_uint32),
        ("world_size", c_uint32),
        ("generation", c_uint64),
        ("round_timeout_ns", c_int64),
        ("join_timeout_ns", c_int64),
        ("rejoin_grace_ns", c_int64),
        ("missing_policy", c_int32),
        ("min_workers", c_uint32),
        ("description", c_char_p),
        ("trusted_ca_file", c_char_p),
        ("cert_file", c_char_p),
        ("key_file", c_char_p),
        ("find_target", TARGET_FUNCTION),
        ("find_target_user", c_void_p),
        ("token", c_char_p),
        ("join_cancelled", POINTER(c_int32)),
    ]


class LayerOptions(_Options):
    _fields_ = [
        ("struct_size", c_size_t),
        ("name", c_char_p),
        ("channels", c_uint32),
        ("kind", c_int32),
        ("eps", c_double),
        ("eps_mode", c_int32),
        ("numeric_policy", c_int32),
        ("has_momentum", c_int32),
        ("momentum", c_double),
        ("biased_running_variance", c_int32),
    ]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("batch", c_int64),
        ("channels", c_int64),
        ("spatial", c_int64),
        ("type", c_int32),
        ("layout", c_int32),
        ("device", c_int32),
        ("device_index", c_int32),
    ]


class Vector(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("type", c_int32)]


class PassOptions(_Options):
    _fields_ = [
        ("struct_size", c_size_t),
        ("num_threads", c_int32),
        ("stream", c_void_p),
        ("backward_role", c_int32),
        ("has_sequence", c_int32),
        ("sequence", c_uint64),
        ("stream_ordered", c_int32),
        ("again", c_int64),
    ]


class ForwardOutputs(_Options):
    _fields_ = [
        ("struct_size", c_size_t),
        ("weight", Vector),
        ("bias", Vector),
        ("running_mean", Vector),
        ("running_var", Vector),
        ("momentum", c_double),
        ("residual", c_void_p),
        ("relu", c_int32),
        ("relu_mask", c_void_p),
        ("y", Tensor),
        ("batches", c_void_p),
        ("cumulative", c_int64),
    ]


class BackwardInputs(_Options):
    _fields_ = [
        ("struct_size", c_size_t),
        ("dy", Tensor),
        ("x", c_void_p),
        ("weight", Vector),
        ("bias", Vector),
        ("relu", c_int32),
        ("relu_mask", c_void_p),
    ]


class BackwardOutputs(_Options):
    _fields_ = [
        ("struct_size", c_size_t),
        ("dx", c_void_p),
        ("d_residual", c_void_p),
        ("d_weight", Vector),
        ("d_bias", Vector),
    ]


class EvaluateOptions(_Options):
    _fields_ = [
        ("struct_size", c_size_t),
        ("num_threads", c_int32),
        ("stream", c_void_p),
        ("mean", Vector),
        ("var", Vector),
        ("weight", Vector),
        ("bias", Vector),
        ("eps", c_double),
        ("residual", c_void_p),
        ("relu", c_int32),
        ("relu_mask", c_void_p),
    ]


_FORMATS = {c_double: "d", c_int32: "i", c_int64: "q", c_size_t: "Q", c_uint64: "Q", c_void_p: "Q"}


def _members(kind: Any) -> Iterator[Tuple[int, int, str]]:
    """Offset, size and format of a struct's members in memory: see `_layout`."""
    for are_vectors, fields in itertools.groupby(kind._fields_, lambda field: field[1] is Vector):
        row = list(fields)
        if are_vectors:
            size = len(row) * ctypes.sizeof(Vector)
            yield getattr(kind, row[0][0]).offset, size, f"{size}s"
            continue
        for name, member in row:
            offset, size = getattr(kind, name).offset, ctypes.sizeof(member)
            if member is Tensor:
                address = ctypes.sizeof(c_void_p)
                yield offset, address, _FORMATS[c_void_p]
                yield offset + address, size - address, f"{size - address}s"
            else:
                yield offset, size, _FORMATS[member]


def _layout(kind: Any) -> struct.Struct:
    """Packs a struct from its members in order, NULL as 0: several times as fast as to make the struct.

    A row of Vectors counts as one member, their bytes; a Tensor as two, its address and the bytes of the rest.
    """
    text, end = "=", 0
    for offset, size, member in _members(kind):
        text += "x" * (offset - end) + member
        end = offset + size
    return struct.Struct(text + "x" * (ctypes.sizeof(kind) - end))


TENSOR = _layout(Tensor)
VECTOR = _layout(Vector)
PASS_OPTIONS = _layout(PassOptions)
FORWARD_OUTPUTS = _layout(ForwardOutputs)
BACKWARD_INPUTS = _layout(BackwardInputs)
BACKWARD_OUTPUTS = _layout(BackwardOutputs)
EVALUATE_OPTIONS = _layout(EvaluateOptions)

ADDRESS_SIZE = ctypes.sizeof(c_void_p)  # The first bytes of a struct Tensor; what follows is its form.

_HANDLE = c_void_p  # syncbn_worker*, syncbn_round* and so on.
_HANDLE_OUT = POINTER(c_void_p)
_RANKS_OUT = POINTER(POINTER(c_uint32))
_DOUBLES = POINTER(c_double)

# Name: (result, arguments). Where the last argument is _ERROR, the function returns a code and is called through
# `call`.
_ERROR = _HANDLE_OUT
_PROTOTYPES: Dict[str, Tuple[Any, List[Any]]] = {
    "syncbn_api_version": (c_uint32, []),
    "syncbn_version": (c_char_p, []),
    "syncbn_build_info": (c_char_p, []),
    "syncbn_error_destroy": (None, [_HANDLE]),
    "syncbn_error_code": (c_int32, [_HANDLE]),
    "syncbn_error_reason": (c_char_p, [_HANDLE]),
    "syncbn_error_message": (c_char_p, [_HANDLE]),
    "syncbn_error_layer": (c_char_p, [_HANDLE]),
    "syncbn_error_ranks": (c_size_t, [_HANDLE, _RANKS_OUT]),
    "syncbn_set_log": (None, [c_void_p, c_void_p]),
    "syncbn_log_take": (c_int32, [c_char_p, c_size_t]),
    "syncbn_master_start": (c_int32, [POINTER(MasterOptions), _HANDLE_OUT, _ERROR]),
    "syncbn_master_target": (c_char_p, [_HANDLE]),
    "syncbn_master_serve_http": (c_int32, [_HANDLE, c_char_p, c_char_p, _ERROR]),
    "syncbn_master_http_address": (c_char_p, [_HANDLE]),
    "syncbn_master_workers": (c_size_t, [_HANDLE]),
    "syncbn_master_shutdown": (None, [_HANDLE, c_int64]),
    "syncbn_master_destroy": (None, [_HANDLE]),
    "syncbn_make_certificate": (c_int32, [c_char_p, c_char_p, c_char_p, _ERROR]),
    "syncbn_worker_join": (c_int32, [POINTER(WorkerOptions), _HANDLE_OUT, _ERROR]),
    "syncbn_worker_leave": (c_int32, [_HANDLE, c_char_p, _ERROR]),
    "syncbn_worker_close": (None, [_HANDLE]),
    "syncbn_worker_destroy": (None, [_HANDLE]),
    "syncbn_worker_rank": (c_uint32, [_HANDLE]),
    "syncbn_worker_world_size": (c_uint32, [_HANDLE]),
    "syncbn_worker_incarnation": (c_uint64, [_HANDLE]),
    "syncbn_worker_run_id": (c_uint64, [_HANDLE]),
    "syncbn_worker_shares_memory": (c_int32, [_HANDLE]),
    "syncbn_worker_wait_for_members": (c_int32, [_HANDLE, c_int64, _ERROR]),
    "syncbn_worker_resume_at": (c_int32, [_HANDLE, c_uint64, _ERROR]),
    "syncbn_worker_resume_layer_at": (c_int32, [_HANDLE, c_char_p, c_int32, c_uint64, _ERROR]),
    "syncbn_worker_next_rounds": (c_int32, [_HANDLE, _HANDLE_OUT, _ERROR]),
    "syncbn_worker_newest_rounds": (c_int32, [_HANDLE, _HANDLE_OUT, _ERROR]),
    "syncbn_rounds_size": (c_size_t, [_HANDLE]),
    "syncbn_rounds_layer": (c_char_p, [_HANDLE, c_size_t]),
    "syncbn_rounds_phase": (c_int32, [_HANDLE, c_size_t]),
    "syncbn_rounds_sequence": (c_uint64, [_HANDLE, c_size_t]),
    "syncbn_rounds_destroy": (None, [_HANDLE]),
    "syncbn_worker_interrupt": (None, [_HANDLE]),
    "syncbn_worker_settle": (c_int32, [_HANDLE, c_int64, _ERROR]),
    "syncbn_worker_declare_layer": (c_int32, [_HANDLE, POINTER(LayerOptions), _ERROR]),
    "syncbn_round_start_forward": (
        c_int32,
        [_HANDLE, c_char_p, c_uint64, c_int64, _DOUBLES, _DOUBLES, c_size_t, c_int32, _HANDLE_OUT, _ERROR],
    ),
    "syncbn_round_start_backward": (
        c_int32,
        [_HANDLE, c_char_p, c_uint64, _DOUBLES, _DOUBLES, c_size_t, _HANDLE_OUT, _ERROR],
    ),
    "syncbn_round_start_sum": (c_int32, [_HANDLE, c_char_p, c_uint64, _DOUBLES, c_size_t, _HANDLE_OUT, _ERROR]),
    "syncbn_worker_flush": (c_int32, [_HANDLE, _ERROR]),
    "syncbn_round_wait": (c_int32, [_HANDLE, c_int64, _ERROR]),
    "syncbn_round_sequence": (c_uint64, [_HANDLE]),
    "syncbn_round_count": (c_int64, [_HANDLE]),
    "syncbn_round_length": (c_size_t, [_HANDLE]),
    "syncbn_round_first": (_DOUBLES, [_HANDLE]),
    "syncbn_round_second": (_DOUBLES, [_HANDLE]),
    "syncbn_round_backward_required": (c_int32, [_HANDLE]),
    "syncbn_round_missing_ranks": (c_size_t, [_HANDLE, _RANKS_OUT]),
    "syncbn_round_destroy": (None, [_HANDLE]),
    "syncbn_stream_order_check": (c_int32, [c_int32, _ERROR]),
    "syncbn_forward_start": (c_int32, [_HANDLE, c_char_p, POINTER(Tensor), POINTER(PassOptions), _HANDLE_OUT, _ERROR]),
    "syncbn_forward_wait": (c_int32, [_HANDLE, c_int64, _ERROR]),
    "syncbn_forward_finish": (c_int32, [_HANDLE, POINTER(Tensor), POINTER(ForwardOutputs), _ERROR]),
    "syncbn_forward_stream_ordered": (c_int32, [_HANDLE]),
    "syncbn_forward_sequence": (c_uint64, [_HANDLE]),
    "syncbn_forward_count": (c_int64, [_HANDLE]),
    "syncbn_forward_mean": (_DOUBLES, [_HANDLE]),
    "syncbn_forward_var": (_DOUBLES, [_HANDLE]),
    "syncbn_forward_backward_required": (c_int32, [_HANDLE]),
    "syncbn_forward_destroy": (None, [_HANDLE]),
    "syncbn_backward_start": (c_int32, [_HANDLE, POINTER(BackwardInputs), POINTER(PassOptions), _HANDLE_OUT, _ERROR]),
    "syncbn_backward_wait": (c_int32, [_HANDLE, c_int64, _ERROR]),
    "syncbn_backward_finish": (c_int32, [_HANDLE, POINTER(BackwardInputs), POINTER(BackwardOutputs), _ERROR]),
    "syncbn_backward_destroy": (None, [_HANDLE]),
    "syncbn_evaluate": (c_int32, [POINTER(Tensor), POINTER(EvaluateOptions), c_void_p, _ERROR]),
    "syncbn_evaluate_backward": (
        c_int32,
        [POINTER(BackwardInputs), POINTER(EvaluateOptions), POINTER(BackwardOutputs), _ERROR],
    ),
}

# Structs of passes, for which the functions take their bytes as well.
_PACKED = (Tensor, PassOptions, ForwardOutputs, BackwardInputs, BackwardOutputs, EvaluateOptions)
_MAY_BE_PACKED = [POINTER(kind) for kind in _PACKED]


def library_path() -> pathlib.Path:
    """$SYNCBN_LIBRARY, else libsyncbn.so beside this file; absolute."""
    return pathlib.Path(os.environ.get("SYNCBN_LIBRARY") or pathlib.Path(__file__).with_name("libsyncbn.so")).absolute()


def _load_mode() -> int:
    """The mode of binding the library's symbols: to its own gRPC, protobuf and Abseil, whatever else the process has.

    TensorFlow loads its own copies of them for everyone (RTLD_GLOBAL), of other versions under the same names. But what
    is preloaded wants to be bound first: an allocator that replaces malloc, or a sanitizer.
    """
    own_first = 0 if os.environ.get("LD_PRELOAD") else getattr(os, "RTLD_DEEPBIND", 0)
    return os.RTLD_NOW | os.RTLD_LOCAL | own_first


def _load() -> ctypes.CDLL:
    path = PATH
    try:
        loaded = ctypes.CDLL(str(path), mode=_load_mode())
    except OSError as error:
        raise ImportError(
            f"syncbn cannot load its library {path}: {error}. "
            "Set SYNCBN_LIBRARY to a libsyncbn.so (//client/c:libsyncbn.so builds one)."
        ) from error
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(loaded, name)
        function.restype = result
        function.argtypes = [c_void_p if argument in _MAY_BE_PACKED else argument for argument in arguments]
    version = loaded.syncbn_api_version()
    major, minor = version >> 16, version & 0xFFFF
    if major != API_MAJOR or minor < API_MINOR:
        raise ImportError(
            f"{path} has interface {major}.{minor}; this package needs {API_MAJOR}.{API_MINOR} or a later minor"
        )
    return loaded


# Resolved once: the program may change its working directory, or its environment.
PATH = library_path()
lib = _load()


_logger = logging.getLogger("syncbn")
_LINE_BYTES = 8192


def deliver_log() -> None:
    """Gives what the library has to say to the logger "syncbn", on the calling thread.

    The library keeps its lines until then: called back, on any thread and at any time, the interpreter might be waiting
    for the thread that calls it, be ending, or lose a KeyboardInterrupt.
    """
    while lib.syncbn_log_take(None, 0):
        line = ctypes.create_string_buffer(_LINE_BYTES)
        level = lib.syncbn_log_take(line, _LINE_BYTES)
        if level:  # Else another thread has taken it.
            _logger.log(level, "%s", line.value.decode("utf-8", "replace"))


@atexit.register
def _end_log() -> None:
    """After the workers' end: nobody takes lines from here on."""
    deliver_log()
    lib.syncbn_set_log(None, None)


lib.syncbn_set_log(ctypes.cast(lib.syncbn_log_keep, c_void_p), None)


def take_error(code: int, handle: c_void_p) -> errors.Error:
    """The exception for a failed call; ends the handle."""
    if not handle:
        return errors.make_error("the library gave no detail", code)
    try:
        ranks = POINTER(c_uint32)()
        length = lib.syncbn_error_ranks(handle, ctypes.byref(ranks))
        message, reason, layer = (
            (field(handle) or b"").decode("utf-8", "replace")
            for field in (lib.syncbn_error_message, lib.syncbn_error_reason, lib.syncbn_error_layer)
        )
        return errors.make_error(message, code, reason, layer, ranks[:length] if length else ())
    finally:
        lib.syncbn_error_destroy(handle)


def call(function: Callable[..., int], *arguments: Any) -> int:
    """Calls a function that returns a code and takes an error; returns 0 or PENDING, raises for all others."""
    error = c_void_p()
    code = function(*arguments, ctypes.byref(error))
    if lib.syncbn_log_take(None, 0):
        deliver_log()
    if code in (0, PENDING):
        return code
    raise take_error(code, error)


def compute(function: Callable[..., int], *arguments: Any) -> None:
    """As `call`, for a function that never has anything to log, nor is pending."""
    error = c_void_p()
    code = function(*arguments, ctypes.byref(error))
    if code != 0:
        raise take_error(code, error)


def begin(function: Callable[..., int], *arguments: Any) -> int:
    """As `create`, for a pass, which has nothing to log before it is waited for."""
    handle, error = c_void_p(), c_void_p()
    code = function(*arguments, ctypes.byref(handle), ctypes.byref(error))
    if code != 0:
        raise take_error(code, error)
    assert handle.value
    return handle.value


def create(function: Callable[..., int], *arguments: Any) -> int:
    """As `call`, for a function that creates a handle; returns the handle."""
    handle = c_void_p()
    call(function, *arguments, ctypes.byref(handle))
    assert handle.value
    return handle.value


def text(value: Optional[Any]) -> Optional[bytes]:
    """A string or a path for a `const char*`; None stays NULL."""
    return None if value is None else os.fsencode(value) if isinstance(value, os.PathLike) else str(value).encode()


class Owned:
    """A handle of the library's, destroyed once, by the process that made it; silent also while the interpreter ends."""

    __slots__ = ("value", "_destroy", "_process", "_generation")

    def __init__(self, value: int, destroy: Callable[[int], None]) -> None:
        self._destroy = destroy
        self._process = _forks.here  # A module's names may be gone when the last handles go.
        self._generation = self._process.generation
        self.value: Optional[int] = value

    def __del__(self) -> None:
        value = getattr(self, "value", None)  # Ctrl-C may come before it has one.
        self.value = None
        if value is not None and self._process.generation == self._generation:
            self._destroy(value)
