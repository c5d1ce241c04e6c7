"""client/python/syncbn/_library.py declares what client/c/syncbn.h declares: structs, functions and constants.

The header's text gives the names and types; a C program, compiled here, gives every size, offset and value.
"""

import ctypes
import logging
import pathlib
import re
import subprocess
from ctypes import POINTER
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import pytest

from syncbn import _library

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEADER = ROOT / "client/c/syncbn.h"
# Python passes the address of the first and never calls it. The second takes and gives objects of Python: _calls.py
# declares it, and test_calls.py compares what it makes with what ctypes does.
NOT_MIRRORED = {"syncbn_log_keep", "syncbn_python_function"}
SCALARS = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "size_t": ctypes.c_size_t,
    "double": ctypes.c_double,
    "syncbn_code": ctypes.c_int32,
}
POINTERS = {
    "char*": ctypes.c_char_p,
    "void*": ctypes.c_void_p,
    "double*": POINTER(ctypes.c_double),
    "int32_t*": POINTER(ctypes.c_int32),
    "uint32_t**": POINTER(POINTER(ctypes.c_uint32)),
}


class Header(NamedTuple):
    """Declarations, each as written: type and name."""

    structs: Dict[str, List[Tuple[str, str]]]
    functions: Dict[str, Tuple[str, List[Tuple[str, str]]]]
    constants: List[str]
    handles: List[str]
    callbacks: List[str]


def declaration(text: str) -> Tuple[str, str]:
    """Type and name of "const char* name"; the type without const and spaces."""
    found = re.fullmatch(r"(.*?)(\w+)", re.sub(r"\bconst\b", "", text).strip())
    assert found, text
    return re.sub(r"\s", "", found[1]), found[2]


def parse(text: str) -> Header:
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    structs = {
        name: [declaration(field) for field in body.split(";")[:-1]]
        for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", text, re.DOTALL)
    }
    functions = {}
    for result, name, arguments in re.findall(r"^SYNCBN_API ([^;(]*?)(\w+)\(([^)]*)\);", text, re.MULTILINE):
        given = [] if arguments == "void" else [declaration(argument) for argument in arguments.split(",")]
        functions[name] = (declaration(result + "x")[0], given)
    enumerators = [name for body in re.findall(r"^enum \{(.*?)\};", text, re.DOTALL | re.MULTILINE)
                   for name in re.findall(r"(\w+) =", body)]
    macros = [name for name in re.findall(r"^#define (SYNCBN_\w+) \S", text, re.MULTILINE)
              if not name.endswith(("_INIT", "_API"))]
    return Header(structs, functions, enumerators + macros, re.findall(r"typedef struct (\w+) \1;", text),
                  re.findall(r"\(\*(\w+)\)\(", text))


