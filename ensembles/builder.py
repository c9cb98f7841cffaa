"""Graphs written in Python, checked against the repository's models, and compiled to config.pbtxt.

    graph = Graph("moderate", repository=Path("model_repository"), max_batch_size=32)
    text = graph.input("TEXT", "BYTES", [1])
    gate = graph.step("text_gate", TEXT=text)
    with graph.where(gate["RISK"] > 0.2):
        tokens = graph.step("text_tokenizer", TEXT=text)
        encoded = graph.step("text_encoder", tokens.as_inputs())
    graph.output("EMBEDDING", encoded["EMBEDDING"], default=0)
    print(graph.config())

A step's keywords are its model's inputs. What a model does not have, a tensor that fits nothing, a cycle: every mistake
raises ConfigError where it is made or, at the latest, from `config`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from ensembles import graph as graphs
from tutti import config, repository
from tutti.config import ModelConfig
from tutti.dtypes import to_config
from tutti.errors import ConfigError

Value = bool | int | float | str


class Expression:
    """A condition, or a number or text in one; combined with comparisons, + - * /, and & | ~ for and, or, not."""

    def __init__(self, text: "str | _Text") -> None:
        self._text = _Text([text]) if isinstance(text, str) else text

    def render(self, names: Mapping[int, str]) -> str:
        """In the language of conditions.py; `names` are the tensors' by identity."""
        return "".join(names[id(part)] if isinstance(part, Tensor) else part for part in self._text.parts)

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

    def __sub__(self, other: "Operand") -> "Expression":
        return self._with("-", other)

    def __mul__(self, other: "Operand") -> "Expression":
        return self._with("*", other)

    def __truediv__(self, other: "Operand") -> "Expression":
        return self._with("/", other)

    def __and__(self, other: "Expression") -> "Expression":
        return self._with("and", other)

    def __or__(self, other: "Expression") -> "Expression":
        return self._with("or", other)

    def __invert__(self) -> "Expression":
        return Expression(_Text(["not (", *self._parts(), ")"]))

    def __bool__(self) -> bool:
        raise TypeError("a condition is not true or false before a request comes: combine with & | ~")

    def _parts(self) -> "list[str | Tensor]":
        return self._text.parts

    def _with(self, sign: str, other: object) -> "Expression":
        return Expression(_Text(["(", *self._parts(), f" {sign} ", *_operand(other), ")"]))


class _Text:
    def __init__(self, parts: "Sequence[str | Tensor]") -> None:
        self.parts = list(parts)


Operand = Expression | Value


def _operand(value: object) -> "list[str | Tensor]":
    if isinstance(value, Expression):
        return value._parts()
    if isinstance(value, bool):
        return ["true" if value else "false"]
    if isinstance(value, int | float):
        return [repr(value)]
    if isinstance(value, str) and "'" not in value:
        return [f"'{value}'"]
    raise ConfigError(f"a condition takes numbers, text without quotes, true and false, got {value!r}")


class Tensor(Expression):
    """An ensemble tensor: alone in a condition, the one element that it has in a row."""

    def __init__(self, graph: "Graph", name: str, datatype: str, dims: Sequence[int]) -> None:
        super().__init__(_Text([self]))
        self.graph = graph
        self.name = name
        self.datatype = datatype
        self.dims = tuple(dims)

    def __getitem__(self, index: int) -> Expression:
        return Expression(_Text([self, f"[{index}]"]))

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

    def _call(self, function: str) -> Expression:
        return Expression(_Text([f"{function}(", self, ")"]))


