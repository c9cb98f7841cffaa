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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from tutti.backends import completion
from tutti.core.dtypes import NUMPY, to_config
from tutti.core.errors import ConfigError
from tutti.ensembles import arguments, conditions, extensions, planner, spelling
from tutti.ensembles.conditions import ConditionError
from tutti.ensembles.expressions import Expression, Tensor, Value, bare
from tutti.ensembles.graph import GraphError
from tutti.ensembles.places import MistakeAt, Place, here
from tutti.repository import config
from tutti.repository import folders as repository
from tutti.repository.model_config import ModelConfig

__all__ = ["Expression", "Graph", "Step", "Tensor"]


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
    place: Place = ()

    def __repr__(self) -> str:
        return f"step '{self.model.name}', whose outputs are {', '.join(f'step[{name!r}]' for name in self._outputs())}"

    def __getitem__(self, output: str) -> Tensor:
        """Raises ConfigError for an output that the model does not have."""
        self._check_outputs([output])
        if output not in self.made:
            spec = next(spec for spec in self.model.outputs if spec.name == output)
            dims = spec.dims
            if self.each and self.gather.get(output, "concat") == "concat":
                dims = (-1, *dims)
            name = self.graph._fresh(f"{self.model.name}.{output}")
            is_sure = self.model.is_batched == self.graph.is_batched
            self.made[output] = Tensor(self.graph, name, spec.datatype, dims, is_sure)
        return self.made[output]

    def as_inputs(self) -> dict[str, Tensor]:
        """All outputs by their names, for a step whose inputs have the same ones."""
        return {spec.name: self[spec.name] for spec in self.model.outputs}

    def _outputs(self) -> list[str]:
        return [spec.name for spec in self.model.outputs]

    def _check_outputs(self, names: Sequence[str]) -> None:
        known = self._outputs()
        for name in names:
            if name not in known:
                near = spelling.near(name, known)
                raise ConfigError(f"step '{self.model.name}': the model has no output '{name}', it has {known}{near}")

    def _check(self) -> None:
        """Raises ConfigError for options that do not fit the step."""
        what = f"step '{self.model.name}'"
        specs = {spec.name: spec for spec in self.model.inputs}
        for name, tensor in self.inputs.items():
            if tensor.datatype != specs[name].datatype:
                raise ConfigError(f"{what}: input '{name}': expected {specs[name].datatype}, got {tensor!r}")
        for name, spec in specs.items():
            if name not in self.inputs and not spec.is_optional:
                raise ConfigError(f"{what}: input '{name}' of the model is missing; it has {list(specs)}")
        for item in self.each:
            if not any(item is tensor for tensor in self.inputs.values()):
                raise ConfigError(f"{what}: each: expected tensors among its inputs, got {item!r}")
        self._check_outputs([*self.gather, *self.defaults])
        for output, how in self.gather.items():
            if how not in extensions.GATHERS:
                raise ConfigError(
                    f"{what}: gather of '{output}': expected {', '.join(extensions.GATHERS)}, got {how!r:.100}"
                )
        if self.gather and not self.each:
            raise ConfigError(f"{what}: gather needs each=[...], the tensors whose items are gathered")
        for output, value in self.defaults.items():
            arguments.check_value(f"{what}: default of '{output}'", value)


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
        self._max_batch_size = arguments.whole(f"graph '{name}': max_batch_size", max_batch_size, 0)
        self._inputs: list[tuple[Tensor, bool]] = []
        self._steps: list[Step] = []
        self._outputs: list[tuple[str, Tensor]] = []
        self._items: list[tuple[Tensor, Tensor]] = []
        self._defaults: dict[int, tuple[Tensor, Value]] = {}
        self._exit: Expression | None = None
        self._deadline_ms = 0
        self._names: set[str] = set()
        self._where: list[Expression] = []
        self._wheres: list[Where] = []
        # Where it was written: what is of the graph itself, by its path in the configuration; defaults and items, by
        # the identities of their tensors.
        self._places: dict[str, Place] = {}
        self._defaulted: dict[int, Place] = {}

    def __repr__(self) -> str:
        return f"graph '{self.name}'"

    @property
    def is_batched(self) -> bool:
        return self._max_batch_size > 0

    def where(self, condition: Expression) -> Where:
        """All steps made inside run only for rows for which it holds."""
        made = Where(self, self._condition("where", condition))
        self._wheres.append(made)
        return made

    def input(
        self, name: str, datatype: str, dims: Sequence[int], optional: bool = False, default: Value | None = None
    ) -> Tensor:
        """An input of the ensemble; dims without the batch axis. Without an optional one its branches are left out."""
        what = f"input {arguments.quoted(name)}"
        if name in self._names:
            raise ConfigError(f"{what}: graph '{self.name}' has a tensor of that name already")
        if datatype not in NUMPY:
            near = spelling.near(str(datatype).upper().removeprefix("TYPE_"), list(NUMPY))
            raise ConfigError(f"{what}: expected a datatype of {', '.join(NUMPY)}, got {datatype!r:.100}{near}")
        tensor = Tensor(self, self._fresh(name), datatype, arguments.dims(what, dims))
        self._inputs.append((tensor, optional))
        self._note_default(what, tensor, default)
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
        if not isinstance(model, str):
            raise ConfigError(f"step: expected the name of a model first, got {model!r:.100}")
        what = f"step '{model}'"
        for option, value in (("the inputs", given), ("gather", gather), ("defaults", defaults)):
            if value is not None and not isinstance(value, Mapping):
                raise ConfigError(f"{what}: {option}: expected them by name, as {{'NAME': ...}}, got {value!r:.100}")
        if isinstance(each, Tensor) or not isinstance(each, Sequence) or not all(isinstance(t, Tensor) for t in each):
            raise ConfigError(f"{what}: each: expected a list of tensors, as each=[boxes], got {each!r:.100}")
        found = self._model(model, arguments.whole(f"{what}: version", version, -1))
        inputs = {**(given or {}), **inputs}
        self._check_inputs(found, inputs)
        if when is not None:
            self._condition(f"{what}: when", when)
        for condition in self._where:
            when = condition if when is None else condition & when
        step = Step(
            self, found, version, inputs, when, tuple(each), gather or {}, optional, defaults or {}, place=here()
        )
        step._check()
        self._steps.append(step)
        return step

    def items(self, tensor: Tensor, count: Tensor) -> Tensor:
        """`tensor`, of which a row has as many items as `count` says."""
        for one in (tensor, count):
            self._own("items", one)
        self._items.append((tensor, count))
        self._defaulted.setdefault(id(tensor), here())
        return tensor

    def output(self, name: str, tensor: Tensor, default: Value | None = None) -> None:
        """An output of the ensemble, and its value for rows for which nothing made it."""
        what = f"output {arguments.quoted(name)}"
        self._own(what, tensor)
        if any(tensor is own for own, _ in self._inputs):
            raise ConfigError(f"{what}: expected a tensor that a step makes, got the graph's input '{tensor.name}'")
        for other, own in self._outputs:
            if name == other or tensor is own:
                taken = f"the graph has an output '{name}'" if name == other else f"{tensor!r} is its output '{other}'"
                raise ConfigError(f"{what}: {taken} already")
        if any(name == own.name for own, _ in self._inputs):
            raise ConfigError(f"{what}: the graph has an input of that name")
        self._outputs.append((name, tensor))
        self._places[f"output '{name}'"] = here()
        self._note_default(what, tensor, default)

    def exit_when(self, condition: Expression) -> None:
        """Rows for which it holds are decided: they take no step that the condition does not need."""
        self._exit = self._condition("exit_when", condition)
        self._places["parameters.tutti.exit"] = here()

    def deadline_ms(self, milliseconds: int) -> None:
        """How long a request may take that does not say so itself."""
        self._deadline_ms = arguments.whole("deadline_ms", milliseconds, 1)
        self._places["parameters.tutti.deadline_ms"] = here()

    def proto(self) -> pb.ModelConfig:
        """Checked against the models. Raises ConfigError."""
        for where in self._wheres:
            if not where.is_used:
                raise MistakeAt("where: expected a block, as `with graph.where(...):`, got no with", where.place)
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
        for step in self._steps:
            if not step.made:
                raise MistakeAt(f"step '{step.model.name}': nothing takes its outputs", step.place)
        for key, value in self._parameters(names, self._quoted(names)):
            made.parameters[key].string_value = value
        for step in self._steps:
            shown = made.ensemble_scheduling.step.add(model_name=step.model.name, model_version=step.version)
            for name, tensor in step.inputs.items():
                shown.input_map[name] = self._name_of(tensor, names)
            for name, tensor in step.made.items():
                shown.output_map[name] = names[id(tensor)]
        self._check(made, names)
        return made

    def config(self) -> str:
        """The text of config.pbtxt. Raises ConfigError."""
        text: str = text_format.MessageToString(self.proto())
        return text

    def _check(self, made: pb.ModelConfig, names: Mapping[int, str]) -> None:
        try:
            parsed = config.parse(text_format.MessageToString(made), self.name)
            planner.plan(parsed, lambda name, version: self._model(name, int(version or -1)))
        except GraphError as error:
            raise MistakeAt(str(error), self._place_of(error.path, names)) from None
        except ConfigError as error:
            raise MistakeAt(str(error), self.place) from None

    def _place_of(self, path: str, names: Mapping[int, str]) -> Place:
        """Where it was written that a path of the configuration is about; the graph's own where that is not known."""
        places = dict(self._places)
        for index, step in enumerate(self._steps):
            places.setdefault(f"step '{step.model.name}'", step.place)
            places[f"step {index}"] = step.place
            for tensor in step.made.values():
                for kind in ("when", "each", "gather", "optional", "default"):
                    places[f"parameters.tutti.{kind}.{names[id(tensor)]}"] = step.place
        for key, place in self._defaulted.items():
            for kind in ("default", "items"):
                places[f"parameters.tutti.{kind}.{names[key]}"] = place
        if path == "ensemble_scheduling.step" and self._steps:  # a cycle, which its last step closes
            return self._steps[-1].place
        return next((place for key, place in places.items() if path == key or path.startswith(f"{key} ")), self.place)

    def _quoted(self, names: Mapping[int, str]) -> dict[int, str]:
        """The tensors' names in conditions, where these read them."""
        read = [*(step.when for step in self._steps), self._exit]
        tensors = {id(tensor): tensor for when in read if when is not None for tensor in when.tensors()}
        try:
            return {key: conditions.quoted(self._name_of(tensor, names)) for key, tensor in tensors.items()}
        except ConditionError as error:
            raise MistakeAt(str(error), self.place) from None

    def _parameters(self, names: Mapping[int, str], quoted: Mapping[int, str]) -> Iterator[tuple[str, str]]:
        for step in self._steps:
            first = names[id(next(iter(step.made.values())))] if step.made else ""
            if step.when is not None:
                yield f"tutti.when.{first}", bare(step.when.render(quoted))
            if step.each:
                yield f"tutti.each.{first}", ", ".join(self._name_of(tensor, names) for tensor in step.each)
            for output, how in step.gather.items():
                yield f"tutti.gather.{self._name_of(step[output], names)}", how
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
            yield "tutti.exit", bare(self._exit.render(quoted))
        if self._deadline_ms:
            yield "tutti.deadline_ms", str(self._deadline_ms)

    def _name_of(self, tensor: Tensor, names: Mapping[int, str]) -> str:
        if id(tensor) not in names:
            raise ConfigError(f"graph '{self.name}': '{tensor.name}' is a tensor of another graph")
        return names[id(tensor)]

    def _model(self, name: str, version: int) -> ModelConfig:
        repository.check_known(self._root, name)
        folder = completion.open_model(self._root, name)
        if version != -1 and version not in folder.versions:
            raise ConfigError(f"model '{name}' has no version {version}, it has {list(folder.versions)}")
        return folder.config

    def _check_inputs(self, model: ModelConfig, inputs: Mapping[str, object]) -> None:
        names = [spec.name for spec in model.inputs]
        for name, tensor in inputs.items():
            what = f"step '{model.name}': input '{name}'"
            if name not in names:
                near = spelling.near(name, [*names, *_OPTIONS])
                raise ConfigError(f"step '{model.name}': the model has no input '{name}', it has {names}{near}")
            self._own(what, tensor)

    def _own(self, what: str, tensor: object) -> None:
        """Raises ConfigError for what is no tensor, or one of another graph."""
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{what}: expected a tensor, as step['NAME'] or graph.input(...), got {tensor!r:.100}")
        if tensor.graph is not self:
            raise ConfigError(f"{what}: '{tensor.name}' is a tensor of graph '{tensor.graph.name}'")

    def _condition(self, what: str, condition: object) -> Expression:
        """Raises ConfigError for what does not hold or not for a row of this graph."""
        expected = f"{what}: expected a comparison of tensors, as step['RISK'] > 0.5"
        if not isinstance(condition, Expression):
            raise ConfigError(f"{expected}, got {condition!r:.100}")
        for tensor in condition.tensors():
            self._own(what, tensor)
        kind = condition.kind()
        if kind not in ("truth", None):
            raise ConfigError(f"{expected}, got a {kind}: {condition!r}")
        return condition

    def _note_default(self, what: str, tensor: Tensor, value: Value | None) -> None:
        if value is not None:
            arguments.check_value(f"{what}: default", value)
            self._defaults[id(tensor)] = (tensor, value)
            self._defaulted[id(tensor)] = here()

    def _fresh(self, name: str) -> str:
        made, number = name, 2
        while made in self._names:
            made, number = f"{name}_{number}", number + 1
        self._names.add(made)
        return made


# What a step takes beside its model's inputs.
_OPTIONS = [name for name, one in inspect.signature(Graph.step).parameters.items() if one.kind is one.KEYWORD_ONLY]


def _type(tensor: Tensor) -> int:
    return int(pb.DataType.Value(to_config(tensor.datatype)))


def _shown(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
