"""Decoupled steps in a graph: each answer goes on by itself, and meets tensors that were made of it only."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tutti.ensembles.extensions import Extensions
from tutti.ensembles.graph import ConfigOf, Step, fail
from tutti.ensembles.tensor_checks import GraphTensors
from tutti.repository.model_config import EnsembleStep

# The decoupled step of whose answers a tensor is made; None for tensors of the request.
_Sources = Mapping[str, int | None]


def with_limits(tensors: GraphTensors, steps: Sequence[Step], order: Sequence[Step], config_of: ConfigOf) -> list[Step]:
    """The steps, told how many answers of theirs may be on their way. Raises GraphError for what cannot meet.

    A decoupled step waits while too many of its answers are on their way, unless its own model is among those that
    they wait for.
    """
    config = tensors.config
    source: dict[str, int | None] = dict.fromkeys((spec.name for spec in config.inputs), None)
    after: dict[int, set[str]] = {}  # the models that a decoupled step's answers go through
    parent: dict[int, int | None] = {}
    for step in order:
        index = _one_source(tensors, tensors.path(step.index), "takes", sorted(step.read), source)
        above = index
        while above is not None:
            after[above] |= _models_of(step, config_of)
            above = parent[above]
        if step.is_decoupled:
            _check_plain(tensors, tensors.extra, step)
            parent[step.index], after[step.index] = index, set()
            index = step.index
        source.update((name, index) for _, name in step.outputs)
    _one_source(tensors, "output", "the ensemble has", [spec.name for spec in config.outputs], source)
    held = {i for i, models in after.items() if not models & _models_of(steps[i], config_of)}
    return [replace(step, max_inflight=config.max_inflight_requests) if step.index in held else step for step in steps]


def _one_source(tensors: GraphTensors, path: str, verb: str, names: Sequence[str], source: _Sources) -> int | None:
    of_sources = {source[name]: name for name in names}
    if len(of_sources) > 1:
        shown = [
            f"'{name}' of {tensors.path(index) if index is not None else 'the request'}"
            for index, name in of_sources.items()
        ]
        raise fail(tensors.config, path, f"{verb} tensors of different decoupled steps: {', '.join(shown)}")
    return next(iter(of_sources), None)


def _check_plain(tensors: GraphTensors, extra: Extensions, step: Step) -> None:
    for kind, named in (("when", extra.when), ("default", extra.default), ("each", extra.each)):
        if any(name in named for _, name in step.outputs):
            raise fail(tensors.config, f"{tensors.path(step.index)} tutti.{kind}", "the step is decoupled")
    if step.is_optional or extra.exit:
        kind = "tutti.optional" if step.is_optional else "tutti.exit"
        raise fail(tensors.config, f"{tensors.path(step.index)} {kind}", "the step is decoupled")


def _models_of(step: Step | EnsembleStep, config_of: ConfigOf) -> set[str]:
    """The names of a step's model and of those that it is made of."""
    names = {step.model_name}
    for inner in config_of(step.model_name, step.version).steps:
        names |= _models_of(inner, config_of)
    return names
