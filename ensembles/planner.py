"""`ensemble_scheduling` and what extensions.py adds to it -> a checked Plan. Pure: executes nothing.

Every mistake is found here, at load: missing or doubled maps, unknown models and tensors, cycles, datatypes or shapes
that do not fit, conditions on what is not there, and outputs that nothing may make.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tutti.ensembles import conditions, decoupled, extensions
from tutti.ensembles.conditions import Condition, ConditionError
from tutti.ensembles.extensions import ExtensionError
from tutti.ensembles.graph import (
    ConfigOf,
    GraphError,
    Made,
    Plan,
    Step,
    TensorType,
    fail,
    readers,
    with_dispensable,
)  # fmt: skip
from tutti.ensembles.spelling import near
from tutti.ensembles.tensor_checks import GraphTensors
from tutti.repository.model_config import ModelConfig


def plan(config: ModelConfig, config_of: ConfigOf) -> Plan:
    """Check an ensemble's configuration against the models it uses. Raises ConfigError naming step and tensor."""
    if not config.steps:
        raise fail(config, "ensemble_scheduling.step", "expected at least one")
    try:
        extra = extensions.parse(config.parameters)
    except ExtensionError as error:
        raise GraphError(f"ensemble '{config.name}': {error}", str(error).partition(":")[0]) from None
    tensors = GraphTensors(config, extra, config_of)
    steps = _with_exit(tensors, [_step(tensors, index, config_of) for index in range(len(config.steps))])
    order = _order(config, steps)
    steps = with_dispensable(decoupled.with_limits(tensors, steps, order, config_of))
    types = _types(tensors, order)
    return Plan(
        config.name, tuple(steps), tuple(spec.name for spec in config.outputs), tensors.producer, readers(steps),
        types, config.is_batched, extra.deadline_ns,
    )  # fmt: skip


def _step(tensors: GraphTensors, index: int, config_of: ConfigOf) -> Step:
    config, extra = tensors.config, tensors.extra
    model, step = tensors.models[index], config.steps[index]
    optional = {spec.name for spec in model.inputs if spec.is_optional}
    each = tensors.each.get(index)
    required = [tensor for name, tensor in step.input_map.items() if name not in optional]
    required += [*each.items, *([each.count] if each.count else [])] if each is not None else []
    outputs = list(step.output_map.values())
    texts = list(dict.fromkeys(extra.when[tensor] for tensor in outputs if tensor in extra.when))
    path = f"{tensors.path(index)} tutti.when"
    when = _condition(tensors, path, _joined(texts)) if texts else None
    if not model.is_batched and config.is_batched and when is not None:
        raise fail(config, path, "the model has no batch axis to take rows from")
    return _with_needs(
        tensors,
        Step(
            index,
            step.model_name,
            step.version,
            tuple(step.input_map.items()),
            tuple(step.output_map.items()),
            frozenset(),
            tuple(dict.fromkeys(required)),
            # An ensemble without a batch of its own hands tensors on as they are: a first axis is its models' affair.
            max_rows=model.max_batch_size if config.is_batched else 0,
            is_merged=_may_merge(model, config_of) and config.is_batched,
            when=when,
            each=each,
            gathers=tuple(extra.gather.get(tensor, "concat") for tensor in outputs) if each is not None else (),
            is_optional=any(tensor in extra.optional for tensor in outputs),
            is_decoupled=model.is_decoupled,
            axes_in=tuple(tensors.axes_in.get(index, ())),
            axes_out=tuple(tensors.axes_out.get(index, ())),
        ),
    )


def _with_needs(tensors: GraphTensors, step: Step) -> Step:
    return replace(step, needs=frozenset(tensors.producer[name] for name in step.read if name in tensors.producer))


def _condition(tensors: GraphTensors, path: str, text: str) -> Condition:
    specs = {name: (tensors.datatypes[name], tensors.dims(name)) for name in tensors.shapes}
    try:
        return conditions.parse(text, specs)
    except ConditionError as error:
        raise fail(tensors.config, path, str(error)) from None


