"""A checked graph: its steps in data that an executor follows. How configurations become one is planner.py's."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from tutti.core.errors import ConfigError
from tutti.core.types import Shape
from tutti.ensembles.axes import Axis
from tutti.ensembles.conditions import Condition
from tutti.repository.model_config import ModelConfig

ConfigOf = Callable[[str, str], ModelConfig]
"""(model name, version) -> its configuration. Raises a TuttiError when there is none."""


class GraphError(ConfigError):
    """A graph that cannot run. `path` says what of its configuration is wrong, as "step 3 'gate' input_map 'x'"."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


# Whether a tensor is made for every row, for all rows of a request or none, or for some rows.
Made = Literal["always", "by request", "by row"]


@dataclass(frozen=True, slots=True)
class Each:
    """How a step runs per item: the ensemble tensors whose items it takes, and the one that counts each row's."""

    items: tuple[str, ...]
    count: str = ""


@dataclass(frozen=True, slots=True)
class TensorType:
    """An ensemble tensor: dims without the batch axis, and its value where nothing makes it, None where it has none.

    With `is_items` another tensor says how many items a row has: it may be filled up with more.
    """

    datatype: str
    dims: Shape
    default: Any = None
    made: Made = "always"
    is_items: bool = False


@dataclass(frozen=True)
class Step:
    """One step of a plan. Maps hold (model tensor, ensemble tensor) pairs; `needs` are the steps it waits for.

    It runs for rows that have all its `required` ensemble tensors and for which its conditions hold. `max_rows` is the
    model's largest batch, 0 where it has no batch axis; with `is_merged` requests of equal shapes reach it as one. Of a
    decoupled step at most `max_inflight` answers to a request are on their way at a time, any number where it is 0.
    A segment stands for several steps that are executed elsewhere (segments.py). The outputs `staying`, of the model,
    are left on the device where they are made: all that reads them is there. An answer may lack the outputs that are
    `dispensable`, of the model: no step requires them. Between it and the graph the batch axis of some tensors, of the
    model, is put in front or taken away: `axes_in` of its inputs, `axes_out` of its outputs.
    """

    index: int
    model_name: str
    version: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    needs: frozenset[int]
    required: tuple[str, ...] = ()
    max_rows: int = 0
    is_merged: bool = False
    when: Condition | None = None
    unless: Condition | None = None
    each: Each | None = None
    gathers: tuple[str, ...] = ()
    is_optional: bool = False
    is_decoupled: bool = False
    max_inflight: int = 0
    is_segment: bool = False
    staying: frozenset[str] = frozenset()
    dispensable: frozenset[str] = frozenset()
    axes_in: tuple[Axis, ...] = ()
    axes_out: tuple[Axis, ...] = ()

    @cached_property
    def wanted(self) -> tuple[str, ...]:
        """The outputs that it asks its model for."""
        return tuple(name for name, _ in self.outputs)

    @cached_property
    def is_plain(self) -> bool:
        """Whether it runs for all rows, each once."""
        return self.when is None and self.unless is None and self.each is None

    @cached_property
    def decides(self) -> tuple[str, ...]:
        """The ensemble tensors that its conditions look at."""
        conditions = [condition for condition in (self.when, self.unless) if condition is not None]
        return tuple(name for condition in conditions for name in condition.names)

    @cached_property
    def read(self) -> tuple[str, ...]:
        """All ensemble tensors that it looks at."""
        names = [name for _, name in self.inputs]
        names += self.decides
        if self.each is not None and self.each.count:
            names.append(self.each.count)
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Plan:
    """A checked graph. `readers` lists, for each ensemble tensor, the steps that look at it."""

    name: str
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    producer: Mapping[str, int]
    readers: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, TensorType]
    is_batched: bool = True
    deadline_ns: int = 0

    @cached_property
    def is_decoupled(self) -> bool:
        """Whether a request may have any number of answers."""
        return any(step.is_decoupled for step in self.steps)

    def steps_for(self, outputs: tuple[str, ...]) -> frozenset[int]:
        """The steps that the given outputs need, directly or not. No outputs means all of them."""
        needed: set[int] = set()
        waiting = [self.producer[name] for name in outputs or self.outputs]
        while waiting:
            index = waiting.pop()
            if index not in needed:
                needed.add(index)
                waiting.extend(self.steps[index].needs)
        return frozenset(needed)

    def part(self, indices: Iterable[int], outputs: Sequence[str]) -> "Plan":
        """The graph of some of the steps, that makes `outputs`; what they read of the others are its inputs."""
        kept = sorted(set(indices))
        positions = {index: position for position, index in enumerate(kept)}
        steps = [
            replace(
                self.steps[index],
                index=position,
                needs=frozenset(positions[needed] for needed in self.steps[index].needs if needed in positions),
            )
            for position, index in enumerate(kept)
        ]
        producer = {name: step.index for step in steps for _, name in step.outputs}
        names = dict.fromkeys([*(name for step in steps for name in step.read), *producer])
        return replace(
            self,
            steps=tuple(steps),
            outputs=tuple(outputs),
            producer=producer,
            readers=readers(steps),
            tensors={name: self.tensors[name] for name in names},
        )


def with_staying(plan: Plan, device_of: Callable[[Step], str]) -> Plan:
    """The plan, told which outputs may stay on a device: those that only plain steps on the same device read.

    `device_of` a step is "cpu" where its model takes its inputs, or makes its outputs, in host memory.
    """
    devices = [device_of(step) for step in plan.steps]
    steps = []
    for step in plan.steps:
        staying = {model_name for model_name, name in step.outputs if _stays(plan, devices, step, name)}
        steps.append(replace(step, staying=frozenset(staying)) if staying else step)
    return replace(plan, steps=tuple(steps))


def _stays(plan: Plan, devices: Sequence[str], step: Step, name: str) -> bool:
    device = devices[step.index]
    if device == "cpu" or not step.is_plain or step.axes_out or name in plan.outputs:
        return False
    readers = [plan.steps[index] for index in plan.readers.get(name, ())]
    return bool(readers) and all(
        reader.is_plain and not reader.axes_in and devices[reader.index] == device for reader in readers
    )


def with_dispensable(steps: list[Step]) -> list[Step]:
    """The steps, with the outputs that no step requires marked as dispensable."""
    required = {name for step in steps for name in (*step.required, *step.decides)}
    return [
        replace(step, dispensable=frozenset(model_name for model_name, name in step.outputs if name not in required))
        for step in steps
    ]


def readers(steps: Iterable[Step]) -> dict[str, tuple[int, ...]]:
    """For each ensemble tensor that some step looks at, these steps."""
    read = dict.fromkeys(name for step in steps for name in step.read)
    return {name: tuple(step.index for step in steps if name in step.read) for name in read}


def fail(config: ModelConfig, path: str, why: str) -> GraphError:
    """The error to raise about an ensemble, at a path of its configuration."""
    return GraphError(f"ensemble '{config.name}': {path}: {why}", path)
