"""Checks of what callers pass: errors that name the argument, its value and its limit, before anything is sent."""

import math
import operator
import os
from typing import Any, Optional

import numpy as np

from syncbn import errors

# Limits of the protocol; the master's own limits may be narrower, and it tells them itself.
MOST_UINT32 = 2**32 - 1
MOST_SEQUENCE = 2**64 - 2  # 2**64 - 1 asks the library to count.
MOST_COUNT = 2**40
MOST_CHANNELS = 2**16
MOST_NAME_BYTES = 255
MOST_DESCRIPTION_BYTES = 1024
MOST_TOKEN_CHARACTERS = 1024
# In nanoseconds, an int64.
MOST_SECONDS = 9e9

_INVALID_ARGUMENT = 3


def refused(message: str) -> errors.Error:
    """A ValueError that is a `syncbn.Error` too."""
    return errors.make_error(message, _INVALID_ARGUMENT)


def integer(name: str, value: Any, least: int, most: int) -> int:
    """Any integer, those of NumPy included; no bool, and no float."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}; it has to be an integer")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; it has to be an integer") from None
    if not least <= number <= most:
        raise refused(f"{name} is {number}; it lies in {least} .. {most}")
    return number


def truth(name: str, value: Any) -> bool:
    """A bool, or 0 or 1; no text, since "no" would be true."""
    if not isinstance(value, (bool, int, np.bool_, np.integer)) or value not in (0, 1):
        raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; it has to be True or False")
    return bool(value)


def number(name: str, value: Any) -> float:
    """Any real number that is finite; True is 1 and False 0, as in the frameworks' own layers."""
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name} is {value!r}; it has to be a number")
    try:
        found = float(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; it has to be a number") from None
    if not math.isfinite(found):
        raise refused(f"{name} is {found}; it has to be finite")
    return found


def fraction(name: str, value: Any) -> float:
    found = number(name, value)
    if not 0 <= found <= 1:
        raise refused(f"{name} is {found}; it lies in 0 .. 1")
    return found


def not_negative(name: str, value: Any) -> float:
    found = number(name, value)
    if found < 0:
        raise refused(f"{name} is {found}; it has to be at least 0")
    return found


def seconds(name: str, value: Any, *, zero: bool = True) -> float:
    """A length of time, from 0 on, or above 0. No bool, which would be a switch of a wait."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}; it has to be a number of seconds")
    found = number(name, value)
    if found < 0 or (found == 0 and not zero):
        raise refused(f"{name} is {found:g} seconds; it has to be {'at least' if zero else 'more than'} 0")
    if found > MOST_SECONDS:
        raise refused(f"{name} is {found:g} seconds; it is at most {MOST_SECONDS:g}")
    return found


def patience(name: str, value: Any) -> Optional[float]:
    """The longest wait, in seconds; None, or infinity, is without a limit."""
    if value is None or (isinstance(value, float) and value == math.inf):
        return None
    return seconds(name, value)


def text(name: str, value: Any, most_bytes: int = MOST_NAME_BYTES, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; it has to be a string")
    if "\0" in value:
        raise refused(f"{name} is {value!r}; it must not contain a NUL character")
    try:
        length = len(value.encode())
    except UnicodeEncodeError:
        raise refused(f"{name} is {value!r}, which UTF-8 cannot express") from None
    if length == 0 and not empty:
        raise refused(f"{name} is empty")
    if length > most_bytes:
        raise refused(f"{name} has {length} bytes; it has at most {most_bytes}")
    return value


def token(value: Any) -> Optional[str]:
    """A token, or None. No error quotes it."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"token is of type {type(value).__name__}; it has to be a string")
    if not 1 <= len(value) <= MOST_TOKEN_CHARACTERS:
        raise refused(f"token has {len(value)} characters; it has 1 to {MOST_TOKEN_CHARACTERS}")
    if not all("!" <= character <= "~" for character in value):
        raise refused("token has a space or a character that is not printable ASCII; a token has neither")
    return value


def path(name: str, value: Any) -> Optional[str]:
    """The path of a file, as a string."""
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; it has to be a path")
    return text(name, os.fsdecode(value), 4096)


def choice(name: str, value: Any, choices: Any) -> Any:
    """The value of one of the words that `choices` maps."""
    if not isinstance(value, str) or value not in choices:
        raise refused(f"{name} is {value!r}; it is one of {', '.join(map(repr, choices))}")
    return choices[value]


def vector(name: str, value: Any) -> np.ndarray:
    """One float64 for each element of an array of real numbers, flat."""
    if isinstance(value, np.ma.MaskedArray):  # Its mask would be lost, and the masked values be taken for numbers.
        raise TypeError(f"{name} is a numpy.ma.MaskedArray; give its data with the masked values filled in, as by filled()")
    array = np.asarray(value)
    # bfloat16 and its like, which NumPy does not know as numbers.
    foreign = array.dtype.kind == "V" and array.dtype.names is None and array.dtype.name.startswith(("bfloat", "float"))
    if array.dtype.kind not in "fiub" and not foreign:
        raise TypeError(f"{name} has elements of type {array.dtype}; they have to be real numbers")
    return np.ascontiguousarray(array, dtype=np.float64).reshape(-1)
