"""A graph for people, as a table. Pure."""

from tutti.ensembles.graph import Plan, Step


def waves(plan: Plan) -> list[list[Step]]:
    """The steps in waves: a step's wave is the length of the longest chain of steps before it."""
    depth: dict[int, int] = {}
    left = list(plan.steps)
    while left:
        for step in [step for step in left if step.needs <= depth.keys()]:
            depth[step.index] = max((depth[index] + 1 for index in step.needs), default=0)
            left.remove(step)
    return [[step for step in plan.steps if depth[step.index] == wave] for wave in range(max(depth.values()) + 1)]


def table(plan: Plan) -> str:
    """Inputs, the steps in waves, outputs."""
    lines = [f"ensemble {plan.name}: {len(plan.steps)} steps in {len(waves(plan))} waves"]
    if plan.deadline_ns:
        lines.append(f"  deadline  {plan.deadline_ns // 1_000_000} ms")
    for name, tensor in plan.tensors.items():
        if name not in plan.producer:
            optional = ", optional" if tensor.made != "always" or tensor.default is not None else ""
            lines.append(f"  input     {_typed(plan, name)}{optional}")
    for number, wave in enumerate(waves(plan)):
        lines.append(f"  wave {number}")
        for step in wave:
            lines.append(
                f"    {step.model_name}: {', '.join(read_by(step)) or 'nothing'} -> {', '.join(made_by(step))}"
            )
            lines += [f"      {note}" for note in notes(plan, step)]
    for name in plan.outputs:
        default = plan.tensors[name].default
        is_sure = plan.tensors[name].made == "always"
        shown = f", {value_of(default)} where not made" if default is not None else "" if is_sure else ", where made"
        lines.append(f"  output    {_typed(plan, name)}{shown}")
    return "\n".join(lines)


def notes(plan: Plan, step: Step) -> list[str]:
    """What a step does besides running for every row."""
    notes = []
    if step.when is not None:
        notes.append(f"when {step.when.text}")
    if step.unless is not None:
        notes.append(f"unless decided: {step.unless.text}")
    if step.each is not None:
        count = f" ({step.each.count} a row)" if step.each.count else ""
        gathers = zip(step.outputs, step.gathers, strict=True)
        hows = ", ".join(f"{how} of {name}" for name, how in sorted((name, how) for (_, name), how in gathers))
        notes.append(f"for each of {', '.join(step.each.items)}{count}: {hows}")
    if step.is_decoupled:
        notes.append("each of its answers goes on by itself")
    if step.is_optional:
        notes.append("left out where time is short")
    for name in made_by(step):
        if plan.tensors[name].default is not None:
            notes.append(f"{name} else {value_of(plan.tensors[name].default)}")
    return notes


def made_by(step: Step) -> list[str]:
    """The ensemble tensors that a step makes, by name: maps of a configuration have no order."""
    return sorted(name for _, name in step.outputs)


def read_by(step: Step) -> list[str]:
    """The ensemble tensors that a step looks at, by name; last those that only its conditions do."""
    return list(dict.fromkeys([*sorted(name for _, name in step.inputs), *step.read]))


def type_of(plan: Plan, name: str) -> str:
    """As FP32[-1, 2]."""
    tensor = plan.tensors[name]
    return f"{tensor.datatype}{list(tensor.dims)}"


def _typed(plan: Plan, name: str) -> str:
    return f"{name} {type_of(plan, name)}"


def value_of(value: object) -> str:
    """A default, for people."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
