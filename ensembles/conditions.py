"""The language of conditions on tensors, as "max(LABEL_SCORES) > 0.9 and not given(IMAGE)". Pure.

    condition  = conjunction { "or" conjunction }
    conjunction = negation { "and" negation }
    negation   = "not" negation | comparison
    comparison = sum [ ( "<" | "<=" | ">" | ">=" | "==" | "!=" ) sum ]
    sum        = product { ( "+" | "-" ) product }
    product    = factor { ( "*" | "/" ) factor }
    factor     = "-" factor | number | 'text' | "true" | "false" | "(" condition ")" | "given" "(" name ")"
               | name | name "[" index "]" | function "(" name ")"

The functions are those of functions.py: max, min, mean, sum, argmax, count.

A condition holds or not for each row. A name alone stands for the one element that its tensor has in a row; functions
take all elements of a row, `count` says how many there are. A name that is not a plain word stands in double quotes.
Where a tensor was not made for a row, `given` is false and so is every comparison with it. Nothing else is known, and
nothing is ever evaluated as Python.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tutti.core.dtypes import Array
from tutti.core.types import Shape
from tutti.ensembles.functions import FUNCTIONS, Function
from tutti.ensembles.spelling import near

MAX_LENGTH = 1000
MAX_DEPTH = 20
_WORDS = frozenset(["and", "or", "not", "true", "false", "given"])
_NAME = r"[A-Za-z_][A-Za-z0-9_.]*"
_TOKEN = re.compile(
    r"\s*(?:(?P<quoted>\"[^\"]*\")|(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|(?P<text>'[^']*')"
    rf"|(?P<name>{_NAME})|(?P<sign><=|>=|==|!=|[<>()\[\]+*/-]))"
)

Kind = Literal["number", "truth", "text"]


class ConditionError(ValueError):
    """A condition that does not parse or does not fit its tensors; says where."""


@dataclass(frozen=True, slots=True)
class Column:
    """A tensor's rows, [rows, ...], and which of them there are; None for all."""

    array: Array
    valid: Array | None = None


Columns = Mapping[str, Column | None]
# (values of each row, which of them there are)
_Values = tuple[Any, Any]
# (datatype, dims without the batch axis) of each tensor.
Specs = Mapping[str, tuple[str, Shape]]
_Evaluate = Callable[[Columns, int], _Values]


@dataclass(frozen=True, slots=True)
class Condition:
    """A checked condition: `names` are the tensors it reads."""

    text: str
    names: tuple[str, ...]
    _evaluate: _Evaluate
    _specs: Specs

    def __reduce__(self) -> tuple[Any, ...]:
        return parse, (self.text, self._specs)

    def and_also(self, other: "Condition") -> "Condition":
        """Raises ConditionError where both together are too long."""
        return parse(f"({self.text}) and ({other.text})", {**self._specs, **other._specs})

    def holds(self, columns: Columns, rows: int) -> Array:
        """For which of `rows` rows it holds, [rows] bool. A tensor that nothing made is None."""
        with np.errstate(all="ignore"):
            value, valid = self._evaluate(columns, rows)
        return np.broadcast_to(np.logical_and(value, valid), (rows,))


def parse(text: str, specs: Specs) -> Condition:
    """Check a condition on tensors of the given kinds. Raises ConditionError."""
    if len(text) > MAX_LENGTH:
        raise ConditionError(f"expected at most {MAX_LENGTH} characters, got {len(text)}")
    kind, evaluate, read = _parsed(text, specs)
    if kind != "truth":
        raise ConditionError(f"expected a comparison, got a {kind}: {text!r}")
    names = tuple(dict.fromkeys(read))
    return Condition(text, names, evaluate, {name: specs[name] for name in names})


def kind_of(text: str, specs: Specs) -> Kind:
    """What a condition, or a part of one, comes to. Raises ConditionError."""
    return _parsed(text, specs)[0]


def quoted(name: str) -> str:
    """A tensor's name as a condition has it. Raises ConditionError for one that none can have."""
    if re.fullmatch(_NAME, name) and not _is_word(name):
        return name
    if '"' in name:
        raise ConditionError(f"a condition cannot name a tensor with a double quote, got {name!r}")
    return f'"{name}"'


def _is_word(name: str) -> bool:
    """Whether it is the language's own, and no tensor's name."""
    return name in _WORDS or name in FUNCTIONS


def _parsed(text: str, specs: Specs) -> "tuple[Kind, _Evaluate, list[str]]":
    parser = _Parser(text, specs)
    kind, evaluate = parser.condition(0)
    if parser.token is not None:
        raise parser.error("expected the end")
    return kind, evaluate, parser.names


