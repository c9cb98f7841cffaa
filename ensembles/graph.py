"""`ensemble_scheduling` and what extensions.py adds to it -> a checked Plan. Pure: executes nothing.

Every mistake is found here, at load: missing or doubled maps, unknown models and tensors, cycles, datatypes or shapes
that do not fit, conditions on what is not there, and outputs that nothing may make.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from tutti.core.dtypes import NUMPY
from tutti.core.errors import ConfigError
from tutti.core.types import Shape
from tutti.ensembles import conditions, extensions
from tutti.ensembles.axes import Axis, shapes_fit
from tutti.ensembles.conditions import Condition, ConditionError
from tutti.ensembles.extensions import ExtensionError, Extensions
from tutti.repository.config import EnsembleStep, ModelConfig, TensorSpec

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
        own = sorted(set(indices))
        at = {index: position for position, index in enumerate(own)}
        steps = [
            replace(
                self.steps[index],
                index=position,
                needs=frozenset(at[needed] for needed in self.steps[index].needs if needed in at),
            )
            for position, index in enumerate(own)
        ]
        producer = {name: step.index for step in steps for _, name in step.outputs}
        names = dict.fromkeys([*(name for step in steps for name in step.read), *producer])
        return replace(
            self,
            steps=tuple(steps),
            outputs=tuple(outputs),
            producer=producer,
            readers=_readers(steps),
            tensors={name: self.tensors[name] for name in names},
        )


def with_staying(plan: Plan, device_of: Callable[[Step], str]) -> Plan:
    """The plan whose steps leave on a device what only plain steps on the same device read.

    `device_of` a step is "cpu" where its model takes its inputs, or makes its outputs, in host memory.
    """
    devices = [device_of(step) for step in plan.steps]
    steps = []
    for step in plan.steps:
        staying = {model_name for model_name, name in step.outputs if _stays(plan, devices, step, name)}
        steps.append(replace(step, staying=frozenset(staying)) if staying else step)
    return replace(plan, steps=tuple(steps))


def _stays(plan: Plan, devices: Sequence[str], step: Step, name: str) -> bool:
    own = devices[step.index]
    if own == "cpu" or not step.is_plain or step.axes_out or name in plan.outputs:
        return False
    readers = [plan.steps[index] for index in plan.readers.get(name, ())]
    return bool(readers) and all(
        reader.is_plain and not reader.axes_in and devices[reader.index] == own for reader in readers
    )


def _with_dispensable(steps: list[Step]) -> list[Step]:
    """The steps, told which of their outputs no step requires."""
    required = {name for step in steps for name in (*step.required, *step.decides)}
    return [
        replace(step, dispensable=frozenset(model_name for model_name, name in step.outputs if name not in required))
        for step in steps
    ]


def _readers(steps: Iterable[Step]) -> dict[str, tuple[int, ...]]:
    read = dict.fromkeys(name for step in steps for name in step.read)
    return {name: tuple(step.index for step in steps if name in step.read) for name in read}


def plan(config: ModelConfig, config_of: ConfigOf) -> Plan:
    """Check an ensemble's configuration against the models it uses. Raises ConfigError naming step and tensor."""
    if not config.steps:
        raise _fail(config, "ensemble_scheduling.step", "expected at least one")
    try:
        extra = extensions.parse(config.parameters)
    except ExtensionError as error:
        raise GraphError(f"ensemble '{config.name}': {error}", str(error).partition(":")[0]) from None
    return _Planner(config, extra, config_of).plan()


