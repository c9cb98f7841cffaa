"""Cuts a graph whose models live in different places into segments that each run in one of them whole. Pure.

Steps that lie together and run for the same rows become one step, a segment, which is a graph of its own: it is queued,
batched and sent as a model is. Everything that decides about rows (conditions, defaults, items, what may be shed) stays
in the graph that is left.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace

from tutti.ensembles.conditions import Condition, ConditionError
from tutti.ensembles.graph import Plan, Step


@dataclass(frozen=True)
class Cut:
    """What is left of a graph, and its segments by the names of the steps that stand for them."""

    plan: Plan
    segments: Mapping[str, Plan]
    places: Mapping[str, Hashable]


def cut(plan: Plan, place_of: Callable[[Step], Hashable]) -> Cut:
    """`place_of` says where a step's model lives; None for one that takes part in no segment.

    What no output needs is left out.
    """
    plan = plan.part(plan.steps_for(()), plan.outputs)
    rows_of = {step.index: _rows_of(plan, step) for step in plan.steps}
    keys: dict[int, Hashable] = {}
    for step in plan.steps:
        place = place_of(step)
        keys[step.index] = step.index if place is None or not _may_join(plan, step) else (place, rows_of[step.index])
    steps: list[Step] = []
    segments: dict[str, Plan] = {}
    places: dict[str, Hashable] = {}
    for indices in _groups(plan, keys):
        members = [plan.steps[index] for index in indices]
        joined = _joined(plan, members) if len(members) > 1 else None
        if joined is None:
            steps += members
            continue
        step, segment = joined
        steps.append(step)
        segments[step.model_name] = segment
        places[step.model_name] = place_of(members[0])
    return Cut(_renumbered(plan, steps), segments, places)


def _may_join(plan: Plan, step: Step) -> bool:
    is_whole = step.max_rows > 0 if plan.is_batched else True
    return is_whole and step.each is None and not step.is_optional and not step.is_decoupled


def _rows_of(plan: Plan, step: Step) -> frozenset[Hashable]:
    """What decides for which rows a step runs. Two steps for which it is equal run for the same rows."""
    conditions: set[Hashable] = set()
    if step.when is not None:
        conditions.add(("when", step.when.text))
    if step.unless is not None:
        conditions.add("exit")
    for name in step.required:
        if plan.tensors[name].made == "always":
            continue
        if name not in plan.producer:
            conditions.add(("given", name))
            continue
        before = plan.steps[plan.producer[name]]
        conditions |= _rows_of(plan, before)
        if before.is_optional or before.each is not None:
            conditions.add(("made", name))
    names = [name for _, name in step.inputs]
    if names and all(plan.tensors[name].made != "always" and name not in step.required for name in names):
        conditions.add(("some of", *sorted(names)))  # with none of its inputs it does not run
    return frozenset(conditions)


def _groups(plan: Plan, keys: Mapping[int, Hashable]) -> list[list[int]]:
    """Connected steps of equal keys. No path between two of a group leaves the group: it must run as one."""
    depth: dict[int, int] = {}

    def depth_of(index: int) -> int:
        if index not in depth:
            before = plan.steps[index].needs
            depth[index] = max((depth_of(need) + (keys[need] != keys[index]) for need in before), default=0)
        return depth[index]

    root = {step.index: step.index for step in plan.steps}

    def find(index: int) -> int:
        while root[index] != index:
            index = root[index]
        return index

    for step in plan.steps:
        for before in step.needs:
            if keys[before] == keys[step.index] and depth_of(before) == depth_of(step.index):
                first, second = sorted((find(before), find(step.index)))
                root[second] = first
    groups: dict[int, list[int]] = {}
    for step in plan.steps:
        groups.setdefault(find(step.index), []).append(step.index)
    return list(groups.values())


def _joined(plan: Plan, members: list[Step]) -> tuple[Step, Plan] | None:
    """The step that stands for several, and the graph of these; None where they cannot be joined."""
    indices = {step.index for step in members}
    inside = {name for step in members for _, name in step.outputs}
    inputs = _unique(name for step in members for _, name in step.inputs if name not in inside)
    if not inputs:  # nothing would tell how many rows there are
        return None
    outputs = [
        name
        for step in members
        for _, name in step.outputs
        if name in plan.outputs or any(reader not in indices for reader in plan.readers.get(name, ()))
    ]
    when: Condition | None = None
    for condition in {step.when.text: step.when for step in members if step.when is not None}.values():
        try:
            when = condition if when is None else when.and_also(condition)
        except ConditionError:
            return None
    plain = replace(plan, steps=tuple(replace(step, when=None, unless=None) for step in plan.steps), deadline_ns=0)
    part = plain.part(indices, outputs)
    required = _unique(name for step in members for name in step.required if name not in inside)
    step = Step(
        0, f"{plan.name}/{'+'.join(member.model_name for member in members)}/{_digest(part)}", "",
        tuple((name, name) for name in inputs), tuple((name, name) for name in outputs), frozenset(), required,
        max(member.max_rows for member in members), all(member.is_merged for member in members), when,
        members[0].unless,
        is_segment=True,
        dispensable=frozenset(
            name for member in members for model_name, name in member.outputs if model_name in member.dispensable
        ),
    )  # fmt: skip
    return step, part


def _renumbered(plan: Plan, steps: list[Step]) -> Plan:
    producer = {name: index for index, step in enumerate(steps) for _, name in step.outputs}
    numbered = [
        replace(step, index=index, needs=frozenset(producer[name] for name in step.read if name in producer))
        for index, step in enumerate(steps)
    ]
    names = {name for step in numbered for name in (*step.read, *(output for _, output in step.outputs))}
    tensors = {name: tensor for name, tensor in plan.tensors.items() if name in names or name not in plan.producer}
    return replace(plan, steps=tuple(numbered), producer=producer, tensors=tensors).part(
        range(len(numbered)), plan.outputs
    )


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _digest(plan: Plan) -> str:
    """A hash of a graph: two graphs have the same one only if they are equal."""
    told = [
        (
            step.model_name,
            step.version,
            step.inputs,
            step.outputs,
            step.required,
            step.max_rows,
            step.is_merged,
            step.axes_in,
            step.axes_out,
        )
        for step in plan.steps
    ]
    tensors = sorted((name, str(tensor)) for name, tensor in plan.tensors.items())
    return hashlib.sha256(repr((told, plan.outputs, tensors)).encode()).hexdigest()[:12]
