"""JSON that a user may have written: read within limits, and checked against the types of fields.

Types are Python's annotations, with :class:`Range`, :class:`OneOf` and :class:`Length` where these
say too little: ``Annotated[int, Range(1, 8)]``. A bool is no int here, and a list is a tuple.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import reprlib
import stat
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

MOST_BYTES = 16 << 20
"""Of a document: a hundred times what the largest table has."""

_MOST_DIGITS = 30

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 4, 60, 60


class DocumentError(ValueError):
    """A document, or a value in it, that cannot be; the message says which and why."""


@dataclass(frozen=True)
class Range:
    """The least and the greatest value of a number."""

    least: float
    most: float


@dataclass(frozen=True)
class OneOf:
    """The words that a string may be."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Length:
    """The least and the greatest number of a tuple's elements."""

    least: int
    most: int


def read(path: Path) -> Any:
    """The content of a JSON file. Numbers that no field can have come as infinities or NaN.

    Raises:
        FileNotFoundError: if there is none.
        DocumentError: if it is none: a FIFO, a device, too large, damaged, nested too deeply.
    """
    return parse(read_text(path))


def read_text(path: Path) -> str:
    """The content of a regular file; never waits for a FIFO or a device.

    Raises:
        FileNotFoundError: if there is none.
        DocumentError: if it is none, too large, or no text.
    """
    try:
        # Opening a FIFO without this would wait for whoever writes into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DocumentError("it is no regular file")
            if status.st_size > MOST_BYTES:
                raise DocumentError(f"it has {status.st_size} bytes, of at most {MOST_BYTES}")
            return file.read(MOST_BYTES).decode()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DocumentError(error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise DocumentError(f"it is no text in UTF-8: {error}") from error


def parse(text: str) -> Any:
    """The value of a JSON text; see :func:`read`.

    Raises:
        DocumentError: if it is no JSON, or nested too deeply.
    """

    def integer(digits: str) -> float:
        return int(digits) if len(digits) <= _MOST_DIGITS else math.inf

    try:
        return json.loads(text, parse_int=integer)
    except RecursionError:
        raise DocumentError("it is nested too deeply") from None
    except ValueError as error:
        raise DocumentError(f"it is no JSON: {error}") from error


def conform(value: Any, hint: Any, where: str) -> Any:
    """A value from JSON as a type has it.

    Raises:
        DocumentError: if it is none; ``where`` names it.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = conform(value, arguments[0], where)
        for limit in arguments[1:]:
            _check_limit(found, limit, where)
        return found
    if origin in (Union, UnionType):
        (kind,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else conform(value, kind, where)
    if origin is tuple:
        return _conform_tuple(value, arguments, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return record(value, hint, where)
    if hint is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise _unfit(value, "a finite number", where)
        return float(value)
    kinds = {int: "an int", str: "a printable string", bool: "true or false"}
    if hint not in kinds:
        assert origin in (Mapping, dict) or hint is dict, f"{where}: {hint}"
        if not isinstance(value, dict):
            raise _unfit(value, "an object", where)
        return value
    if type(value) is not hint or (hint is str and not value.isprintable()):
        raise _unfit(value, kinds[hint], where)
    return value


Record = typing.TypeVar("Record")


def record(value: Any, kind: type[Record], where: str) -> Record:
    """A dataclass from a JSON object with its fields.

    Raises:
        DocumentError: if it has others, lacks one without a default, or one does not conform.
    """
    assert dataclasses.is_dataclass(kind)
    if not isinstance(value, dict):
        raise _unfit(value, "an object", where)
    known = dataclasses.fields(kind)
    names = {field.name for field in known}
    needed = {
        field.name
        for field in known
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    what = where or "it"
    if unknown := sorted(value.keys() - names):
        raise DocumentError(f"{what} has no field {plain(', '.join(unknown))}")
    if missing := sorted(needed - value.keys()):
        raise DocumentError(f"{what} lacks {', '.join(missing)}")
    hints = _hints(kind)
    prefix = f"{where}." if where else ""
    return kind(**{name: conform(value[name], hints[name], prefix + name) for name in value})


def shown(value: object) -> str:
    """A value for a message: printable, on one line, and not long."""
    try:
        return plain(_SHORT.repr(value))
    except ValueError:  # an int of thousands of digits
        return f"<{type(value).__name__}>"


def plain(text: str) -> str:
    """A text for a message: printable, on one line, and not long."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200])
    return text if len(text) <= 80 else f"{text[:60]}..."


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _conform_tuple(value: Any, kinds: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _unfit(value, "a list", where)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _unfit(value, f"a list of {len(kinds)}", where)
    pairs = zip(value, kinds, strict=True)
    return tuple(conform(each, kind, f"{where}[{n}]") for n, (each, kind) in enumerate(pairs))


def _check_limit(value: Any, limit: object, where: str) -> None:
    if isinstance(limit, Range) and not limit.least <= value <= limit.most:
        raise _unfit(value, f"from {limit.least} to {limit.most}", where)
    if isinstance(limit, OneOf) and value not in limit.words:
        raise _unfit(value, f"one of {', '.join(limit.words)}", where)
    if isinstance(limit, Length) and not limit.least <= len(value) <= limit.most:
        what = "characters" if isinstance(value, str) else "elements"
        raise _unfit(value, f"of {limit.least} to {limit.most} {what}", where)


def _unfit(value: object, what: str, where: str) -> DocumentError:
    return DocumentError(f"{where or 'it'} must be {what}, not {shown(value)}")
