"""An explanation of a request as text: of an ensemble a bar for each step, of a model its stages. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from tutti.observing.explanations import AT_REPLICA, count, in_words

_STAGES = (
    ("queue", "queue_us"), ("inputs", "input_us"), ("compute", "compute_us"), ("outputs", "output_us"),
    ("beside", "other_us"),
)  # fmt: skip
_NAME = 24


def waterfall(explained: Mapping[str, Any], width: int = 40) -> str:
    """The parameter's JSON, read, as a table."""
    total = max(explained["total_us"], 0.1)
    title = explained.get("ensemble") or f"{explained['model']} version {explained['version']}"
    rows = f"{count(explained['rows'], 'row')} " if "rows" in explained else ""
    known_as = explained.get("request_id") or explained.get("answer_id")
    request = f"request '{known_as}' " if known_as else ""
    within = f"as a step of {' / '.join(explained['within'])}, " if "within" in explained else ""
    head = f"{title}: {request}{within}{rows}in {total:,.0f} us"
    lines = _table(explained["steps"], total, width) if "steps" in explained else _stages(explained, total, width)
    if explained.get("steps_asked"):  # by a model of its own accord
        lines += _table(explained["steps_asked"], total, width)
    if "error" in explained:
        lines.append(f"failed: {explained['error']}")
    if AT_REPLICA in explained:
        lines.append(f"of that at replica {explained.get('replica', '')}:")
        lines += ["  " + line for line in waterfall(explained[AT_REPLICA], width).split("\n")]
    return "\n".join([head, *lines])


def _table(steps: Any, total: float, width: int) -> list[str]:
    head = f"{'step':<{_NAME}} {'rows':>9} {'queue':>9} {'compute':>9} {'total us':>9} {'batch':>6}"
    return [head, *_steps(steps, total, width, 0.0, "")]


def _stages(explained: Mapping[str, Any], total: float, width: int) -> list[str]:
    lines, begin = [], 0.0
    for name, key in _STAGES:
        if key in explained:
            lines.append(f"{name:<{_NAME}} {explained[key]:>9,.0f} |{_bar(begin, explained[key], total, width)}|")
            begin += explained[key]
    facts = in_words(explained).split("; ")[1:]
    return [*lines, "; ".join(facts)] if facts else lines


def _steps(steps: Any, total: float, width: int, start: float, indent: str) -> Iterator[str]:
    for step in steps:
        name = indent + step["step"]
        rows = f"{step['rows']}/{step['of_rows']}" if "of_rows" in step else ""
        rows += f" x{step['items']}" if "items" in step else ""
        if "skipped" in step:
            yield f"{name:<{_NAME}} {rows:>9}  left out: {step['skipped']}"
            continue
        begin = start + step["start_us"]
        took = step.get("end_us", total) - step["start_us"]
        shed = f" shed {step['shed_requests']}" if "shed_requests" in step else ""
        yield (
            f"{name:<{_NAME}} {rows:>9} {step.get('queue_us', 0):>9,.0f} {step.get('compute_us', 0):>9,.0f} "
            f"{took:>9,.0f} {step.get('batch_rows', 0):>6} |{_bar(begin, took, total, width)}|{shed}{_where(step)}"
        )
        inner = step.get("steps") or step.get(AT_REPLICA, {}).get("steps", [])
        yield from _steps(inner, total, width, begin, indent + "  ")


def _where(step: Mapping[str, Any]) -> str:
    device = step.get("device", "cpu")
    where = step.get("replica") or step.get("instance", "")
    told = [f"{where} on {device}" if where and device != "cpu" else where]
    told += [f"cache {step['cache']}"] if "cache" in step else []
    told += [f"failed: {step['error'][:80]}"] if "error" in step else []
    told += [f"{step['waiting_requests']} waited before it"] if step.get("waiting_requests") else []
    return "".join(f" {part}" for part in told if part)


def _bar(begin: float, took: float, total: float, width: int) -> str:
    first = min(width - 1, int(begin / total * width))
    length = max(1, round(took / total * width))
    return f"{' ' * first + '█' * min(length, width - first):<{width}}"
