"""What a v2 request must keep to in whatever form it comes: shapes, sizes, parameters, shared memory. Pure.

Sizes and positions are bytes. Rules follow Triton's.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

from tutti.core import dtypes
from tutti.core.errors import InvalidArgument, Unsupported
from tutti.core.types import Raw, Shape, SharedRegion, Tensor

MAX_DIMENSIONS = 32
MAX_ELEMENTS = 2**40
MAX_OUTPUTS = 1024
# Numbers so long may exceed 64 bits; orjson then reads them as floats.
_LONG_NUMBER = re.compile(rb"[:\s](-?[0-9]{19,})\s*[,}]")


def invalid(model: str, why: str) -> InvalidArgument:
    """Names the model, as every refusal of a request does."""
    return InvalidArgument(f"model '{model}': {why}")


class Regions(Protocol):
    """Clients' registered shared memory. Methods raise InferErrors."""

    def read(self, region: SharedRegion) -> bytes | bytearray: ...

    def check(self, region: SharedRegion) -> None:
        """Whether something may be written there."""


class NoRegions:
    """Where there is no shared memory."""

    def read(self, region: SharedRegion) -> bytes:
        raise Unsupported(f"shared memory region '{region.name}': shared memory is off")

    def check(self, region: SharedRegion) -> None:
        self.read(region)


NO_REGIONS = NoRegions()


_WANTS_END = "triton_enable_empty_final_response"


def check_parameters(model: str, parameters: Mapping[str, Any], text: Raw = b"", allows_end: bool = True) -> None:
    """A request's parameters are numbers, text or booleans, under names that are not the server's own.

    `text` is the JSON that they come from, which tells a whole number of more than 64 bits from a large float. With
    `allows_end` one of Triton's own names may be there, which asks a stream to tell its end. Raises InvalidArgument.
    """
    for key, value in parameters.items():
        if key.startswith("triton_") and not (allows_end and key == _WANTS_END):
            only = f"Only the following keys starting with 'triton_' are allowed: {_WANTS_END}; " if allows_end else ""
            raise invalid(
                model,
                "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified. "
                f"{only}got '{key}'",
            )
        if not isinstance(value, bool | int | float | str):
            raise invalid(
                model,
                f"parameter '{key}' has invalid type. It should be either 'int', 'bool', or 'string', or a number",
            )
        if type(value) is int and not -(2**63) <= value < 2**64:
            raise invalid(model, f"parameter '{key}': {value} does not fit 64 bits")
        if type(value) is float:
            _check_float(model, key, value, text)
        if key in _OF_THE_SERVER:
            _check_own(model, key, value)


# Parameters that the server itself reads, and their types: a value of another type would be ignored in silence.
_OF_THE_SERVER: dict[str, tuple[tuple[type, ...], str]] = {
    "priority": ((int,), "a whole number of 0 or more"),
    "timeout": ((int,), "a whole number of microseconds"),
    "sequence_id": ((int, str), "a whole number or text"),
    "sequence_start": ((bool,), "true or false"),
    "sequence_end": ((bool,), "true or false"),
}


def _check_own(model: str, key: str, value: Any) -> None:
    types, expected = _OF_THE_SERVER[key]
    if type(value) not in types or (key == "priority" and value < 0):
        raise invalid(model, f"invalid value type for '{key}' parameter, expected {expected}, got {value!r:.100}")


def _check_float(model: str, key: str, value: float, text: Raw) -> None:
    if not math.isfinite(value):
        raise invalid(model, f"parameter '{key}': expected a finite number, got {value}")
    if abs(value) >= 2**63 and any(float(number) == value for number in _LONG_NUMBER.findall(text)):
        raise invalid(model, f"parameter '{key}': {int(value)} does not fit 64 bits")


def shared_region(model: str, tensor: str, parameters: Mapping[str, Any]) -> SharedRegion | None:
    """The shared memory that a tensor's parameters name, if they name any. Raises InvalidArgument."""
    name = parameters.get("shared_memory_region")
    if name is None:
        return None
    size, offset = parameters.get("shared_memory_byte_size"), parameters.get("shared_memory_offset", 0)
    if not isinstance(name, str):
        raise invalid(model, f"{tensor}: 'shared_memory_region': expected a name")
    for key, value in (("shared_memory_byte_size", size), ("shared_memory_offset", offset)):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
            raise invalid(model, f"{tensor}: '{key}': expected a whole number, got {value!r}")
    assert isinstance(size, int) and isinstance(offset, int)
    return SharedRegion(name, offset, size)


def check_size(model: str, tensor: Tensor, size: int) -> None:
    """Raise InvalidArgument unless `size` bytes are what the tensor's shape and datatype take."""
    if tensor.datatype == "BYTES":
        return
    expected = math.prod(tensor.shape) * dtypes.NUMPY[tensor.datatype].itemsize
    if size != expected:
        shape = f"{tensor.datatype}{list(tensor.shape)}"
        raise InvalidArgument(
            f"input byte size mismatch for input '{tensor.name}' for model '{model}'. Expected {expected}, got {size}: "
            f"expected {expected} bytes for {shape}"
        )


def check_shape(model: str, name: str, shape: Shape) -> None:
    """Raise InvalidArgument for negative, too many or too large dimensions."""
    # Sizes of 0 are left out, as numpy does when it checks the total.
    product = math.prod(shape) if 0 not in shape else math.prod(size or 1 for size in shape)
    if product > MAX_ELEMENTS and min(shape) >= 0:
        most = f"causes total element count to exceed maximum size of {MAX_ELEMENTS}"
        raise invalid(model, f"input '{name}': 'shape' {list(shape)[:40]} {most}")
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0 or product > MAX_ELEMENTS:
        limits = f"at most {MAX_DIMENSIONS} sizes of 0 or more with a product of at most {MAX_ELEMENTS}"
        raise invalid(model, f"input '{name}': 'shape': expected {limits}, got {list(shape)[:40]}")


def check_classes(model: str, name: str, value: Any) -> int:
    """The `classification` parameter of an output. Raises InvalidArgument unless it is a whole number of 1 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise invalid(model, f"output '{name}': 'classification': expected a whole number of 1 or more, got {value!r}")
    return value
