"""Conditions as they are written in Python: each operation is checked where it stands, by conditions.py's rules."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tutti.core.errors import ConfigError
from tutti.ensembles import conditions
from tutti.ensembles.conditions import ConditionError, Kind
from tutti.ensembles.functions import FUNCTIONS

Value = bool | int | float | str
_BINDS = "; in Python & | ~ bind closer than comparisons: (a > 1) & (b > 2)"


def _refused(subject: str, instead: str) -> Any:
    """A method of what Python offers and conditions do not have."""

    def refuse(self: "Expression", *_: object, **__: object) -> Any:
        raise ConfigError(f"{self!r}: {subject} is not known before a request comes; expected {instead}")

    return refuse


_SIGNS = "comparisons, + - * /, and & | ~ for and, or, not"
_METHODS = "t[0], or t.max(), min(), mean(), sum(), argmax(), count()"
_COMBINED = "& | ~ for and, or, not, each comparison in parentheses, as (a > 0) & (a < 1), and graph.where(...) for if"


class Expression:
    """A condition, or a number or text in one; combined with comparisons, + - * /, and & | ~ for and, or, not.

    Raises ConfigError where an operation does not fit what it takes.
    """

    # Makes numpy's numbers leave the comparison with an expression to the expression.
    __array_ufunc__ = None

    def __init__(self, parts: "Sequence[str | Tensor]") -> None:
        self.parts = list(parts)

    def tensors(self) -> "Iterator[Tensor]":
        return (part for part in self.parts if isinstance(part, Tensor))

    def render(self, names: Mapping[int, str]) -> str:
        """In the language of conditions.py; `names` are the tensors' by identity."""
        return "".join(names[id(part)] if isinstance(part, Tensor) else part for part in self.parts)

    def kind(self) -> Kind | None:
        """What it comes to; None where that shows only in the whole graph. Raises ConfigError where it cannot be."""
        tensors = list(self.tensors())
        if not all(tensor.is_sure for tensor in tensors):
            return None
        try:
            text = self.render({id(tensor): conditions.quoted(tensor.name) for tensor in tensors})
            return conditions.kind_of(text, {tensor.name: (tensor.datatype, tensor.dims) for tensor in tensors})
        except ConditionError as error:
            hint = _BINDS if any(f" {word} " in "".join(map(str, self.parts)) for word in ("and", "or")) else ""
            raise ConfigError(f"{self!r:.200}: {error}{hint}") from None

    def __repr__(self) -> str:
        return f"condition {bare(self.render({id(tensor): tensor.name for tensor in self.tensors()}))}"

    def __gt__(self, other: "Operand") -> "Expression":
        return self._with(">", other)

    def __ge__(self, other: "Operand") -> "Expression":
        return self._with(">=", other)

    def __lt__(self, other: "Operand") -> "Expression":
        return self._with("<", other)

    def __le__(self, other: "Operand") -> "Expression":
        return self._with("<=", other)

    def __eq__(self, other: object) -> "Expression":  # type: ignore[override]
        return self._with("==", other)

    def __ne__(self, other: object) -> "Expression":  # type: ignore[override]
        return self._with("!=", other)

    __hash__ = object.__hash__

    def __add__(self, other: "Operand") -> "Expression":
        return self._with("+", other)

    def __radd__(self, other: "Operand") -> "Expression":
        return self._after("+", other)

    def __sub__(self, other: "Operand") -> "Expression":
        return self._with("-", other)

    def __rsub__(self, other: "Operand") -> "Expression":
        return self._after("-", other)

    def __mul__(self, other: "Operand") -> "Expression":
        return self._with("*", other)

    def __rmul__(self, other: "Operand") -> "Expression":
        return self._after("*", other)

    def __truediv__(self, other: "Operand") -> "Expression":
        return self._with("/", other)

    def __rtruediv__(self, other: "Operand") -> "Expression":
        return self._after("/", other)

    def __and__(self, other: "Expression") -> "Expression":
        return self._with("and", other)

    def __rand__(self, other: "Operand") -> "Expression":
        return self._after("and", other)

    def __or__(self, other: "Expression") -> "Expression":
        return self._with("or", other)

    def __ror__(self, other: "Operand") -> "Expression":
        return self._after("or", other)

    def __invert__(self) -> "Expression":
        return _checked(["not (", *self.parts, ")"])

    def __neg__(self) -> "Expression":
        return _checked(["-(", *self.parts, ")"])

    __bool__: Callable[[], bool] = _refused("whether it is true", _COMBINED)
    __contains__: Any = _refused("what it contains", "a comparison, as t == 'en'")
    __mod__ = __rmod__ = __divmod__ = __rdivmod__ = _refused("its remainder (%)", _SIGNS)
    __floordiv__ = __rfloordiv__ = _refused("its whole quotient (//)", _SIGNS)
    __pow__ = __rpow__ = _refused("its power (**)", _SIGNS)
    __matmul__ = __rmatmul__ = _refused("its product (@)", _SIGNS)
    __xor__ = __rxor__ = _refused("^", "a != b of two truths, or & | ~")
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _refused("its shift", _SIGNS)
    __abs__ = _refused("its abs()", "(t > a) | (t < -a)")
    __round__ = __trunc__ = __floor__ = __ceil__ = _refused("its rounded value", "a comparison with a number")
    __float__ = __int__ = __index__ = __complex__ = _refused("its number", "a comparison with a number")
    __iter__ = __reversed__ = _refused("what its elements are", _METHODS)
    __len__: Any = _refused("its length", _METHODS)
    __call__ = _refused("what a call of it gives", _METHODS)

    def _with(self, sign: str, other: object) -> "Expression":
        return _checked(["(", *self.parts, f" {sign} ", *self._operand(sign, other), ")"])

    def _after(self, sign: str, other: object) -> "Expression":
        return _checked(["(", *self._operand(sign, other), f" {sign} ", *self.parts, ")"])

    def _operand(self, sign: str, value: object) -> "list[str | Tensor]":
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, Expression):
            return value.parts
        if isinstance(value, bool):
            return ["true" if value else "false"]
        if isinstance(value, int | float) and math.isfinite(value):
            return [repr(value)]
        if isinstance(value, str) and "'" not in value:
            return [f"'{value}'"]
        whether = "; whether a row has a tensor is t.given()" if value is None else ""
        expected = "expected a tensor, a finite number, text without quotes, true or false"
        raise ConfigError(f"{self!r} {sign}: {expected}, got {value!r:.100}{whether}")


