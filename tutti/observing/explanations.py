"""Where the time of one request went, for the request that asks: with the parameter `tutti_explain`.

Its answer has a parameter of that name, in JSON; its error says it in brackets. Whatever the call meets on its way
tells it through the call's trace. Knows nothing of ensembles: what executes one notes its steps.
"""

import difflib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import orjson

from tutti.core.errors import InferError, InvalidArgument, NotFound
from tutti.core.types import FALLBACK_PARAMETER, Call, InferResponse, Shape, Trace, now_ns

_log = logging.getLogger(__name__)

PARAMETER = "tutti_explain"
# Of an explanation, that of the replica it was executed by.
AT_REPLICA = "at_replica"
# Of requests, and of answers: names that begin so are ours.
OWN = "tutti_"
_OF_RAY = {
    FALLBACK_PARAMETER: "is for pools of replicas, and would be ignored here: models have them that are served on Ray "
    "(tutti serve --ray), answer once, and have no sequences"
}
_OF_ANSWERS = ("tutti_pool", "tutti_shed")
STAGES = (
    ("queue_us", "QUEUE_START", "COMPUTE_START"),
    ("input_us", "COMPUTE_START", "COMPUTE_INPUT_END"),
    ("compute_us", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START"),
    ("output_us", "COMPUTE_OUTPUT_START", "COMPUTE_END"),
)


def is_asked(model: str, parameters: Mapping[str, Any], takes: Collection[str]) -> bool:
    """Whether a request wants to be explained. `takes` are those of our other parameters that this server heeds.

    Raises InvalidArgument for a parameter of ours that would be ignored, or that does not fit.
    """
    asked = False
    for name, value in parameters.items():
        if not name.startswith(OWN):
            continue
        if name != PARAMETER and name not in takes:
            raise InvalidArgument(f"model '{model}': request parameter '{name[:100]}': {_why_not(name, takes)}")
        flag = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value  # as headers say
        if not isinstance(flag, bool):
            expected = f"expected true or false, got {str(value)[:40]!r}"
            raise InvalidArgument(f"model '{model}': request parameter '{name}': {expected}")
        asked = asked or (name == PARAMETER and flag)
    return asked


def _why_not(name: str, takes: Collection[str]) -> str:
    if name in _OF_RAY:
        return _OF_RAY[name]
    if name in _OF_ANSWERS:
        return "answers have it, requests cannot set it"
    known = sorted({PARAMETER, *takes})
    near = difflib.get_close_matches(name, known, 1)
    return f"is not known; {f'did you mean {near[0]}?' if near else 'there is ' + ' and '.join(known)}"


def told_in(answer: InferResponse) -> dict[str, Any] | None:
    """What an answer tells of how it came about; None where it does not: a model may set that parameter to anything."""
    told = answer.parameters.get(PARAMETER)
    try:
        explanation = orjson.loads(told) if isinstance(told, str) else None
    except ValueError:
        return None
    return explanation if isinstance(explanation, dict) else None


def untold(error: InferError) -> InferError:
    """An error as it is for who has not asked: without the explanation in brackets that a replica has put behind it."""
    text = str(error.args[0]) if error.args else ""
    head, mark, _ = text.rpartition(f" [{PARAMETER}: ")
    return type(error)(head) if mark and text.endswith("]") else error


class Facts:
    """What one call met on its way: the times of its stages, and what was noted. A call's trace."""

    __slots__ = ("also", "marks", "notes")

    def __init__(self, also: Trace | None = None) -> None:
        """`also` is told the same."""
        self.also = also
        self.marks: dict[str, int] = {}
        self.notes: dict[str, Any] = {}

    def record(self, activity: str, ns: int) -> None:
        self.marks[activity] = ns
        if self.also is not None:
            self.also.record(activity, ns)

    def note(self, what: str, value: object) -> None:
        self.notes[what] = value
        if self.also is not None:
            self.also.note(what, value)

    def follow(self, call: Call) -> None:
        if self.also is not None:
            self.also.follow(call)

    def stages(self) -> dict[str, float]:
        """How long each stage took that it has been through, in microseconds."""
        marks = self.marks
        return {
            name: us(marks[last] - marks[first]) for name, first, last in STAGES if first in marks and last in marks
        }


class Explained(Facts):
    """A call that is explained. As a sink, it is put before the call's own, to write the explanation."""

    __slots__ = ("_call", "_emit", "_emitted", "_is_ensemble", "_shapes", "_sink", "start_ns")

    def __init__(self, call: Call, version: int, is_ensemble: bool) -> None:
        super().__init__(call.trace)
        self._call = call
        self._sink = call.sink
        self._emit = call.emit
        self._emitted = 0
        self._is_ensemble = is_ensemble
        self.start_ns = now_ns()
        self._shapes = {name: tensor.shape for name, tensor in call.request.inputs.items()}
        self.notes["version"] = str(version)
        call.trace = call.sink = self
        if call.emit is not None:
            call.emit = self._one_of_several

    def settle(self, calls: Sequence[Call]) -> None:
        """The call has its answer."""
        for call in calls:
            call.sink, call.trace, call.emit = self._sink, self.also, self._emit
            with self._best_effort():
                if isinstance(call.answer, InferResponse):
                    self._write(call.answer)
                elif call.answer is not None:
                    call.answer = self._told(call.answer)
        self._sink.settle(calls)

    def _one_of_several(self, response: InferResponse) -> None:
        assert self._emit is not None
        self._emitted += 1
        self.notes["answer"] = self._emitted
        with self._best_effort():
            self._write(response)
        self._emit(response)

    @contextmanager
    def _best_effort(self) -> Iterator[None]:
        """Whoever waits has the answer without an explanation rather than none."""
        try:
            yield
        except Exception:
            _log.exception("an answer of model '%s' could not be explained", self._call.request.model_name)

    def _write(self, response: InferResponse) -> None:
        behind = told_in(response)
        if behind is not None:  # of a replica, or of what runs a graph there
            self.note(AT_REPLICA, behind)
        response.parameters = {**response.parameters, PARAMETER: orjson.dumps(self.found()).decode()}

    def found(self) -> dict[str, Any]:
        """The explanation; times are microseconds since the request reached its model."""
        call, stages, notes = self._call, self.stages(), dict(self.notes)
        # The queue may have begun before this did.
        total_us = max(us(now_ns() - self.start_ns), round(sum(stages.values()), 1))
        head: dict[str, Any] = {"model": call.request.model_name, "version": notes.pop("version")}
        if self._is_ensemble:
            head = {"ensemble": call.request.model_name, **head}
        padded = _padded(call.key, self._shapes)
        rest = {} if self._is_ensemble else {"other_us": round(max(0.0, total_us - sum(stages.values())), 1)}
        return {
            **head,
            "rows": notes.pop("rows", call.rows),
            "total_us": total_us,
            **stages,
            **rest,
            **({"padded": padded} if padded else {}),
            **notes,
        }

    def _told(self, error: InferError) -> InferError:
        if isinstance(error, InvalidArgument | NotFound):  # it says all there is
            return error
        return type(error)(f"{error.args[0] if error.args else error} [{PARAMETER}: {in_words(self.found())}]")


def _padded(key: object, shapes: Mapping[str, Shape]) -> dict[str, list[list[int]]]:
    """Of each input that grew: its shape as it came, and that of its batch, both without the rows where it has any."""
    padded = {}
    for entry in key if isinstance(key, tuple) else ():
        name, body = entry if isinstance(entry, tuple) and len(entry) == 2 else ("", None)
        shape = shapes.get(name) if isinstance(name, str) else None
        if shape is None or not isinstance(body, tuple) or not body:
            continue
        tail = shape[-len(body) :]
        if tail != body:
            padded[name] = [list(tail), list(body)]
    return padded


def in_words(explanation: Mapping[str, Any]) -> str:
    """An explanation of one model, or of a step, in a line."""
    stages = [
        f"{explanation[key]:,.0f} us {words}"
        for key, words in (
            ("queue_us", "in the queue"),
            ("input_us", "for inputs"),
            ("compute_us", "executing"),
            ("output_us", "for outputs"),
            ("other_us", "beside"),
        )
        if explanation.get(key) and (key != "other_us" or "queue_us" in explanation)
    ]
    facts = [say(explanation) for is_known, say in _SAYINGS if is_known(explanation)]
    steps = [_step(step) for step in explanation.get("steps", []) if "skipped" not in step]
    spent = ", ".join(steps or stages) or "not executed"
    return "; ".join([f"{explanation['total_us']:,.0f} us: {spent}", *facts])


def _step(step: Mapping[str, Any]) -> str:
    took = f"{step['end_us'] - step['start_us']:,.0f} us" if "end_us" in step else "not ended"
    queued = f", {step['queue_us']:,.0f} us of it in the queue" if step.get("queue_us") else ""
    waited = f", {count(step['waiting_requests'], 'request')} before it" if step.get("waiting_requests") else ""
    return f"step {step['step']} {took}{queued}{waited}"


_SAYINGS: tuple[tuple[Callable[[Mapping[str, Any]], object], Callable[[Mapping[str, Any]], str]], ...] = (
    (lambda f: "batch_rows" in f, lambda f: f"in a batch of {count(f['batch_rows'], 'row')}{_requests(f)}"),
    (lambda f: "instance" in f, lambda f: f"by {f['instance']}" + (f" on {f['device']}" if "device" in f else "")),
    (lambda f: "pool" in f, lambda f: f"in pool {f['pool']}"),
    (lambda f: "replica" in f, lambda f: f"by replica {f['replica']}"),
    (lambda f: "cache" in f, lambda f: f"response cache: {f['cache']}"),
    (lambda f: f.get("waiting_requests"), lambda f: f"{count(f['waiting_requests'], 'request')} waited before it"),
    (lambda f: f.get("busy_instances"), lambda f: f"{f['busy_instances']} of {f['instances']} instances were busy"),
    (lambda f: "padded" in f, lambda f: "padded: " + ", ".join(_grown(*pair) for pair in f["padded"].items())),
)


def _requests(facts: Mapping[str, Any]) -> str:
    return f" of {facts['batch_requests']} requests" if facts.get("batch_requests", 1) > 1 else ""


def _grown(name: str, shapes: Sequence[Any]) -> str:
    asked, body = shapes
    return f"{name} from {asked} to {body}"


def count(number: int, noun: str) -> str:
    """As "1 row", "2 rows"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def us(ns: int) -> float:
    return round(ns / 1000, 1)
