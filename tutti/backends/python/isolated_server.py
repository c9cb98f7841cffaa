"""The server as a model's process sees it, over the second channel: all that a model asks of it, and tells it."""

import contextlib
import itertools
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from tutti.backends.python import isolated_wire as wire
from tutti.backends.python.pb_utils.errors import told
from tutti.backends.python.pb_utils.server import serve_with
from tutti.core.errors import InferError, Internal
from tutti.core.types import Answer, Call, Emit, InferRequest, InferResponse, now_ns
from tutti.observing import custom_metrics

_log = logging.getLogger(__name__)


class ServerLink:
    """The server as this process sees it: the second channel."""

    def __init__(self, channel: Connection) -> None:
        self._channel = channel
        self._sending = threading.Lock()
        self._has_left = False
        self._has_metrics = False
        self._log_level = logging.NOTSET
        self._numbers = itertools.count(1)
        self._questions: dict[int, Future[Any]] = {}
        self._asked: dict[int, Call] = {}
        self._open: dict[int, ServedCall] = {}

    def begin(self, log_level: int) -> None:
        """Answer for the server within this process, from now on."""
        serve_with(self._infer, self._cancel, _Control(self))
        custom_metrics.keep_in(self._family)
        logging.basicConfig(handlers=[_LogsToServer(self)], level=log_level, force=True)
        self._log_level = log_level
        threading.Thread(target=self._listen, name="server", daemon=True).start()

    def follow(self, log_level: int) -> None:
        """Log from the server's level on. A level that the model has set stays until the server's changes."""
        if log_level != self._log_level:
            self._log_level = log_level
            logging.getLogger().setLevel(log_level)

    def leave(self) -> None:
        """Say nothing any more: this is another process."""
        self._has_left = True
        self._sending = threading.Lock()

    def received(self, head: wire.CallHead, request: InferRequest) -> Call:
        number, left_ns, context, rows = head[0], head[5], head[6], head[7]
        call = ServedCall(request, number, self)
        call.deadline_ns = now_ns() + left_ns if left_ns else 0
        call.rows = rows
        if context is not None:
            call.trace = _Traced(number, context)
        return call

    def tell(self, *message: Any) -> None:
        """Raises OSError in a process that the model has forked; ends this one when the server cannot be told."""
        if self._has_left:
            raise OSError("a process that a model has forked does not speak for it")
        data = pickle.dumps(message, protocol=5)
        with self._sending:
            try:
                self._channel.send_bytes(data)
            except OSError as error:  # the model has closed the channel: callers would wait for ever
                print(f"this process cannot answer any more: {error}", file=sys.stderr, flush=True)
                os._exit(1)

    def ask(self, *question: Any) -> Any:
        """Wait for the answer. Raises ValueError with what the server says against it."""
        number = next(self._numbers)
        answer = self._questions[number] = Future()
        self.tell("ask", number, *question)
        value, failure = answer.result()
        if failure:
            raise ValueError(failure)
        return value

    def tell_metric(self, *change: Any) -> None:
        self._has_metrics = True
        self.tell("metric", *change)

    def settle_metrics(self) -> None:
        """Wait until the server has every change of a metric: who gets the next answer finds them on the page.

        Answers go on another channel, and could come first.
        """
        if self._has_metrics:
            self._has_metrics = False
            self.ask("metrics")

    def tell_answer(self, call: "ServedCall", answer: Answer, is_final: bool) -> None:
        with contextlib.suppress(OSError):
            self.tell("answer", call.number, is_final, wire.pack_answers([sendable(call.request.model_name, answer)]))

    def know(self, call: "ServedCall") -> None:
        """The server may have something to say of the call."""
        self._open[call.number] = call

    def forget(self, call: "ServedCall") -> None:
        self._open.pop(call.number, None)

    def _infer(self, calls: Sequence[Call]) -> None:
        """Requests to other models."""
        for call in calls:
            number = next(self._numbers)
            self._asked[number] = call
            call.token = number
            packing = wire.Packing()
            r = call.request
            heads = packing.add(r.inputs.values())
            request = r.model_name, r.model_version, r.id, r.outputs, r.parameters, heads, packing.payload()
            self.tell("infer", number, call.emit is not None, request, getattr(call.trace, "number", 0))

    def _cancel(self, call: Call) -> None:
        self.tell("cancel", call.token)

    def _family(self, name: str, description: str, kind: int) -> "_Family":
        self.ask("family", name, description, kind)
        return _Family(name, description, kind, self)

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                data = self._channel.recv_bytes()
                try:
                    self._follow(*pickle.loads(data))
                except Exception:  # others wait for what comes after it
                    _log.exception("what the server says cannot be followed")

    def _follow(self, kind: str, number: int, *rest: Any) -> None:
        if kind == "reply":
            self._questions.pop(number).set_result(rest)
        elif kind == "refused":
            self._refused(number, *rest)
        else:
            self._answered(number, *rest)

    def _refused(self, number: int, error: InferError) -> None:
        call = self._open.get(number)
        if call is not None:
            call.refusal = error

    def _answered(self, number: int, is_final: bool, answers: wire.Answers) -> None:
        """Another model has answered."""
        (answer,) = wire.unpack_answers(answers)
        assert answer is not None
        call = self._asked.pop(number, None) if is_final else self._asked.get(number)
        if call is None:  # it has had its last answer
            return
        if is_final:
            call.finish(answer)
        elif call.emit is not None and isinstance(answer, InferResponse):
            call.emit(answer)