def program(header: Header) -> str:
    """Prints "NAME VALUE": sizes of structs, offsets and sizes of their fields, and the constants."""
    lines = [
        f'printf({name} > 0 ? "{name} %llu\\n" : "{name} %lld\\n", (unsigned long long){name});'
        for name in header.constants
    ]
    for name, fields in header.structs.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for _, field in fields:
            lines.append(f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
            lines.append(f'printf("{name}.{field}:size %zu\\n", sizeof((({name}*)0)->{field}));')
    body = "\n  ".join(lines)
    return f'#include <stddef.h>\n#include <stdio.h>\n#include "syncbn.h"\nint main(void) {{\n  {body}\n  return 0;\n}}\n'


def values(text: str, header: Header, folder: pathlib.Path) -> Dict[str, int]:
    (folder / "syncbn.h").write_text(text)
    (folder / "print.c").write_text(program(header))
    subprocess.run(["cc", "-std=c11", "-I", folder, folder / "print.c", "-o", folder / "print"], check=True, timeout=300)
    printed = subprocess.run([folder / "print"], check=True, capture_output=True, text=True, timeout=60).stdout
    return {name: int(value) for name, value in (line.split() for line in printed.splitlines())}


def python_struct(name: str) -> Any:
    """syncbn_worker_options: _library.WorkerOptions."""
    return getattr(_library, "".join(word.capitalize() for word in name.split("_")[1:]), None)


def python_type(written: str, header: Header) -> Any:
    """The ctypes type that stands for a type of the header."""
    if written in SCALARS:
        return SCALARS[written]
    if written in header.structs:
        return python_struct(written)
    if written == "syncbn_target_function":
        return _library.TARGET_FUNCTION
    if written in header.callbacks or (written[:-1] in header.handles and written.endswith("*")):
        return ctypes.c_void_p
    if written.endswith("**") and written[:-2] in header.handles:
        return POINTER(ctypes.c_void_p)
    if written[:-1] in header.structs and written.endswith("*"):
        return POINTER(python_struct(written[:-1]))
    return POINTERS.get(written)


def field_type(written: str, header: Header) -> Any:
    """As python_type; data of any type is void* in a struct."""
    return ctypes.c_void_p if written in ("uint8_t*", "int64_t*") else python_type(written, header)


def result_type(written: str, header: Header) -> Any:
    return None if written == "void" else python_type(written, header)


def python_constant(name: str) -> Any:
    """SYNCBN_FLOAT32: _library.FLOAT32; those of which Python has a table, by their place in it."""
    short = name[len("SYNCBN_"):]
    for prefix, table in (("EPS_", _library.EPS_MODES), ("NUMERIC_", _library.NUMERIC_POLICIES)):
        if short.startswith(prefix):
            return table.get(short[len(prefix):].lower())
    if short.startswith("LOG_"):
        return getattr(logging, short[len("LOG_"):], None)
    return getattr(_library, short.replace("API_VERSION_", "API_"), None)


def struct_differences(header: Header, measured: Dict[str, int]) -> List[str]:
    found = []
    for name, fields in header.structs.items():
        mirror = python_struct(name)
        if mirror is None:
            found.append(f"{name} is missing")
            continue
        ours = [field for field, _ in mirror._fields_]
        if ours != [field for _, field in fields]:
            found.append(f"{name} has the fields {ours}")
            continue
        if ctypes.sizeof(mirror) != measured[name]:
            found.append(f"{name} has {ctypes.sizeof(mirror)} bytes, not {measured[name]}")
        for (written, field), (_, type_) in zip(fields, mirror._fields_):
            place = getattr(mirror, field)
            if (place.offset, place.size) != (measured[f"{name}.{field}"], measured[f"{name}.{field}:size"]):
                found.append(f"{name}.{field} lies at {place.offset} with {place.size} bytes")
            if type_ is not field_type(written, header):
                found.append(f"{name}.{field} is {type_.__name__}, not {written}")
    return found


def function_differences(header: Header) -> List[str]:
    found = [f"{name} is not in the header" for name in _library._PROTOTYPES if name not in header.functions]
    for name, (result, arguments) in header.functions.items():
        if name in NOT_MIRRORED:
            continue
        expected = (result_type(result, header), [python_type(written, header) for written, _ in arguments])
        if _library._PROTOTYPES.get(name) != expected:
            found.append(f"{name} is {_library._PROTOTYPES.get(name)}, not {expected}")
    return found


def differences(text: str, folder: pathlib.Path) -> List[str]:
    header = parse(text)
    measured = values(text, header, folder)
    constants = [f"{name} is {python_constant(name)}, not {measured[name]}" for name in header.constants
                 if python_constant(name) != measured[name]]
    return struct_differences(header, measured) + function_differences(header) + constants


def test_python_declares_what_the_header_does(tmp_path: pathlib.Path) -> None:
    text = HEADER.read_text()
    header = parse(text)
    assert len(header.structs) == text.count("typedef struct") - len(header.handles) >= 10
    assert len(header.functions) == len(re.findall("^SYNCBN_API", text, re.MULTILINE)) >= 55
    assert len(header.constants) >= 25 and len(header.handles) >= 6
    assert differences(text, tmp_path) == []


def replace(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    "change, named",
    [
        (replace("} syncbn_pass_options;", "int32_t more; } syncbn_pass_options;"), "syncbn_pass_options"),
        (replace("  int64_t spatial;", "  int32_t spatial;"), "syncbn_tensor"),
        (replace("  double eps;", "  int64_t eps;"), "syncbn_layer_options.eps"),
        (replace("SYNCBN_LAYER_SUM = 2", "SYNCBN_LAYER_SUM = 3"), "SYNCBN_LAYER_SUM"),
        (replace("SYNCBN_EPS_CLAMP = 1", "SYNCBN_EPS_CLAMP = 1, SYNCBN_EPS_MORE = 2"), "SYNCBN_EPS_MORE"),
        (replace("SYNCBN_NEXT_SEQUENCE UINT64_MAX", "SYNCBN_NEXT_SEQUENCE 7"), "SYNCBN_NEXT_SEQUENCE"),
        (replace("void syncbn_worker_interrupt(syncbn_worker* worker)", "void syncbn_worker_interrupt(syncbn_worker* worker, int32_t now)"), "syncbn_worker_interrupt"),
        (replace("uint64_t syncbn_worker_run_id", "uint32_t syncbn_worker_run_id"), "syncbn_worker_run_id"),
        (replace("SYNCBN_API void syncbn_set_log", "SYNCBN_API void syncbn_new(void);\nSYNCBN_API void syncbn_set_log"), "syncbn_new"),
    ],
    ids=["field", "size", "type", "value", "enumerator", "macro", "argument", "result", "function"],
)
def test_a_change_of_the_header_alone_is_found(
    tmp_path: pathlib.Path, change: Callable[[str], str], named: str
) -> None:
    text = HEADER.read_text()
    assert change(text) != text
    found = differences(change(text), tmp_path)
    assert found and all(difference.startswith(named) for difference in found), found
