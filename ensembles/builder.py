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
raises ConfigError where it is made or, where only the whole graph shows it, from `config`, as MistakeAt its place.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from tutti.backends import completion
from tutti.core.dtypes import NUMPY
from tutti.core.errors import ConfigError
from tutti.ensembles import arguments, spelling
from tutti.ensembles.expressions import Expression, Tensor, Value
from tutti.ensembles.graph_config import GraphConfig, Written
from tutti.ensembles.places import MistakeAt, here
from tutti.ensembles.steps import Step
from tutti.repository import folders as repository
from tutti.repository.model_config import ModelConfig

__all__ = ["Expression", "Graph", "Step", "Tensor"]


class Where:
    """What `where` gives, for a `with` statement."""

    def __init__(self, graph: "Graph", condition: Expression) -> None:
        self.place = here()
        self.is_used = False
        self._graph = graph
        self._condition = condition

    def __enter__(self) -> None:
        self.is_used = True
        self._graph._where.append(self._condition)

    def __exit__(self, *_: object) -> None:
        self._graph._where.pop()


class Graph:
    """An ensemble while it is written."""

    def __init__(self, name: str, repository: Path, max_batch_size: int = 0) -> None:
        """Raises ConfigError for a name that no ensemble of the repository can have."""
        self.place = here()
        self.name = name
        self._root = arguments.folder(repository)
        arguments.check_name(name, self._root)
        whole = arguments.whole(f"graph '{name}': max_batch_size", max_batch_size, 0)
        self._written = Written(name, self.place, whole)
        self._names: set[str] = set()
        self._where: list[Expression] = []
        self._wheres: list[Where] = []

    def __repr__(self) -> str:
        return f"graph '{self.name}'"

    @property
    def is_batched(self) -> bool:
        return self._written.max_batch_size > 0

    def where(self, condition: Expression) -> Where:
        """All steps made inside run only for rows for which it holds."""
        where = Where(self, self._condition("where", condition))
        self._wheres.append(where)
        return where

    def input(
        self, name: str, datatype: str, dims: Sequence[int], optional: bool = False, default: Value | None = None
    ) -> Tensor:
        """An input of the ensemble; dims without the batch axis. Without an optional one its branches are left out."""
        subject = f"input {arguments.quoted(name)}"
        if name in self._names:
            raise ConfigError(f"{subject}: graph '{self.name}' has a tensor of that name already")
        if datatype not in NUMPY:
            near = spelling.near(str(datatype).upper().removeprefix("TYPE_"), list(NUMPY))
            raise ConfigError(f"{subject}: expected a datatype of {', '.join(NUMPY)}, got {datatype!r:.100}{near}")
        tensor = Tensor(self, self._fresh(name), datatype, arguments.dims(subject, dims))
        self._written.inputs.append((tensor, optional))
        self._note_default(subject, tensor, default)
        return tensor

    def step(
        self,
        model: str,
        tensors: Mapping[str, Tensor] | None = None,
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
        """A step: `tensors` and `inputs` are the model's, by name. Raises ConfigError for what the model does not have.

        It runs for the rows where `when` holds; once for each item of the tensors `each`, its outputs brought together
        as `gather` says; it is left out where time is short if it is `optional`. `defaults` are outputs' values where
        it did not run.
        """
        if not isinstance(model, str):
            raise ConfigError(f"step: expected the name of a model first, got {model!r:.100}")
        subject = f"step '{model}'"
        arguments.check_mappings(subject, {"the inputs": tensors, "gather": gather, "defaults": defaults})
        if isinstance(each, Tensor) or not isinstance(each, Sequence) or not all(isinstance(t, Tensor) for t in each):
            raise ConfigError(f"{subject}: each: expected a list of tensors, as each=[boxes], got {each!r:.100}")
        config = self._model(model, arguments.whole(f"{subject}: version", version, -1))
        inputs = {**(tensors or {}), **inputs}
        self._check_inputs(config, inputs)
        condition = self._when(subject, when)
        step = Step(
            self, config, version, inputs, condition, tuple(each), gather or {}, optional, defaults or {}, place=here()
        )
        step.check()
        self._written.steps.append(step)
        return step

    def _when(self, subject: str, when: Expression | None) -> Expression | None:
        """A step's own condition, and those of the blocks that it stands in."""
        if when is not None:
            self._condition(f"{subject}: when", when)
        for condition in self._where:
            when = condition if when is None else condition & when
        return when

    def items(self, tensor: Tensor, count: Tensor) -> Tensor:
        """`tensor`, of which a row has as many items as `count` says."""
        for part in (tensor, count):
            self._check_tensor("items", part)
        self._written.items.append((tensor, count))
        self._written.defaulted.setdefault(id(tensor), here())
        return tensor

    def output(self, name: str, tensor: Tensor, default: Value | None = None) -> None:
        """An output of the ensemble, and its value for rows for which nothing made it."""
        subject = f"output {arguments.quoted(name)}"
        self._check_tensor(subject, tensor)
        if any(tensor is source for source, _ in self._written.inputs):
            raise ConfigError(f"{subject}: expected a tensor that a step makes, got the graph's input '{tensor.name}'")
        for other, known in self._written.outputs:
            if name == other or tensor is known:
                taken = f"the graph has an output '{name}'" if name == other else f"{tensor!r} is its output '{other}'"
                raise ConfigError(f"{subject}: {taken} already")
        if any(name == source.name for source, _ in self._written.inputs):
            raise ConfigError(f"{subject}: the graph has an input of that name")
        self._written.outputs.append((name, tensor))
        self._written.places[f"output '{name}'"] = here()
        self._note_default(subject, tensor, default)

    def exit_when(self, condition: Expression) -> None:
        """Rows for which it holds are decided: they take no step that the condition does not need."""
        self._written.exit = self._condition("exit_when", condition)
        self._written.places["parameters.tutti.exit"] = here()

    def deadline_ms(self, milliseconds: int) -> None:
        """How long a request may take that does not say so itself."""
        self._written.deadline_ms = arguments.whole("deadline_ms", milliseconds, 1)
        self._written.places["parameters.tutti.deadline_ms"] = here()

    def proto(self) -> pb.ModelConfig:
        """Checked against the models. Raises ConfigError."""
        for where in self._wheres:
            if not where.is_used:
                raise MistakeAt("where: expected a block, as `with graph.where(...):`, got no with", where.place)
        return GraphConfig(self._written, self._model).proto()

    def config(self) -> str:
        """The text of config.pbtxt. Raises ConfigError."""
        text: str = text_format.MessageToString(self.proto())
        return text

    def _model(self, name: str, version: int) -> ModelConfig:
        repository.check_known(self._root, name)
        folder = completion.open_model(self._root, name)
        if version != -1 and version not in folder.versions:
            raise ConfigError(f"model '{name}' has no version {version}, it has {list(folder.versions)}")
        return folder.config

    def _check_inputs(self, model: ModelConfig, inputs: Mapping[str, object]) -> None:
        names = [spec.name for spec in model.inputs]
        for name, tensor in inputs.items():
            subject = f"step '{model.name}': input '{name}'"
            if name not in names:
                near = spelling.near(name, [*names, *_OPTIONS])
                raise ConfigError(f"step '{model.name}': the model has no input '{name}', it has {names}{near}")
            self._check_tensor(subject, tensor)

    def _check_tensor(self, subject: str, tensor: object) -> None:
        """Raises ConfigError for what is no tensor, or one of another graph."""
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{subject}: expected a tensor, as step['NAME'] or graph.input(...), got {tensor!r:.100}")
        if tensor.graph is not self:
            raise ConfigError(f"{subject}: '{tensor.name}' is a tensor of graph '{tensor.graph.name}'")

    def _condition(self, subject: str, condition: object) -> Expression:
        """Raises ConfigError for what does not hold or not for a row of this graph."""
        expected = f"{subject}: expected a comparison of tensors, as step['RISK'] > 0.5"
        if not isinstance(condition, Expression):
            raise ConfigError(f"{expected}, got {condition!r:.100}")
        for tensor in condition.tensors():
            self._check_tensor(subject, tensor)
        kind = condition.kind()
        if kind not in ("truth", None):
            raise ConfigError(f"{expected}, got a {kind}: {condition!r}")
        return condition

    def _note_default(self, subject: str, tensor: Tensor, value: Value | None) -> None:
        if value is not None:
            arguments.check_value(f"{subject}: default", value)
            self._written.defaults[id(tensor)] = (tensor, value)
            self._written.defaulted[id(tensor)] = here()

    def _fresh(self, name: str) -> str:
        fresh, number = name, 2
        while fresh in self._names:
            fresh, number = f"{name}_{number}", number + 1
        self._names.add(fresh)
        return fresh


# What a step takes beside its model's inputs.
_PARAMETERS = inspect.signature(Graph.step).parameters
_OPTIONS = [name for name, option in _PARAMETERS.items() if option.kind is option.KEYWORD_ONLY]