def sendable(model: str, answer: Answer | None) -> Answer | None:
    try:
        wire.pack_answers([answer])
    except Exception as error:
        return Internal(f"model '{model}': an answer cannot be sent: {told(error)}")
    return answer


class _Traced:
    """The trace of a call, which the server has; it is told which requests are made in the call's name."""

    __slots__ = ("context", "number")

    def __init__(self, number: int, context: str) -> None:
        self.number = number
        self.context = context

    def record(self, activity: str, ns: int) -> None:
        """The server knows when."""

    def note(self, what: str, value: object) -> None:
        """The server knows."""

    def follow(self, call: Call) -> None:
        call.trace = self


class _Control:
    """Control of models, which the server has. Raises ValueError with what it says against it."""

    def __init__(self, server: ServerLink) -> None:
        self._server = server

    def load(self, name: str, config: str | None, files: Mapping[str, bytes]) -> None:
        self._server.ask("control", "load", name, config, files)

    def unload(self, name: str, with_dependents: bool) -> None:
        self._server.ask("control", "unload", name, with_dependents)

    def is_ready(self, name: str, version: str) -> bool:
        return bool(self._server.ask("control", "is_ready", name, version))


class _Settled:
    """The sink of calls that response senders answer."""

    def settle(self, calls: Sequence[Call]) -> None:
        for call in calls:
            assert isinstance(call, ServedCall) and call.answer is not None
            call.server.forget(call)
            call.server.tell_answer(call, call.answer, True)


_SETTLED = _Settled()


class ServedCall(Call):
    """A call whose caller is in the server's process."""

    __slots__ = ("number", "refusal", "server")

    def __init__(self, request: InferRequest, number: int, server: ServerLink) -> None:
        self.number = number
        self.server = server
        self.refusal: InferError | None = None
        super().__init__(request, _SETTLED)

    @property
    def emit(self) -> Emit:  # type: ignore[override]
        """Made anew each time: one that was kept would refer back, and keep the inputs."""
        return self._emit

    @emit.setter
    def emit(self, value: Emit | None) -> None:
        """It is always the server's."""

    @property
    def is_cancelled(self) -> bool:  # type: ignore[override]
        try:
            return bool(self.server.ask("is cancelled", self.number))
        except OSError:
            return True

    @is_cancelled.setter
    def is_cancelled(self, value: bool) -> None:
        """The server knows."""

    def _emit(self, response: InferResponse) -> None:
        """Raises Unavailable when the caller does not take its answers."""
        if self.refusal is not None:
            raise self.refusal
        self.server.know(self)
        self.server.tell_answer(self, response, False)


class _Value(custom_metrics.Value):
    """A metric that the server keeps. Changes are checked here, too: who makes a wrong one is told at once."""

    def __init__(self, kind: int, buckets: Sequence[float], change: Callable[..., Any], ask: Callable[[], Any]) -> None:
        super().__init__(kind, buckets)
        self._change = change
        self._ask = ask

    def increment(self, by: float) -> None:
        super().increment(by)
        self._change("increment", by)

    def set(self, to: float) -> None:
        super().set(to)
        self._change("set", to)

    def observe(self, value: float) -> None:
        super().observe(value)
        self._change("observe", value)

    def value(self) -> float:
        return float(self._ask())


class _Family(custom_metrics.Family):
    """A family that the server keeps."""

    def __init__(self, name: str, description: str, kind: int, server: ServerLink) -> None:
        super().__init__(name, description, kind)
        self._server = server

    def metric(self, labels: Mapping[str, str], buckets: Sequence[float] | None) -> custom_metrics.Value:
        bounds = None if buckets is None else tuple(buckets)
        which = (self.name, self.description, self.kind, dict(labels), bounds)
        self._server.ask("metric", *which)  # it is on the page from now on
        return _Value(
            self.kind,
            bounds or (),
            lambda *change: self._server.tell_metric(*which, *change),
            lambda: self._server.ask("value", *which),
        )


class _LogsToServer(logging.Handler):
    """Log lines go through the server's settings."""

    def __init__(self, server: ServerLink) -> None:
        super().__init__()
        self._server = server
        self.setFormatter(logging.Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._server.tell("log", record.name, record.levelno, self.format(record))
        except Exception:
            print(record.getMessage(), file=sys.stderr)
