"""`ensemble_scheduling` -> a checked Plan. Pure: sees configurations only, executes nothing.

Every mistake is found here, at load: missing or doubled maps, unknown models and tensors, cycles, and datatypes or
shapes that do not fit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tutti.config import EnsembleStep, ModelConfig, TensorSpec
from tutti.errors import ConfigError
from tutti.types import Shape

ConfigOf = Callable[[str, str], ModelConfig]
"""(model name, version) -> its configuration. Raises a TuttiError when there is none."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a plan. Maps hold (model tensor, ensemble tensor) pairs; `needs` are the steps it waits for."""

    index: int
    model_name: str
    version: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    needs: frozenset[int]


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked graph. `readers` lists, for each ensemble tensor, the steps that read it."""

    name: str
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    producer: Mapping[str, int]
    readers: Mapping[str, tuple[int, ...]]

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


def plan(config: ModelConfig, config_of: ConfigOf) -> Plan:
    """Check an ensemble's configuration against the models it uses. Raises ConfigError naming step and tensor."""
    if not config.steps:
        raise _fail(config, "ensemble_scheduling.step", "expected at least one")
    specs: dict[str, Shape] = {spec.name: config.wire_shape(spec) for spec in config.inputs}
    datatypes = {spec.name: spec.datatype for spec in config.inputs}
    models = [_model(config, step, config_of) for step in config.steps]
    producer = _producers(config, models, specs, datatypes)
    for index, (step, model) in enumerate(zip(config.steps, models, strict=True)):
        _check_inputs(config, index, step, model, specs, datatypes)
    _check_outputs(config, specs, datatypes, producer)
    steps = tuple(_step(index, step, producer) for index, step in enumerate(config.steps))
    _check_order(config, steps)
    names = [name for step in steps for _, name in step.inputs]
    readers = {name: tuple(step.index for step in steps if name in dict(step.inputs).values()) for name in names}
    return Plan(config.name, steps, tuple(spec.name for spec in config.outputs), producer, readers)


def _fail(config: ModelConfig, path: str, why: str) -> ConfigError:
    return ConfigError(f"ensemble '{config.name}': {path}: {why}")


def _model(config: ModelConfig, step: EnsembleStep, config_of: ConfigOf) -> ModelConfig:
    if step.model_name == config.name:
        raise _fail(config, f"step '{step.model_name}'", "an ensemble cannot use itself")
    try:
        return config_of(step.model_name, step.version)
    except Exception as error:
        raise _fail(config, f"step '{step.model_name}'", f"its model is not available: {error}") from None


def _producers(
    config: ModelConfig, models: list[ModelConfig], shapes: dict[str, Shape], datatypes: dict[str, str]
) -> dict[str, int]:
    """Ensemble tensor -> the step that makes it. Adds their shapes and datatypes to the two dicts."""
    producer: dict[str, int] = {}
    for index, (step, model) in enumerate(zip(config.steps, models, strict=True)):
        specs = {spec.name: spec for spec in model.outputs}
        for model_tensor, tensor in step.output_map.items():
            path = f"step {index} '{step.model_name}' output_map '{model_tensor}'"
            if model_tensor not in specs:
                raise _fail(config, path, f"the model has outputs {sorted(specs)}")
            if tensor in shapes:
                raise _fail(config, path, f"ensemble tensor '{tensor}' is made more than once")
            producer[tensor] = index
            shapes[tensor] = model.wire_shape(specs[model_tensor])
            datatypes[tensor] = specs[model_tensor].datatype
    return producer


def _check_inputs(
    config: ModelConfig,
    index: int,
    step: EnsembleStep,
    model: ModelConfig,
    shapes: Mapping[str, Shape],
    datatypes: Mapping[str, str],
) -> None:
    specs = {spec.name: spec for spec in model.inputs}
    path = f"step {index} '{step.model_name}' input_map"
    for name, spec in specs.items():
        if name not in step.input_map and not spec.is_optional:
            raise _fail(config, path, f"input '{name}' of the model is not mapped")
    for model_tensor, tensor in step.input_map.items():
        if model_tensor not in specs:
            raise _fail(config, f"{path} '{model_tensor}'", f"the model has inputs {sorted(specs)}")
        if tensor not in shapes:
            raise _fail(config, f"{path} '{model_tensor}'", f"nothing makes ensemble tensor '{tensor}'")
        spec = specs[model_tensor]
        _check_fit(config, f"{path} '{model_tensor}'", model, spec, tensor, shapes[tensor], datatypes[tensor])


def _check_fit(
    config: ModelConfig, path: str, model: ModelConfig, spec: TensorSpec, tensor: str, shape: Shape, datatype: str
) -> None:
    if datatype != spec.datatype:
        raise _fail(config, path, f"expected datatype {spec.datatype}, ensemble tensor '{tensor}' is {datatype}")
    expected = model.wire_shape(spec)
    if not _shapes_fit(expected, shape):
        raise _fail(config, path, f"expected shape {list(expected)}, ensemble tensor '{tensor}' has {list(shape)}")


def _shapes_fit(expected: Shape, given: Shape) -> bool:
    """Whether some tensor can have both shapes: -1 is any size."""
    return len(expected) == len(given) and all(a == b or -1 in (a, b) for a, b in zip(expected, given, strict=True))


def _check_outputs(
    config: ModelConfig, shapes: Mapping[str, Shape], datatypes: Mapping[str, str], producer: Mapping[str, int]
) -> None:
    for spec in config.outputs:
        path = f"output '{spec.name}'"
        if spec.name not in producer:
            raise _fail(config, path, "no step makes it")
        if datatypes[spec.name] != spec.datatype:
            raise _fail(config, path, f"configured as {spec.datatype}, its step makes {datatypes[spec.name]}")
        if not _shapes_fit(config.wire_shape(spec), shapes[spec.name]):
            expected = f"configured with shape {list(config.wire_shape(spec))}"
            raise _fail(config, path, f"{expected}, its step makes {list(shapes[spec.name])}")


def _step(index: int, step: EnsembleStep, producer: Mapping[str, int]) -> Step:
    needs = frozenset(producer[tensor] for tensor in step.input_map.values() if tensor in producer)
    return Step(
        index, step.model_name, step.version, tuple(step.input_map.items()), tuple(step.output_map.items()), needs
    )


def _check_order(config: ModelConfig, steps: tuple[Step, ...]) -> None:
    """Raises ConfigError when some steps wait for each other."""
    done: set[int] = set()
    left = list(steps)
    while left:
        ready = [step for step in left if step.needs <= done]
        if not ready:
            raise _fail(config, "ensemble_scheduling.step", f"cycle among {[step.model_name for step in left]}")
        done.update(step.index for step in ready)
        left = [step for step in left if step.index not in done]
