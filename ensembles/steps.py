"""A step of a graph written in Python: its model, its inputs and options, and the tensors that it makes.

It is checked against its model when it is written. Other steps, and the graph that they form, are not known here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tutti.core.errors import ConfigError
from tutti.ensembles import arguments, extensions, spelling
from tutti.ensembles.expressions import Expression, Tensor, Value
from tutti.ensembles.places import Place
from tutti.repository.model_config import ModelConfig


class Owner(Protocol):
    """What a step asks of its graph."""

    @property
    def is_batched(self) -> bool: ...

    def _fresh(self, name: str) -> str:
        """A name like this one that no tensor of the graph has yet."""


@dataclass
class Step:
    """A step of a graph; `step["OUTPUT"]` is a tensor that it makes."""

    graph: Owner
    model: ModelConfig
    version: int
    inputs: dict[str, Tensor]
    when: Expression | None
    each: tuple[Tensor, ...]
    gather: Mapping[str, str]
    is_optional: bool
    defaults: Mapping[str, Value]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    place: Place = ()

    def __repr__(self) -> str:
        return f"step '{self.model.name}', whose outputs are {', '.join(f'step[{name!r}]' for name in self._outputs())}"

    def __getitem__(self, output: str) -> Tensor:
        """Raises ConfigError for an output that the model does not have."""
        self._check_outputs([output])
        if output not in self.tensors:
            spec = next(spec for spec in self.model.outputs if spec.name == output)
            dims = spec.dims
            if self.each and self.gather.get(output, "concat") == "concat":
                dims = (-1, *dims)
            name = self.graph._fresh(f"{self.model.name}.{output}")
            is_sure = self.model.is_batched == self.graph.is_batched
            self.tensors[output] = Tensor(self.graph, name, spec.datatype, dims, is_sure)
        return self.tensors[output]

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

    def check(self) -> None:
        """Raises ConfigError for options that do not fit the step."""
        subject = f"step '{self.model.name}'"
        self._check_inputs(subject)
        self._check_outputs([*self.gather, *self.defaults])
        for output, how in self.gather.items():
            if how not in extensions.GATHERS:
                raise ConfigError(
                    f"{subject}: gather of '{output}': expected {', '.join(extensions.GATHERS)}, got {how!r:.100}"
                )
        if self.gather and not self.each:
            raise ConfigError(f"{subject}: gather needs each=[...], the tensors whose items are gathered")
        for output, value in self.defaults.items():
            arguments.check_value(f"{subject}: default of '{output}'", value)

    def _check_inputs(self, subject: str) -> None:
        specs = {spec.name: spec for spec in self.model.inputs}
        for name, tensor in self.inputs.items():
            if tensor.datatype != specs[name].datatype:
                raise ConfigError(f"{subject}: input '{name}': expected {specs[name].datatype}, got {tensor!r}")
        for name, spec in specs.items():
            if name not in self.inputs and not spec.is_optional:
                raise ConfigError(f"{subject}: input '{name}' of the model is missing; it has {list(specs)}")
        for item in self.each:
            if not any(item is tensor for tensor in self.inputs.values()):
                raise ConfigError(f"{subject}: each: expected tensors among its inputs, got {item!r}")