class _Parser:
    def __init__(self, text: str, specs: Specs) -> None:
        self._text = text
        self._specs = specs
        self._at = self._next = 0
        self.names: list[str] = []
        self.token: str | None = None
        self._kind = ""
        self._advance()

    def error(self, expected: str) -> ConditionError:
        got = "the end" if self.token is None else repr(self.token)
        return ConditionError(f"{expected}, got {got} at character {self._at + 1} of {self._text!r}")

    def condition(self, depth: int) -> tuple[Kind, _Evaluate]:
        if depth > MAX_DEPTH:
            raise ConditionError(f"nested more than {MAX_DEPTH} deep")
        return self._joined("or", lambda: self._joined("and", lambda: self._negation(depth)))

    def _advance(self) -> None:
        if not self._text[self._next :].strip():
            self._at, self.token, self._kind = len(self._text), None, ""
            return
        match = _TOKEN.match(self._text, self._next)
        if match is None:
            rest = self._text[self._next :].lstrip()
            position = len(self._text) - len(rest) + 1
            raise ConditionError(f"unexpected {rest[0]!r} at character {position} of {self._text!r}")
        self._kind = match.lastgroup or ""
        self.token = match[self._kind]
        self._at, self._next = match.start(self._kind), match.end()

    def _take(self, token: str) -> bool:
        if self.token != token or self._kind in ("text", "quoted"):
            return False
        self._advance()
        return True

    def _expect(self, token: str) -> None:
        if not self._take(token):
            raise self.error(f"expected {token!r}")

    def _joined(self, word: Literal["and", "or"], part: Callable[[], tuple[Kind, _Evaluate]]) -> tuple[Kind, _Evaluate]:
        kind, evaluate = part()
        while self.token == word and self._kind == "name":
            self._advance()
            other, right = part()
            if (kind, other) != ("truth", "truth"):
                raise ConditionError(f"'{word}' joins comparisons, got a {other if kind == 'truth' else kind}")
            evaluate = _both(np.logical_and if word == "and" else np.logical_or, evaluate, right)
        return kind, evaluate

    def _negation(self, depth: int) -> tuple[Kind, _Evaluate]:
        if depth > MAX_DEPTH:
            raise ConditionError(f"nested more than {MAX_DEPTH} deep")
        if not self._take("not"):
            return self._comparison(depth)
        kind, evaluate = self._negation(depth + 1)
        if kind != "truth":
            raise ConditionError(f"'not' takes a comparison, got a {kind}")
        return "truth", lambda columns, rows: (~_truth(evaluate(columns, rows)), True)

    def _comparison(self, depth: int) -> tuple[Kind, _Evaluate]:
        kind, evaluate = self._chain(("+", "-"), lambda: self._chain(("*", "/"), lambda: self._factor(depth)))
        sign = self.token
        if sign not in _COMPARE:
            return kind, evaluate
        self._advance()
        other, right = self._chain(("+", "-"), lambda: self._chain(("*", "/"), lambda: self._factor(depth)))
        if kind != other:
            raise ConditionError(f"'{sign}' compares a {kind} with a {other}: expected two of one kind")
        if kind != "number" and sign not in ("==", "!="):
            raise ConditionError(f"'{sign}' compares numbers, got a {kind}")
        compare = _COMPARE[sign]

        def compared(columns: Columns, rows: int) -> _Values:
            (a, a_valid), (b, b_valid) = evaluate(columns, rows), right(columns, rows)
            return np.logical_and(compare(a, b), np.logical_and(a_valid, b_valid)), True

        return "truth", compared

    def _chain(self, signs: tuple[str, ...], part: Callable[[], tuple[Kind, _Evaluate]]) -> tuple[Kind, _Evaluate]:
        kind, evaluate = part()
        while self._kind == "sign" and self.token in signs:
            sign = self.token
            self._advance()
            other, right = part()
            if (kind, other) != ("number", "number"):
                raise ConditionError(f"'{sign}' takes numbers, got a {other if kind == 'number' else kind}")
            evaluate = _calculated(_CALCULATE[sign], evaluate, right)
        return kind, evaluate

    def _factor(self, depth: int) -> tuple[Kind, _Evaluate]:
        if depth > MAX_DEPTH:
            raise ConditionError(f"nested more than {MAX_DEPTH} deep")
        token, kind = self.token, self._kind
        if self._take("("):
            inner = self.condition(depth + 1)
            self._expect(")")
            return inner
        if self._take("-"):
            of, evaluate = self._factor(depth + 1)
            if of != "number":
                raise ConditionError(f"'-' takes a number, got a {of}")
            return "number", _calculated(np.subtract, _constant(0.0), evaluate)
        if token is None or kind == "sign":
            raise self.error("expected a value")
        self._advance()
        if kind == "number":
            return "number", _constant(float(token))
        if kind == "text":
            return "text", _constant(token[1:-1].encode())
        if kind == "quoted":
            return self._element(token[1:-1])
        if token in ("true", "false"):
            return "truth", _constant(token == "true")
        if token in FUNCTIONS or token == "given":
            self._expect("(")
            name = self._name()
            self._expect(")")
            return self._given(name) if token == "given" else self._function(FUNCTIONS[token], name)
        if _is_word(token):
            raise self.error(f"expected a value after {token!r}")
        return self._element(token)

    def _name(self) -> str:
        name, kind = self.token, self._kind
        if name is None or kind not in ("name", "quoted") or (kind == "name" and _is_word(name)):
            raise self.error("expected a tensor's name")
        self._advance()
        return name[1:-1] if kind == "quoted" else name

    def _spec(self, name: str) -> tuple[Kind, Shape]:
        if name not in self._specs:
            known = ", ".join(sorted(self._specs))
            raise ConditionError(f"there is no tensor '{name}', there are {known}{near(name, self._specs)}")
        self.names.append(name)
        datatype, dims = self._specs[name]
        return ("text" if datatype == "BYTES" else "truth" if datatype == "BOOL" else "number"), dims

    def _given(self, name: str) -> tuple[Kind, _Evaluate]:
        self._spec(name)

        def is_given(columns: Columns, rows: int) -> _Values:
            column = columns[name]
            return (False if column is None else True if column.valid is None else column.valid), True

        return "truth", is_given

    def _function(self, function: Function, name: str) -> tuple[Kind, _Evaluate]:
        kind, _ = self._spec(name)
        if kind == "text" and not function.takes_text:
            raise ConditionError(f"{function.name}({name}): expected numbers, the tensor has text")

        def calculated(columns: Columns, rows: int) -> _Values:
            column = columns[name]
            if column is None:
                return 0.0, False
            flat = column.array.reshape(rows, -1)
            valid = True if column.valid is None else column.valid
            if flat.shape[1]:
                return function.calculate(flat), valid
            return (0.0, False) if function.of_nothing is None else (function.of_nothing, valid)

        return "number", calculated

    def _element(self, name: str) -> tuple[Kind, _Evaluate]:
        kind, dims = self._spec(name)
        size = math.prod(dims)
        index = 0
        if self._take("["):
            token = self.token
            if self._kind != "number" or token is None or not token.isdecimal():
                raise self.error("expected a whole number")
            index = int(token)
            self._advance()
            self._expect("]")
            if min(dims, default=1) >= 0 and index >= size:
                raise ConditionError(f"{name}[{index}]: the tensor has {size} elements in a row")
        elif size != 1 or -1 in dims:
            raise ConditionError(
                f"'{name}' has dims {list(dims)}: expected one element in a row; say {name}[0] or max({name})"
            )

        def element(columns: Columns, rows: int) -> _Values:
            column = columns[name]
            if column is None:
                return _NOTHING[kind], False
            flat = column.array.reshape(rows, -1)
            if index >= flat.shape[1]:
                return _NOTHING[kind], False
            valid = True if column.valid is None else column.valid
            values = flat[:, index]
            return (values.astype(np.float64) if kind == "number" and values.dtype.kind == "f" else values), valid

        return kind, element


def _constant(value: Any) -> _Evaluate:
    return lambda columns, rows: (value, True)


def _truth(values: _Values) -> Any:
    return np.logical_and(*values)


def _both(join: Any, left: _Evaluate, right: _Evaluate) -> _Evaluate:
    return lambda columns, rows: (join(_truth(left(columns, rows)), _truth(right(columns, rows))), True)


def _calculated(calculate: Any, left: _Evaluate, right: _Evaluate) -> _Evaluate:
    def calculated(columns: Columns, rows: int) -> _Values:
        (a, a_valid), (b, b_valid) = left(columns, rows), right(columns, rows)
        return calculate(_float(a), _float(b)), np.logical_and(a_valid, b_valid)

    return calculated


def _float(value: Any) -> Any:
    return value.astype(np.float64) if isinstance(value, np.ndarray) else value


_NOTHING: dict[Kind, Any] = {"number": 0.0, "truth": False, "text": b""}
_COMPARE: dict[str | None, Any] = {
    "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal,
    "==": lambda a, b: np.equal(a, b), "!=": lambda a, b: np.not_equal(a, b),
}  # fmt: skip
_CALCULATE: dict[str, Any] = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide}