Operand = Expression | Value


def _checked(parts: "Sequence[str | Tensor]") -> Expression:
    expression = Expression(parts)
    expression.kind()
    return expression


class Tensor(Expression):
    """An ensemble tensor: alone in a condition, the one element that it has in a row.

    `owner` is the graph that it is of. Not `is_sure` are dims that the whole graph has yet to tell.
    """

    def __init__(self, owner: Any, name: str, datatype: str, dims: Sequence[int], is_sure: bool = True) -> None:
        super().__init__([self])
        self.graph = owner
        self.name = name
        self.datatype = datatype
        self.dims = tuple(dims)
        self.is_sure = is_sure

    def __repr__(self) -> str:
        return f"tensor '{self.name}', {self.datatype}{list(self.dims)}"

    def __getitem__(self, index: int) -> Expression:
        """One element of a row's, counted from 0."""
        if isinstance(index, bool) or not isinstance(index, int | np.integer) or index < 0:
            raise ConfigError(f"{self!r}: expected the number of an element, from 0 on, got [{index!r:.100}]")
        return _checked([self, f"[{int(index)}]"])

    def given(self) -> Expression:
        """Whether the row has it."""
        return self._call("given")

    def max(self) -> Expression:
        return self._call("max")

    def min(self) -> Expression:
        return self._call("min")

    def mean(self) -> Expression:
        return self._call("mean")

    def sum(self) -> Expression:
        return self._call("sum")

    def argmax(self) -> Expression:
        return self._call("argmax")

    def count(self) -> Expression:
        """How many elements it has in a row."""
        return self._call("count")

    def of(self, function: str) -> Expression:
        """A function of functions.py that has no method here, by its name, of all elements that it has in a row."""
        if function not in FUNCTIONS:
            raise ConfigError(f"{self!r}: no function {function!r}, there are {', '.join(FUNCTIONS)}")
        return self._call(function)

    def _call(self, function: str) -> Expression:
        return _checked([f"{function}(", self, ")"])


def bare(text: str) -> str:
    """Without the parentheses around all of it."""
    if not text.startswith("(") or not text.endswith(")"):
        return text
    depth = 0
    for index, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if not depth and index < len(text) - 1:
            return text
    return text[1:-1]