class _Planner:
    """One graph while it is checked."""

    def __init__(self, config: ModelConfig, extra: Extensions, config_of: ConfigOf) -> None:
        self._config = config
        self._extra = extra
        self._config_of = config_of
        self._models = [self._model(step) for step in config.steps]
        self._producer: dict[str, int] = {}
        self._shapes: dict[str, Shape] = {spec.name: config.wire_shape(spec) for spec in config.inputs}
        self._datatypes = {spec.name: spec.datatype for spec in config.inputs}
        self._each: dict[int, Each] = {}
        # The tensors whose shapes begin with a batch axis; and how steps' tensors are handed over where they differ.
        self._batched = {spec.name for spec in config.inputs} if config.is_batched else set[str]()
        self._axes_in: dict[int, list[Axis]] = {}
        self._axes_out: dict[int, list[Axis]] = {}

    def plan(self) -> Plan:
        config = self._config
        for index, step in enumerate(config.steps):
            for tensor in step.output_map.values():
                if tensor in self._producer or tensor in self._shapes:
                    raise _fail(config, self._path(index, "output_map"), f"tensor '{tensor}' is made more than once")
                self._producer[tensor] = index
        for tensor in (*self._extra.when, *self._extra.each, *self._extra.gather, *self._extra.optional):
            self._step_of("when" if tensor in self._extra.when else "each, gather or optional", tensor)
        for index in range(len(config.steps)):
            self._find_each(index)
        for index in range(len(config.steps)):
            self._add_outputs(index)
        for index in range(len(config.steps)):
            self._check_inputs(index)
        self._check_counts()
        self._check_outputs()
        steps = [self._step(index) for index in range(len(config.steps))]
        steps = self._with_exit(steps)
        order = self._order(steps)
        steps = _with_dispensable(self._with_limits(steps, order))
        tensors = self._tensors(steps, order)
        return Plan(
            config.name, tuple(steps), tuple(spec.name for spec in config.outputs), self._producer, _readers(steps),
            tensors, config.is_batched, self._extra.deadline_ns,
        )  # fmt: skip

    def _path(self, index: int, what: str = "") -> str:
        return f"step {index} '{self._config.steps[index].model_name}'" + (f" {what}" if what else "")

    def _model(self, step: EnsembleStep) -> ModelConfig:
        if step.model_name == self._config.name:
            raise _fail(self._config, f"step '{step.model_name}'", "an ensemble cannot use itself")
        try:
            return self._config_of(step.model_name, step.version)
        except Exception as error:
            raise _fail(self._config, f"step '{step.model_name}'", f"its model is not available: {error}") from None

    def _step_of(self, kind: str, tensor: str) -> int:
        if tensor not in self._producer:
            raise _fail(self._config, f"parameters.tutti.{kind}.{tensor}", "no step makes a tensor of that name")
        return self._producer[tensor]

    def _find_each(self, index: int) -> None:
        made = self._config.steps[index].output_map.values()
        given = {self._extra.each[tensor] for tensor in made if tensor in self._extra.each}
        if not given:
            for tensor in made:
                if tensor in self._extra.gather:
                    raise _fail(self._config, f"parameters.tutti.gather.{tensor}", f"needs tutti.each.{tensor}")
            return
        items = tuple(dict.fromkeys(name for names in given for name in names))
        path = f"{self._path(index)} tutti.each"
        mapped = self._config.steps[index].input_map.values()
        for name in items:
            if name not in mapped:
                raise _fail(self._config, path, f"the step has no input '{name}', it has {sorted(set(mapped))}")
        if not self._config.is_batched or not self._models[index].is_batched:
            raise _fail(self._config, path, "needs max_batch_size of at least 1, of the ensemble and of the model")
        counts = {self._extra.items[name] for name in items if name in self._extra.items}
        if len(counts) > 1:
            raise _fail(self._config, path, f"its items are counted by more than one tensor: {sorted(counts)}")
        self._each[index] = Each(items, next(iter(counts), ""))

    def _add_outputs(self, index: int) -> None:
        """Shapes and datatypes of what a step makes."""
        model, step = self._models[index], self._config.steps[index]
        specs = {spec.name: spec for spec in model.outputs}
        for model_tensor, tensor in step.output_map.items():
            if model_tensor not in specs:
                path = self._path(index, f"output_map '{model_tensor}'")
                raise _fail(self._config, path, f"the model has outputs {sorted(specs)}")
            shape = model.wire_shape(specs[model_tensor])
            datatype = specs[model_tensor].datatype
            how = self._extra.gather.get(tensor, "concat")
            if index in self._each and how == "concat":
                shape = (shape[0], -1, *shape[1:])
            elif index in self._each and datatype in ("BYTES", "BOOL"):
                raise _fail(self._config, f"parameters.tutti.gather.{tensor}", f"{how} of {datatype}: expected concat")
            if index not in self._each:
                shape = self._kept(index, model_tensor, tensor, shape)
            elif model.is_batched:
                self._batched.add(tensor)
            self._shapes[tensor], self._datatypes[tensor] = shape, datatype

    def _kept(self, index: int, model_tensor: str, tensor: str, made: Shape) -> Shape:
        """The shape that the graph goes on with, of one that a step makes: the batch axis may be another's affair."""
        is_batched = self._models[index].is_batched
        if is_batched:
            self._batched.add(tensor)
        ranks = self._ranks(tensor)
        if not is_batched and self._config.is_batched and ranks == {len(made) + 1}:
            self._axes_out.setdefault(index, []).append(Axis(model_tensor, len(made), True))
            self._batched.add(tensor)
            return (-1, *made)
        if is_batched and not self._config.is_batched and self._rank_of_output(tensor) == len(made) - 1:
            self._axes_out.setdefault(index, []).append(Axis(model_tensor, len(made) - 1, False))
            self._batched.discard(tensor)
            return made[1:]
        return made

    def _rank_of_output(self, tensor: str) -> int | None:
        """The rank of an output of the ensemble; None where the tensor is none."""
        return next((len(self._config.wire_shape(spec)) for spec in self._config.outputs if spec.name == tensor), None)

    def _ranks(self, tensor: str) -> set[int]:
        """The ranks that models with a batch, and the ensemble's answer, expect of a tensor."""
        ranks = {
            len(model.wire_shape(spec))
            for model, step in zip(self._models, self._config.steps, strict=True)
            for spec in model.inputs
            if model.is_batched and step.input_map.get(spec.name) == tensor
        }
        own = self._rank_of_output(tensor)
        return ranks if own is None else ranks | {own}

    def _check_inputs(self, index: int) -> None:
        model, step = self._models[index], self._config.steps[index]
        specs = {spec.name: spec for spec in model.inputs}
        path = self._path(index, "input_map")
        for name, spec in specs.items():
            if name not in step.input_map and not spec.is_optional:
                raise _fail(self._config, path, f"input '{name}' of the model is not mapped")
        for model_tensor, tensor in step.input_map.items():
            if model_tensor not in specs:
                raise _fail(self._config, f"{path} '{model_tensor}'", f"the model has inputs {sorted(specs)}")
            if tensor not in self._shapes:
                raise _fail(self._config, f"{path} '{model_tensor}'", f"nothing makes ensemble tensor '{tensor}'")
            self._check_fit(index, f"{path} '{model_tensor}'", specs[model_tensor], tensor)

    def _check_counts(self) -> None:
        for name, count in self._extra.items.items():
            path = f"parameters.tutti.items.{name}"
            if name not in self._shapes or count not in self._shapes:
                raise _fail(self._config, path, f"nothing makes '{count if name in self._shapes else name}'")
            if self._dims(count) not in ((), (1,)) or self._datatypes[count] not in _WHOLE:
                what = f"'{count}' is {self._datatypes[count]} with dims {list(self._dims(count))}"
                raise _fail(self._config, path, f"expected one whole number a row, {what}")
            if self._extra.default.get(count, "0") != "0":
                what = "a row without items has none: expected 0"
                raise _fail(self._config, f"parameters.tutti.default.{count}", what)

    def _check_fit(self, index: int, path: str, spec: TensorSpec, tensor: str) -> None:
        shape, datatype = self._shapes[tensor], self._datatypes[tensor]
        if datatype != spec.datatype:
            raise _fail(
                self._config, path, f"expected datatype {spec.datatype}, ensemble tensor '{tensor}' is {datatype}"
            )
        expected = self._models[index].wire_shape(spec)
        each = self._each.get(index)
        if each is not None and tensor in each.items:
            expected = (expected[0], -1, *expected[1:])
        if not shapes_fit(expected, shape) and not self._is_handed_over(index, spec, tensor):
            what = "items of " if each is not None and tensor in each.items else ""
            raise _fail(
                self._config,
                path,
                f"expected shape {list(expected)}, {what}ensemble tensor '{tensor}' has {list(shape)}",
            )

    def _is_handed_over(self, index: int, spec: TensorSpec, tensor: str) -> bool:
        """Whether a tensor fits a step's input once a batch axis is put in front of it, or taken away; notes which."""
        shape, model = self._shapes[tensor], self._models[index]
        is_added = model.is_batched and tensor not in self._batched and not self._config.is_batched
        is_taken = not model.is_batched and tensor in self._batched
        if not (is_added or is_taken) or not shapes_fit(spec.dims, shape if is_added else shape[1:]):
            return False
        self._axes_in.setdefault(index, []).append(Axis(spec.name, len(spec.dims), is_added))
        return True

    def _dims(self, tensor: str) -> Shape:
        return self._shapes[tensor][1:] if self._config.is_batched else self._shapes[tensor]

    def _check_outputs(self) -> None:
        for spec in self._config.outputs:
            path = f"output '{spec.name}'"
            if spec.name not in self._producer:
                raise _fail(self._config, path, "no step makes it")
            if self._datatypes[spec.name] != spec.datatype:
                made = self._datatypes[spec.name]
                raise _fail(self._config, path, f"configured as {spec.datatype}, its step makes {made}")
            if not shapes_fit(self._config.wire_shape(spec), self._shapes[spec.name]):
                expected = f"configured with shape {list(self._config.wire_shape(spec))}"
                raise _fail(self._config, path, f"{expected}, its step makes {list(self._shapes[spec.name])}")

    def _step(self, index: int) -> Step:
        model, step = self._models[index], self._config.steps[index]
        optional = {spec.name for spec in model.inputs if spec.is_optional}
        each = self._each.get(index)
        required = [tensor for name, tensor in step.input_map.items() if name not in optional]
        required += [*each.items, *([each.count] if each.count else [])] if each is not None else []
        made = list(step.output_map.values())
        texts = list(dict.fromkeys(self._extra.when[tensor] for tensor in made if tensor in self._extra.when))
        when = self._condition(f"{self._path(index)} tutti.when", _joined(texts)) if texts else None
        is_merged = _may_merge(model, self._config_of) and self._config.is_batched
        if not model.is_batched and self._config.is_batched and when is not None:
            raise _fail(
                self._config, f"{self._path(index)} tutti.when", "the model has no batch axis to take rows from"
            )
        # An ensemble without a batch of its own hands tensors on as they are: a first axis is its models' affair.
        max_rows = model.max_batch_size if self._config.is_batched else 0
        made_step = Step(
            index, step.model_name, step.version, tuple(step.input_map.items()), tuple(step.output_map.items()),
            frozenset(), tuple(dict.fromkeys(required)), max_rows, is_merged, when, None, each,
            tuple(self._extra.gather.get(tensor, "concat") for tensor in made) if each is not None else (),
            any(tensor in self._extra.optional for tensor in made), model.is_decoupled,
            axes_in=tuple(self._axes_in.get(index, ())), axes_out=tuple(self._axes_out.get(index, ())),
        )  # fmt: skip
        return self._with_needs(made_step)

    def _with_needs(self, step: Step) -> Step:
        return replace(step, needs=frozenset(self._producer[name] for name in step.read if name in self._producer))

    def _condition(self, path: str, text: str) -> Condition:
        specs = {name: (self._datatypes[name], self._dims(name)) for name in self._shapes}
        try:
            return conditions.parse(text, specs)
        except ConditionError as error:
            raise _fail(self._config, path, str(error)) from None

    def _with_exit(self, steps: list[Step]) -> list[Step]:
        """Rows for which the exit's condition holds take no step that it does not itself need."""
        if not self._extra.exit:
            return steps
        condition = self._condition("parameters.tutti.exit", self._extra.exit)
        before: set[int] = set()
        waiting = [self._producer[name] for name in condition.names if name in self._producer]
        while waiting:
            index = waiting.pop()
            if index not in before:
                before.add(index)
                waiting.extend(steps[index].needs)
        later = [step for step in steps if step.index not in before]
        for step in later:
            if not self._models[step.index].is_batched and self._config.is_batched:
                raise _fail(self._config, "parameters.tutti.exit", f"{self._path(step.index)} has no batch axis")
        return [step if step.index in before else self._with_needs(replace(step, unless=condition)) for step in steps]

    def _order(self, steps: list[Step]) -> list[Step]:
        """Each step after those it needs. Raises ConfigError when some wait for each other."""
        done: set[int] = set()
        ordered: list[Step] = []
        while len(ordered) < len(steps):
            ready = [step for step in steps if step.index not in done and step.needs <= done]
            if not ready:
                left = [step.model_name for step in steps if step.index not in done]
                raise _fail(self._config, "ensemble_scheduling.step", f"cycle among {left}")
            ordered += ready
            done.update(step.index for step in ready)
        return ordered

    def _with_limits(self, steps: list[Step], order: list[Step]) -> list[Step]:
        """Each answer of a decoupled step goes on by itself: it meets tensors that were made of it, and no others.

        A decoupled step waits while too many of its answers are on their way, unless its own model is among those that
        they wait for.
        """
        # The decoupled step of whose answers a tensor is made; None for tensors of the request.
        source: dict[str, int | None] = dict.fromkeys((spec.name for spec in self._config.inputs), None)
        after: dict[int, set[str]] = {}  # the models that a decoupled step's answers go through
        parent: dict[int, int | None] = {}
        for step in order:
            index = self._one_source(self._path(step.index), "takes", sorted(step.read), source)
            above = index
            while above is not None:
                after[above] |= _models_of(step, self._config_of)
                above = parent[above]
            if step.is_decoupled:
                self._check_plain(step)
                parent[step.index], after[step.index] = index, set()
                index = step.index
            source.update((name, index) for _, name in step.outputs)
        self._one_source("output", "the ensemble has", [spec.name for spec in self._config.outputs], source)
        limit = self._config.max_inflight_requests
        held = {i for i, models in after.items() if not models & _models_of(steps[i], self._config_of)}
        return [replace(step, max_inflight=limit) if step.index in held else step for step in steps]

    def _one_source(self, path: str, what: str, names: Sequence[str], source: Mapping[str, int | None]) -> int | None:
        found = {source[name]: name for name in names}
        if len(found) > 1:
            told = [f"'{name}' of {self._path(i) if i is not None else 'the request'}" for i, name in found.items()]
            raise _fail(self._config, path, f"{what} tensors of different decoupled steps: {', '.join(told)}")
        return next(iter(found), None)

    def _check_plain(self, step: Step) -> None:
        extra = self._extra
        for kind, named in (("when", extra.when), ("default", extra.default), ("each", extra.each)):
            if any(name in named for _, name in step.outputs):
                raise _fail(self._config, f"{self._path(step.index)} tutti.{kind}", "the step is decoupled")
        if step.is_optional or extra.exit:
            what = "tutti.optional" if step.is_optional else "tutti.exit"
            raise _fail(self._config, f"{self._path(step.index)} {what}", "the step is decoupled")

    def _tensors(self, steps: list[Step], order: list[Step]) -> dict[str, TensorType]:
        """All tensors, and whether they are made; an output that may be missing in some rows needs a default."""
        defaults = {name: self._default(name, text) for name, text in self._extra.default.items()}
        found: dict[str, TensorType] = {}
        for spec in self._config.inputs:
            default = defaults.get(spec.name)
            made: Made = "by request" if spec.is_optional and default is None else "always"
            found[spec.name] = TensorType(spec.datatype, self._dims(spec.name), default, made)
        for step in order:
            read = [found[name].made for _, name in step.inputs]
            made = "by request" if step.is_optional else "always"
            if any(found[name].made == "by request" for name in step.required):
                made = "by request"
            if read and "always" not in read:  # with none of its inputs it does not run
                made = "by row" if "by row" in read else "by request"
            if step.when is not None or step.unless is not None:
                made = "by row"
            if any(found[name].made == "by row" for name in step.required):
                made = "by row"
            hows = step.gathers or ("",) * len(step.outputs)
            for (_, name), how in zip(step.outputs, hows, strict=True):
                default = defaults.get(name)
                own: Made = "by row" if how in ("max", "min", "mean") else made
                own = own if default is None else "always"
                is_items = name in self._extra.items
                found[name] = TensorType(self._datatypes[name], self._dims(name), default, own, is_items)
        for spec in self._config.outputs:
            if found[spec.name].made == "by row" and self._config.is_batched:
                what = f"is not made for every row: needs parameters.tutti.default.{spec.name} (in Python default=...)"
                raise _fail(self._config, f"output '{spec.name}'", what)
        return found

    def _default(self, name: str, text: str) -> Any:
        path = f"parameters.tutti.default.{name}"
        if name not in self._shapes:
            raise _fail(self._config, path, "there is no tensor of that name")
        datatype = self._datatypes[name]
        if datatype == "BYTES":
            return text.encode()
        if datatype == "BOOL":
            if text not in ("true", "false"):
                raise _fail(self._config, path, f"expected true or false, got '{text}'")
            return text == "true"
        try:
            number = float(text) if datatype in ("FP16", "FP32", "FP64", "BF16") else int(text)
            return np.array(number, NUMPY[datatype])[()] if datatype != "BF16" else _bf16(number)
        except (ValueError, OverflowError):
            raise _fail(self._config, path, f"expected a value of {datatype}, got '{text}'") from None


_WHOLE = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")


def _bf16(number: float) -> Any:
    """The upper half of an FP32."""
    return np.array([number], np.float32).view(np.uint16)[1]


def _joined(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else " and ".join(f"({text})" for text in texts)


def _models_of(step: Step | EnsembleStep, config_of: ConfigOf) -> set[str]:
    """The names of a step's model and of those that it is made of."""
    found = {step.model_name}
    for inner in config_of(step.model_name, step.version).steps:
        found |= _models_of(inner, config_of)
    return found


def _may_merge(model: ModelConfig, config_of: ConfigOf) -> bool:
    if not model.is_ensemble:
        return model.may_merge
    return model.is_batched and all(
        _may_merge(config_of(step.model_name, step.version), config_of) for step in model.steps
    )


def _fail(config: ModelConfig, path: str, why: str) -> GraphError:
    return GraphError(f"ensemble '{config.name}': {path}: {why}", path)
