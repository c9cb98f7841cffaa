"""Reads trace files, ours and Triton's, into explanations of requests: the form that a waterfall is drawn of. Pure.

A file that ends in the middle, as of a server that was killed while it wrote, is read as far as it goes.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tutti.observing.explanations import STAGES, us

_SKIPPED = "SKIPPED "
# What a trace has for those who read the file, and what a waterfall has another way.
_NOT_NOTES = frozenset(["id", "parent_id", "model_name", "model_version", "timestamps", "activity", "tensor"])


def explained(text: str, step: str = "") -> list[dict[str, Any]]:
    """One explanation for each request that has ended, in the order of the file; behind them, if a model is named as
    `step`, one for each time that it was a step of one.

    Beside an explanation's own keys it has `request_id` and `error` where the trace has them, and of a step `within`:
    the models that have asked it, the request's first. Raises ValueError for what is no array of traces.
    """
    requests = _requests(text)
    steps = [told for request in requests for told in _named(request, step, [])] if step else []
    return [*map(_of_request, requests), *steps]


def _requests(text: str) -> list[dict[str, Any]]:
    """The traces without a parent, those of their steps in `steps`."""
    traces: dict[int, dict[str, Any]] = {}
    for entry in _entries(text):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int):
            raise ValueError("expected objects with an 'id'")
        trace = traces.setdefault(entry["id"], {"times": {}, "steps": []})
        for time in entry.get("timestamps", []):
            trace["times"][str(time["name"])] = int(time["ns"])
        if "tensor" not in entry:
            trace.update(entry)
    roots: list[dict[str, Any]] = []
    for trace in traces.values():
        if "REQUEST_END" not in trace["times"] or "REQUEST_START" not in trace["times"] or "model_name" not in trace:
            continue
        if "parent_id" not in trace:
            roots.append(trace)
        elif (above := traces.get(trace["parent_id"])) is not None:  # else the file has been cut before it
            above["steps"].append(trace)
    return roots


def _named(trace: Mapping[str, Any], step: str, within: Sequence[str]) -> list[dict[str, Any]]:
    """Explanations of the steps below a trace that are of a model, known by the ids of the request."""
    steps, path = [], [*within, trace["model_name"]]
    known_as = {key: trace[key] for key in ("request_id", "answer_id") if key in trace}
    for below in trace["steps"]:
        inner = {**below, **known_as}
        if below["model_name"] == step:
            steps.append({**_of_request(inner), "within": path})
        steps += _named(inner, step, path)
    return steps


def left_out(text: str) -> dict[str, str]:
    """Of the steps that requests went without: why, the last time."""
    names, waiting = dict[str, str](), _requests(text)
    while waiting:
        trace = waiting.pop()
        waiting += trace["steps"]
        for name in trace["times"]:
            if name.startswith(_SKIPPED):
                model, _, why = name.removeprefix(_SKIPPED).partition(": ")
                names[model] = why
    return names


def _entries(text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = _as_far_as_it_goes(text)
    if not isinstance(value, list):
        raise ValueError("expected an array")
    return value


def _as_far_as_it_goes(text: str) -> list[Any]:
    """The objects of an array that has no end. Raises ValueError where it does not begin as one."""
    decoder, values = json.JSONDecoder(), list[Any]()
    begin = text.lstrip()
    if not begin.startswith("["):
        raise ValueError("expected an array in JSON")
    position = text.index("[") + 1
    while True:
        while position < len(text) and text[position] in ", \r\n\t":
            position += 1
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError:
            return values
        values.append(value)


def _of_request(trace: Mapping[str, Any]) -> dict[str, Any]:
    times = trace["times"]
    start_ns = times["REQUEST_START"]
    total_us = us(times["REQUEST_END"] - start_ns)
    told = {"model": trace["model_name"], "version": str(trace.get("model_version", "")), "total_us": total_us}
    told |= {key: value for key, value in trace.items() if key not in (*_NOT_NOTES, "times", "steps")}
    steps = _steps(trace, start_ns)
    if steps and "COMPUTE_START" not in times:
        return {"ensemble": trace["model_name"], **told, "steps": steps}
    stages = _stages(times)
    return {**told, **stages, "other_us": round(max(0.0, total_us - sum(stages.values())), 1), "steps_asked": steps}


def _steps(trace: Mapping[str, Any], start_ns: int) -> list[dict[str, Any]]:
    """Those within a trace, and those that were left out, in their order."""
    steps = []
    for step in trace["steps"]:
        times = step["times"]
        told = {key: value for key, value in step.items() if key not in (*_NOT_NOTES, "times", "steps")}
        told |= {"start_us": us(times["REQUEST_START"] - start_ns), "end_us": us(times["REQUEST_END"] - start_ns)}
        inner = _steps(step, times["REQUEST_START"])
        steps.append({"step": step["model_name"], **told, **_stages(times), **({"steps": inner} if inner else {})})
    for name, ns in trace["times"].items():
        if name.startswith(_SKIPPED):
            model, _, why = name.removeprefix(_SKIPPED).partition(": ")
            steps.append({"step": model, "start_us": us(ns - start_ns), "skipped": why})
    return sorted(steps, key=lambda step: step["start_us"])


def _stages(times: Mapping[str, int]) -> dict[str, float]:
    return {name: us(times[last] - times[first]) for name, first, last in STAGES if first in times and last in times}


def slowest(requests: Sequence[dict[str, Any]], model: str, request_id: str, count: int) -> list[dict[str, Any]]:
    """Of requests, those to a model and with an id, the request's or its answer's: so many, the slowest first."""
    kept = [
        request
        for request in requests
        if (not model or request["model"] == model)
        and (not request_id or request_id in (request.get("request_id"), request.get("answer_id")))
    ]
    return sorted(kept, key=lambda request: -request["total_us"])[: max(1, count)]
