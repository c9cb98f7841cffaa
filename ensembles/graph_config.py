"""What a graph written in Python is as config.pbtxt, checked as a whole against the models that it uses.

How it is written, and what is wrong with a single step, is not known here. A mistake of the whole graph is told with
the place in the Python file that it is about.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from tutti.core.dtypes import to_config
from tutti.core.errors import ConfigError
from tutti.ensembles import conditions, planner
from tutti.ensembles.conditions import ConditionError
from tutti.ensembles.expressions import Expression, Tensor, Value, bare
from tutti.ensembles.graph import GraphError
from tutti.ensembles.places import MistakeAt, Place
from tutti.ensembles.steps import Step
from tutti.repository import config
from tutti.repository.model_config import ModelConfig


@dataclass
class Written:
    """What a graph has been told so far."""

    name: str
    place: Place
    max_batch_size: int = 0
    # (tensor, whether it is optional).
    inputs: list[tuple[Tensor, bool]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outputs: list[tuple[str, Tensor]] = field(default_factory=list)
    # (tensor, the tensor that counts its items).
    items: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    # By the tensors' identities.
    defaults: dict[int, tuple[Tensor, Value]] = field(default_factory=dict)
    exit: Expression | None = None
    deadline_ms: int = 0
    # Where it was written: what is of the graph itself, by its path in the configuration; defaults and items, by the
    # identities of their tensors.
    places: dict[str, Place] = field(default_factory=dict)
    defaulted: dict[int, Place] = field(default_factory=dict)


class GraphConfig:
    """The configuration of a graph. `model_of` (name, version; -1 for any) raises ConfigError for an unknown model."""

    def __init__(self, graph: Written, model_of: Callable[[str, int], ModelConfig]) -> None:
        self._graph = graph
        self._model_of = model_of
        # The tensors' names in the configuration, by their identities: an output's is the one that the graph gives it.
        self._names = {id(tensor): name for name, tensor in graph.outputs}
        for tensor, _ in graph.inputs:
            self._names[id(tensor)] = tensor.name
        for step in graph.steps:
            for tensor in step.tensors.values():
                self._names.setdefault(id(tensor), tensor.name)

    def proto(self) -> pb.ModelConfig:
        """Raises ConfigError."""
        graph = self._graph
        for step in graph.steps:
            if not step.tensors:
                raise MistakeAt(f"step '{step.model.name}': nothing takes its outputs", step.place)
        proto = pb.ModelConfig(name=graph.name, platform="ensemble", max_batch_size=graph.max_batch_size)
        for tensor, optional in graph.inputs:
            proto.input.add(name=tensor.name, data_type=_type(tensor), dims=tensor.dims, optional=optional)
        for name, tensor in graph.outputs:
            proto.output.add(name=name, data_type=_type(tensor), dims=tensor.dims)
        for key, value in self._parameters(self._quoted()):
            proto.parameters[key].string_value = value
        for step in graph.steps:
            self._add_step(proto, step)
        self._check(proto)
        return proto

    def _add_step(self, proto: pb.ModelConfig, step: Step) -> None:
        entry = proto.ensemble_scheduling.step.add(model_name=step.model.name, model_version=step.version)
        for name, tensor in step.inputs.items():
            entry.input_map[name] = self._name_of(tensor)
        for name, tensor in step.tensors.items():
            entry.output_map[name] = self._names[id(tensor)]

    def _check(self, proto: pb.ModelConfig) -> None:
        try:
            parsed = config.parse(text_format.MessageToString(proto), self._graph.name)
            planner.plan(parsed, lambda name, version: self._model_of(name, int(version or -1)))
        except GraphError as error:
            raise MistakeAt(str(error), self._place_of(error.path)) from None
        except ConfigError as error:
            raise MistakeAt(str(error), self._graph.place) from None

    def _place_of(self, path: str) -> Place:
        """Where it was written that a path of the configuration is about; the graph's own where that is not known."""
        places = dict(self._graph.places)
        for index, step in enumerate(self._graph.steps):
            places.setdefault(f"step '{step.model.name}'", step.place)
            places[f"step {index}"] = step.place
            for tensor in step.tensors.values():
                for kind in ("when", "each", "gather", "optional", "default"):
                    places[f"parameters.tutti.{kind}.{self._names[id(tensor)]}"] = step.place
        for key, place in self._graph.defaulted.items():
            for kind in ("default", "items"):
                places[f"parameters.tutti.{kind}.{self._names[key]}"] = place
        if path == "ensemble_scheduling.step" and self._graph.steps:  # a cycle, which its last step closes
            return self._graph.steps[-1].place
        return next(
            (place for key, place in places.items() if path == key or path.startswith(f"{key} ")), self._graph.place
        )

    def _quoted(self) -> dict[int, str]:
        """The tensors' names in conditions, where these read them."""
        read = [*(step.when for step in self._graph.steps), self._graph.exit]
        tensors = {id(tensor): tensor for when in read if when is not None for tensor in when.tensors()}
        try:
            return {key: conditions.quoted(self._name_of(tensor)) for key, tensor in tensors.items()}
        except ConditionError as error:
            raise MistakeAt(str(error), self._graph.place) from None

    def _parameters(self, quoted: Mapping[int, str]) -> Iterator[tuple[str, str]]:
        for step in self._graph.steps:
            first = self._names[id(next(iter(step.tensors.values())))] if step.tensors else ""
            if step.when is not None:
                yield f"tutti.when.{first}", bare(step.when.render(quoted))
            if step.each:
                yield f"tutti.each.{first}", ", ".join(self._name_of(tensor) for tensor in step.each)
            for output, how in step.gather.items():
                yield f"tutti.gather.{self._name_of(step[output])}", how
            if step.is_optional:
                yield f"tutti.optional.{first}", "true"
            for output, value in step.defaults.items():
                if output in step.tensors:
                    yield f"tutti.default.{self._names[id(step.tensors[output])]}", _shown(value)
        for tensor, count in self._graph.items:
            yield f"tutti.items.{self._name_of(tensor)}", self._name_of(count)
        for tensor, value in self._graph.defaults.values():
            yield f"tutti.default.{self._name_of(tensor)}", _shown(value)
        if self._graph.exit is not None:
            yield "tutti.exit", bare(self._graph.exit.render(quoted))
        if self._graph.deadline_ms:
            yield "tutti.deadline_ms", str(self._graph.deadline_ms)

    def _name_of(self, tensor: Tensor) -> str:
        if id(tensor) not in self._names:
            raise ConfigError(f"graph '{self._graph.name}': '{tensor.name}' is a tensor of another graph")
        return self._names[id(tensor)]


def _type(tensor: Tensor) -> int:
    return int(pb.DataType.Value(to_config(tensor.datatype)))


def _shown(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