def _with_exit(tensors: GraphTensors, steps: list[Step]) -> list[Step]:
    """Rows for which the exit's condition holds take no step that it does not itself need."""
    if not tensors.extra.exit:
        return steps
    path = "parameters.tutti.exit"
    condition = _condition(tensors, path, tensors.extra.exit)
    before: set[int] = set()
    waiting = [tensors.producer[name] for name in condition.names if name in tensors.producer]
    while waiting:
        index = waiting.pop()
        if index not in before:
            before.add(index)
            waiting.extend(steps[index].needs)
    for step in steps:
        if step.index not in before and not tensors.models[step.index].is_batched and tensors.config.is_batched:
            raise fail(tensors.config, path, f"{tensors.path(step.index)} has no batch axis")
    return [step if step.index in before else _with_needs(tensors, replace(step, unless=condition)) for step in steps]


def _order(config: ModelConfig, steps: Sequence[Step]) -> list[Step]:
    """Each step after those it needs. Raises GraphError when some wait for each other."""
    done: set[int] = set()
    ordered: list[Step] = []
    while len(ordered) < len(steps):
        ready = [step for step in steps if step.index not in done and step.needs <= done]
        if not ready:
            left = [step.model_name for step in steps if step.index not in done]
            raise fail(config, "ensemble_scheduling.step", f"cycle among {left}")
        ordered += ready
        done.update(step.index for step in ready)
    return ordered


def _types(tensors: GraphTensors, order: Sequence[Step]) -> dict[str, TensorType]:
    """All tensors, and whether they are made; an output that may be missing in some rows needs a default."""
    config, extra = tensors.config, tensors.extra
    defaults = {name: _default(tensors, name, text) for name, text in extra.default.items()}
    types: dict[str, TensorType] = {}
    for spec in config.inputs:
        default = defaults.get(spec.name)
        presence: Made = "by request" if spec.is_optional and default is None else "always"
        types[spec.name] = TensorType(spec.datatype, tensors.dims(spec.name), default, presence)
    for step in order:
        of_step = _made(step, types)
        gathers = step.gathers or ("",) * len(step.outputs)
        for (_, name), gather in zip(step.outputs, gathers, strict=True):
            presence = "by row" if gather in ("max", "min", "mean") else of_step
            presence = presence if defaults.get(name) is None else "always"
            types[name] = TensorType(
                tensors.datatypes[name], tensors.dims(name), defaults.get(name), presence, name in extra.items
            )
    for spec in config.outputs:
        if types[spec.name].made == "by row" and config.is_batched:
            why = f"is not made for every row: needs parameters.tutti.default.{spec.name} (in Python default=...)"
            raise fail(config, f"output '{spec.name}'", why)
    return types


def _made(step: Step, types: dict[str, TensorType]) -> Made:
    """For which rows a step makes its outputs, by its conditions and by what it reads."""
    required = {types[name].made for name in step.required}
    read = [types[name].made for _, name in step.inputs]
    if step.when is not None or step.unless is not None or "by row" in required:
        return "by row"
    if read and "always" not in read:  # with none of its inputs it does not run
        return "by row" if "by row" in read else "by request"
    return "by request" if step.is_optional or "by request" in required else "always"


def _default(tensors: GraphTensors, name: str, text: str) -> Any:
    """A default's text as a value of its tensor."""
    path = f"parameters.tutti.default.{name}"
    if name not in tensors.shapes:
        raise fail(tensors.config, path, f"there is no tensor of that name{near(name, tensors.shapes)}")
    try:
        return extensions.value(tensors.datatypes[name], text)
    except ExtensionError as error:
        raise fail(tensors.config, path, str(error)) from None


def _joined(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else " and ".join(f"({text})" for text in texts)


def _may_merge(model: ModelConfig, config_of: ConfigOf) -> bool:
    if not model.is_ensemble:
        return model.may_merge
    return model.is_batched and all(
        _may_merge(config_of(step.model_name, step.version), config_of) for step in model.steps
    )