@dataclass
class Step:
    """A step of a graph; `step["OUTPUT"]` is a tensor that it makes."""

    graph: "Graph"
    model: ModelConfig
    version: int
    inputs: dict[str, Tensor]
    when: Expression | None
    each: tuple[Tensor, ...]
    gather: Mapping[str, str]
    is_optional: bool
    defaults: Mapping[str, Value]
    made: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, output: str) -> Tensor:
        """Raises ConfigError for an output that the model does not have."""
        spec = next((spec for spec in self.model.outputs if spec.name == output), None)
        if spec is None:
            names = [spec.name for spec in self.model.outputs]
            raise ConfigError(f"step '{self.model.name}': the model has no output '{output}', it has {names}")
        if output not in self.made:
            dims = spec.dims
            if self.each and self.gather.get(output, "concat") == "concat":
                dims = (-1, *dims)
            name = self.graph._fresh(f"{self.model.name}.{output}")
            self.made[output] = Tensor(self.graph, name, spec.datatype, dims)
        return self.made[output]

    def as_inputs(self) -> dict[str, Tensor]:
        """All outputs by their names, for a step whose inputs have the same ones."""
        return {spec.name: self[spec.name] for spec in self.model.outputs}


class Graph:
    """An ensemble while it is written."""

    def __init__(self, name: str, repository: Path, max_batch_size: int = 0) -> None:
        self.name = name
        self._root = repository
        self._max_batch_size = max_batch_size
        self._inputs: list[tuple[Tensor, bool]] = []
        self._steps: list[Step] = []
        self._outputs: list[tuple[str, Tensor]] = []
        self._items: list[tuple[Tensor, Tensor]] = []
        self._defaults: dict[int, tuple[Tensor, Value]] = {}
        self._exit: Expression | None = None
        self._deadline_ms = 0
        self._names: set[str] = set()
        self._where: list[Expression] = []

    @contextmanager
    def where(self, condition: Expression) -> Iterator[None]:
        """All steps made inside run only for rows for which it holds."""
        if not isinstance(condition, Expression):
            raise ConfigError(f"where: expected a comparison of tensors, as RISK > 0.5, got {condition!r}")
        self._where.append(condition)
        try:
            yield
        finally:
            self._where.pop()

    def input(
        self, name: str, datatype: str, dims: Sequence[int], optional: bool = False, default: Value | None = None
    ) -> Tensor:
        """An input of the ensemble; dims without the batch axis. Without an optional one its branches are left out."""
        tensor = Tensor(self, self._fresh(name), datatype, dims)
        self._inputs.append((tensor, optional))
        if default is not None:
            self._defaults[id(tensor)] = (tensor, default)
        return tensor

    def step(
        self,
        model: str,
        given: Mapping[str, Tensor] | None = None,
        /,
        *,
        version: int = -1,
        when: Expression | None = None,
        each: Sequence[Tensor] = (),
        gather: Mapping[str, str] | None = None,
        optional: bool = False,
        defaults: Mapping[str, Value] | None = None,
        **inputs: Tensor,
    ) -> Step:
        """A step: `given` and `inputs` are the model's, by name. Raises ConfigError for what the model does not have.

        It runs for the rows where `when` holds; once for each item of the tensors `each`, its outputs brought together
        as `gather` says; it is left out where time is short if it is `optional`. `defaults` are outputs' values where
        it did not run.
        """
        found = self._model(model, version)
        names = [spec.name for spec in found.inputs]
        inputs = {**(given or {}), **inputs}
        for name, tensor in inputs.items():
            if name not in names:
                raise ConfigError(f"step '{model}': the model has no input '{name}', it has {names}")
            if tensor.graph is not self:
                raise ConfigError(f"step '{model}': input '{name}' is a tensor of graph '{tensor.graph.name}'")
        for condition in self._where:
            when = condition if when is None else condition & when
        step = Step(self, found, version, inputs, when, tuple(each), gather or {}, optional, defaults or {})
        self._steps.append(step)
        return step

    def items(self, tensor: Tensor, count: Tensor) -> Tensor:
        """`tensor`, of which a row has as many items as `count` says."""
        self._items.append((tensor, count))
        return tensor

    def output(self, name: str, tensor: Tensor, default: Value | None = None) -> None:
        """An output of the ensemble, and its value for rows for which nothing made it."""
        self._outputs.append((name, tensor))
        if default is not None:
            self._defaults[id(tensor)] = (tensor, default)

    def exit_when(self, condition: Expression) -> None:
        """Rows for which it holds are decided: they take no step that the condition does not need."""
        self._exit = condition

    def deadline_ms(self, milliseconds: int) -> None:
        """How long a request may take that does not say so itself."""
        self._deadline_ms = milliseconds

    def proto(self) -> pb.ModelConfig:
        """Checked against the models. Raises ConfigError."""
        made = pb.ModelConfig(name=self.name, platform="ensemble", max_batch_size=self._max_batch_size)
        names = {id(tensor): name for name, tensor in self._outputs}
        for tensor, optional in self._inputs:
            names[id(tensor)] = tensor.name
            made.input.add(name=tensor.name, data_type=_type(tensor), dims=tensor.dims, optional=optional)
        for name, tensor in self._outputs:
            made.output.add(name=name, data_type=_type(tensor), dims=tensor.dims)
        for step in self._steps:
            for tensor in step.made.values():
                names.setdefault(id(tensor), tensor.name)
        quoted = {key: name if name.replace(".", "_").isidentifier() else f'"{name}"' for key, name in names.items()}
        for key, value in self._parameters(names, quoted):
            made.parameters[key].string_value = value
        for step in self._steps:
            if not step.made:
                raise ConfigError(f"step '{step.model.name}': nothing takes its outputs")
            shown = made.ensemble_scheduling.step.add(model_name=step.model.name, model_version=step.version)
            for name, tensor in step.inputs.items():
                shown.input_map[name] = self._name_of(tensor, names)
            for name, tensor in step.made.items():
                shown.output_map[name] = names[id(tensor)]
        parsed = config.parse(text_format.MessageToString(made), self.name)
        graphs.plan(parsed, lambda name, version: self._model(name, int(version or -1)))
        return made

    def config(self) -> str:
        """The text of config.pbtxt. Raises ConfigError."""
        text: str = text_format.MessageToString(self.proto())
        return text

    def _parameters(self, names: Mapping[int, str], quoted: Mapping[int, str]) -> Iterator[tuple[str, str]]:
        for step in self._steps:
            first = names[id(next(iter(step.made.values())))] if step.made else ""
            if step.when is not None:
                yield f"tutti.when.{first}", _bare(step.when.render(quoted))
            if step.each:
                yield f"tutti.each.{first}", ", ".join(self._name_of(tensor, names) for tensor in step.each)
            for output, how in step.gather.items():
                yield f"tutti.gather.{names[id(step[output])]}", how
            if step.is_optional:
                yield f"tutti.optional.{first}", "true"
            for output, value in step.defaults.items():
                if output in step.made:
                    yield f"tutti.default.{names[id(step.made[output])]}", _shown(value)
        for tensor, count in self._items:
            yield f"tutti.items.{self._name_of(tensor, names)}", self._name_of(count, names)
        for tensor, value in self._defaults.values():
            yield f"tutti.default.{self._name_of(tensor, names)}", _shown(value)
        if self._exit is not None:
            yield "tutti.exit", _bare(self._exit.render(quoted))
        if self._deadline_ms:
            yield "tutti.deadline_ms", str(self._deadline_ms)

    def _name_of(self, tensor: Tensor, names: Mapping[int, str]) -> str:
        if id(tensor) not in names:
            raise ConfigError(f"graph '{self.name}': '{tensor.name}' is a tensor of another graph")
        return names[id(tensor)]

    def _model(self, name: str, version: int) -> ModelConfig:
        repository.check_known(self._root, name)
        return repository.open_model(self._root, name).config

    def _fresh(self, name: str) -> str:
        made, number = name, 2
        while made in self._names:
            made, number = f"{name}_{number}", number + 1
        self._names.add(made)
        return made


def _type(tensor: Tensor) -> int:
    return int(pb.DataType.Value(to_config(tensor.datatype)))


def _shown(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _bare(text: str) -> str:
    """Without the parentheses around all of it."""
    if not text.startswith("(") or not text.endswith(")"):
        return text
    depth = 0
    for index, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if not depth and index < len(text) - 1:
            return text
    return text[1:-1]
