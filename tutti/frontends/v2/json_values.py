"""JSON as v2 requests have it, and the values of tensors in it: to numpy arrays and back. Pure.

Knows no request: who reads one says which model and tensor are meant.
"""

import json
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import orjson

from tutti.core import dtypes
from tutti.core.types import Raw, Shape
from tutti.frontends.v2.rules import invalid

# How deep arrays in 'data' may be nested, whatever the tensor's rank. Triton's limit.
MAX_NESTING = 100
# So much of a value is told in an error.
_SHOWN = 40
# What an element is like, by the kind of its dtype: null and a number in quotes are none.
_LIKE = {
    "b": " (true or false)",
    "i": " (as -3)",
    "u": " (as 3)",
    "f": " (as 1.5, NaN without quotes, 1 and 0 for true and false)",
}
# The most that the JSON of one request may have.
MAX_CONTAINERS = 2**20
MAX_VALUES = 2**22
_UNCOUNTED_JSON_BYTES = 64 * 1024
_COUNTED_AT_ONCE = 1024 * 1024
_BOM = b"\xef\xbb\xbf"
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(text: Raw) -> Any:
    """JSON, with NaN, Infinity and -Infinity for numbers, which Triton and its clients write. Raises ValueError."""
    if len(text) > _UNCOUNTED_JSON_BYTES:
        _check_values(text)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        plain = bytes(text).removeprefix(_BOM)
        if b"NaN" in plain or b"Infinity" in plain:
            return _parse_not_finite(plain)
        if len(plain) == len(text):
            raise
        return orjson.loads(plain)


def _check_values(text: Raw) -> None:
    """Before it is parsed: each value takes up to forty times its text. Raises ValueError."""
    containers = values = 0
    for start in range(0, len(text), _COUNTED_AT_ONCE):
        piece = bytes(text[start : start + _COUNTED_AT_ONCE])
        containers += piece.count(b"[") + piece.count(b"{")
        values += piece.count(b",")
    if containers > MAX_CONTAINERS or values > MAX_VALUES:
        limits = f"{MAX_CONTAINERS} arrays and objects, or {MAX_VALUES} values"
        raise ValueError(f"it has more than {limits}: send tensors as binary data")


def _parse_not_finite(text: bytes) -> Any:
    """By Python's parser, which is laxer: its text may hold halves of surrogate pairs, which no encoding carries."""
    try:
        value = json.loads(text.decode())
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if _ESCAPED_SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text has half of a surrogate pair") from None
    return value


def is_not_finite(data: Any) -> bool:
    """Whether numbers are among `data` that plain JSON has no word for."""
    return isinstance(data, np.ndarray) and data.dtype.kind == "f" and not np.isfinite(data).all()


def from_json(model: str, name: str, datatype: str, shape: Shape, data: Any) -> Any:
    """The numpy array of a JSON value. Raises InvalidArgument."""
    flat: list[Any] = []
    if not _flatten(data if isinstance(data, list) else [data], flat, MAX_NESTING):
        problem = f"JSON nesting depth exceeds maximum allowed limit ({MAX_NESTING})"
        raise invalid(model, f"input '{name}': {problem}: 'data' is nested more than that")
    if len(flat) != math.prod(shape):
        raise invalid(
            model,
            f"input '{name}': Unable to parse 'data': Shape does not match true shape of 'data' field: expected "
            f"{math.prod(shape)} elements for shape {list(shape)}, got {len(flat)}",
        )
    if datatype in ("FP16", "BF16") and flat:
        problem = (
            f"receiving {datatype} data via JSON is not supported. Please use the binary data format for input {name}"
        )
        raise invalid(model, f"{problem}: its data must be binary")
    if datatype == "BYTES":
        return _text_array(model, name, flat).reshape(shape)
    kind = dtypes.NUMPY[datatype].kind
    allowed = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float)}[kind]
    if not set(map(type, flat)) <= set(allowed):
        for element in [element for element in flat if type(element) not in allowed][:1]:
            raise invalid(
                model,
                f"input '{name}': Unable to parse 'data': attempt to access JSON {_accessed(datatype)}: expected "
                f"{datatype} elements{_LIKE[kind]}, got {shown(element)}",
            )
    try:
        with np.errstate(over="ignore"):  # a number that is too large becomes infinity
            return np.array(flat, dtype=dtypes.NUMPY[datatype]).reshape(shape)
    except OverflowError:
        raise invalid(model, f"input '{name}': an element does not fit {datatype}") from None


def shown(value: Any) -> str:
    """A value as the request's JSON has it, or the beginning of it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _accessed(datatype: str) -> str:
    """What Triton's reader calls an element that is of another type than a datatype's."""
    kinds = {
        "b": "non-boolean as boolean", "i": "non-signed-integer as signed-integer",
        "u": "non-unsigned-integer as unsigned-integer", "f": "non-number as double", "O": "non-string as string",
    }  # fmt: skip
    return kinds[dtypes.NUMPY[datatype].kind]


def _flatten(value: list[Any], flat: list[Any], depth: int) -> bool:
    """Append the elements to `flat`; False when they lie deeper than `depth`."""
    for item in value:
        if not isinstance(item, list):
            flat.append(item)
        elif not depth or not _flatten(item, flat, depth - 1):
            return False
    return True


def _text_array(model: str, name: str, flat: list[Any]) -> Any:
    for element in [element for element in flat if not isinstance(element, str)][:1]:
        raise invalid(
            model,
            f"input '{name}': Unable to parse JSON bytes array: attempt to access JSON {_accessed('BYTES')}: expected "
            f"BYTES elements as strings, got {shown(element)}",
        )
    array = np.empty(len(flat), dtype=object)
    array[:] = [element.encode() for element in flat]
    return array


def texts(model: str, name: str, elements: Iterable[Any]) -> list[str]:
    """BYTES elements as JSON has them. Raises InvalidArgument for what is no UTF-8: other bytes would come out."""
    decoded = []
    for element in elements:
        try:
            decoded.append(element.decode() if isinstance(element, bytes) else str(element))
        except UnicodeDecodeError as error:
            problem = f"element {len(decoded)} is no UTF-8, and JSON cannot carry it: ask for binary data ({error})"
            raise invalid(model, f"output '{name}': {problem}") from None
    return decoded
