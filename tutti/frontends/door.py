"""One door for every protocol: what is done for each call, whoever decodes its request and encodes its answer.

A front end owns its wire: sockets, frames, the form of requests and answers. All else is here, and only here: who may
pass, the model that a request names, its deadline, the headers that its model is to see, its trace, handing calls to
the engine, and what a client is told of a failure. Priorities need nothing: they are parameters, which queues read.
Nor does cancelling: whoever loses a client sets its calls' `is_cancelled`.

Knows no protocol: a Dialect says how one tells its failures and where its headers are.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tutti.core.errors import InferError, Internal, NotFound
from tutti.core.types import Call, InferRequest, InferResponse, now_ns, settle_all
from tutti.frontends.arrival import Arrival
from tutti.frontends.gate import Category, Gate
from tutti.observing.tracing import Tracer
from tutti.serving.engine import Engine
from tutti.serving.model import Model

_log = logging.getLogger(__name__)

Failure = tuple[int, str]
"""The status code and the message that a client is told."""


class Elsewhere(Exception):
    """Only the engine's process can do it, and this is another one."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may call over one protocol, and which of its headers reach the model as parameters."""

    gate: Gate = field(default_factory=Gate)
    forward: re.Pattern[str] | None = None

    @property
    def needs_headers(self) -> bool:
        return self.forward is not None or not self.gate.is_open

    def forward_headers(self, headers: Iterable[tuple[str, str]], request: InferRequest) -> None:
        """Give the request the matching headers as parameters; its own ones are not replaced."""
        if self.forward is None:
            return
        for name, value in headers:
            if self.forward.fullmatch(name):
                request.parameters.setdefault(name, value)


def _as_they_are(headers: Any) -> Mapping[str, str]:
    return headers if headers is not None else {}


def _message(error: InferError) -> str:
    return error.message


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one protocol says what all of them have.

    `name` is what traces call it. `codes` are its status codes for errors, an error's subclasses having the nearest,
    and `internal` the code of all others. `refusals` are what the gate's are told as. `read_headers` makes a mapping of
    lower-case names from whatever the front end hands over as a call's headers; without it they are one, or None.
    `message` is what is told of an error.
    """

    name: str
    codes: Mapping[type[InferError], int]
    internal: int
    refusals: Mapping[str, Failure]
    read_headers: Callable[[Any], Mapping[str, str]] = _as_they_are
    message: Callable[[InferError], str] = _message

    def code_of(self, error: InferError) -> int:
        return next((self.codes[kind] for kind in type(error).__mro__ if kind in self.codes), self.internal)

    def refusal(self, gate: Gate, category: Category | None, headers: Any) -> Failure | None:
        """Why a call must not pass a gate; None if it may."""
        refusal = gate.check(category, self.read_headers(headers))
        return self.refusals[refusal] if refusal else None

    def failure(self, error: Exception, event: str, *names: object) -> Failure:
        """What a client is told of an error; `event` % `names` is logged of a fault."""
        answer = answer_of(error, event, *names)
        return self.code_of(answer), self.message(answer)


def answer_of(error: Exception, event: str, *names: object) -> InferError:
    """An error as the answer to a call. All but an InferError is a fault of tutti's.

    A fault is logged, `event` % `names`, and the client told no more than its kind: its text may be anything.
    """
    if isinstance(error, InferError):
        error.__traceback__ = None  # it leads to the call, which has the error: a cycle that keeps the tensors
        return error
    _log.error(event, *names, exc_info=error)
    return _internal(error)


def _internal(error: Exception) -> Internal:
    return Internal(f"internal error: {type(error).__name__}")


class Door:
    """The way in for the calls of one front end. From any thread."""

    def __init__(
        self, dialect: Dialect, engine: Engine, access: Access | None = None, tracer: Tracer | None = None
    ) -> None:
        """Without an Access everybody may pass and no header reaches a model; without a Tracer nothing is traced."""
        self.dialect = dialect
        self.engine = engine
        self.access = access or Access()
        self.tracer = tracer or Tracer()
        self._forwards = self.access.forward is not None

    def refusal(self, category: Category | None, headers: Any) -> Failure | None:
        """Why a call must not pass; None if it may. Who asks `access.gate.is_open` first need not ask this."""
        return self.dialect.refusal(self.access.gate, category, headers)

    def model(self, name: str, version: str = "") -> Model:
        """The model that answers, for a front end whose requests cannot be read without its configuration.

        Raises NotFound or Unavailable; Elsewhere in a front-end process, which has no models.
        """
        return self.engine.model(name, version)

    def begin(self, call: Call, headers: Any = None, left_ns: int = 0, received_ns: int = 0) -> None:
        """Take a call whose request has been decoded, before `submit`.

        Its client waits for `left_ns` from now, 0 for as long as it takes. `headers` are in the protocol's own form,
        and read only where a model or a trace wants to see them. Decoding began at `received_ns`, 0 where nobody knows.
        """
        if left_ns:
            call.deadline_ns = now_ns() + left_ns
        if not self._forwards and not self.tracer.is_on:  # the usual case
            return
        texts = self.dialect.read_headers(headers)
        self.access.forward_headers(texts.items(), call.request)
        if self.tracer.is_on:
            self.tracer.begin(call, texts.get("traceparent", ""), self.dialect.name, received_ns)

    def arrival(self, headers: Any) -> Arrival:
        """How a request has come that another process will `resume`."""
        return Arrival.now(self.dialect.read_headers(headers).get("traceparent", ""), self.dialect.name)

    def resume(self, call: Call, arrival: Arrival, left_ns: int = 0) -> None:
        """As `begin`, for a call that has come through a door in a front-end process: its model's headers are in it."""
        if left_ns:
            call.deadline_ns = now_ns() + left_ns
        if self.tracer.is_on:
            self.tracer.begin(call, arrival.context, arrival.protocol, arrival.received_ns, arrival.started_ns)
            if call.trace is not None:
                for label, value in arrival.notes.items():
                    call.trace.note(label, value)

    def submit(self, calls: Sequence[Call]) -> None:
        """Hand over the calls of one burst. An Infer never raises; should it do so, its callers get an answer."""
        try:
            self.engine(calls)
        except Exception as error:
            _log.exception("a burst of %d calls was not taken", len(calls))
            settle_all([call for call in calls if call.answer is None], _internal(error))

    def response(self, call: Call) -> InferResponse:
        """The response of a settled call. Raises its error."""
        return response_of(call, self.tracer)

    def decode_failure(self, error: Exception, name: str = "", version: str = "") -> Failure:
        """What the client of a request that could not be decoded is told; of which model, as far as that is known.

        That there is no such model comes first, as in Triton.
        """
        if isinstance(error, InferError) and name:
            try:
                self.engine.model(name, version)
            except NotFound as unknown:
                error = unknown
            except (InferError, Elsewhere):
                pass
        return self.dialect.failure(error, "an infer request could not be decoded")

    def encode_failure(self, error: Exception, call: Call) -> Failure:
        """What the client of a settled call is told that has failed, or whose response could not be encoded."""
        return self.dialect.failure(error, "a response of model '%s' could not be encoded", call.request.model_name)


def response_of(call: Call, tracer: Tracer) -> InferResponse:
    """The response of a settled call, whose trace ends with it. Raises its error."""
    if call.trace is not None:
        tracer.end(call)
    if isinstance(call.answer, InferError):
        raise call.answer
    assert call.answer is not None, "the call is not settled"
    return call.answer
