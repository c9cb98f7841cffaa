"""Names and parameters that models give: of any type, and refused where they are of a wrong one."""

import json
from collections.abc import Mapping
from typing import Any

from tutti.backends.python.pb_utils.errors import TritonModelException
from tutti.core import errors


def text_of(name: Any) -> str:
    """A name that a model gives: text or, as in Triton, its bytes. Raises TypeError."""
    if isinstance(name, bytes):
        return name.decode()
    if not isinstance(name, str):
        raise TypeError(f"expected text, got a {type(name).__name__}")
    return name


def checked_parameters(values: str | Mapping[Any, Any]) -> dict[str, Any]:
    """Parameters that a model gives. Raises TritonModelException where they are of a type that is none of Triton's.

    But for floats: Triton's protocols have them, and its python backend has not.
    """
    parameters = json.loads(values) if isinstance(values, str) else dict(values)
    for key, value in parameters.items():
        if not isinstance(key, str):
            raise TritonModelException(f"Expect parameters keys to have type str, found type {type(key)}")
        if not isinstance(value, bool | int | str | float):
            raise TritonModelException(
                f"Expect parameters values to have type bool/int/str, found type {type(value)} ('{key}')"
            )
    return parameters


def are_parameters(parameters: Mapping[Any, Any]) -> bool:
    """Whether every protocol can carry these parameters of a response."""
    texts = [each for pair in parameters.items() for each in pair if isinstance(each, str)]
    return (
        all(isinstance(name, str) for name in parameters)
        and all(isinstance(value, bool | int | float | str) for value in parameters.values())
        and all(errors.sayable(text) == text for text in texts)
    )
