"""What a model's process asks of its server, beside answers: requests to other models, their control, metrics, logs.

Asked in the thread that listens to the process; other models answer in theirs. Knows neither the process nor its
channels.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tutti.backends.python import isolated_wire as wire
from tutti.core.errors import Internal, Unavailable
from tutti.core.types import Answer, Call, Infer, InferRequest, InferResponse, control_of
from tutti.observing import custom_metrics


class Questions:
    """Of the process of the model `name`. `open_calls` are those it owes answers to, by their numbers.

    A message of the process of kind K, which is not of an answer, is for `on_K`. `send` replies to it.
    """

    def __init__(self, name: str, infer: Infer, open_calls: Mapping[int, Call], send: Callable[..., None]) -> None:
        self._name = name
        self._infer = infer
        self._open = open_calls
        self._asked: dict[int, Call] = {}
        self._send = send

    def cancel_all(self) -> None:
        """The process has gone: nobody waits for other models' answers any more."""
        for call in list(self._asked.values()):
            call.is_cancelled = True

    def on_infer(self, number: int, takes_many: bool, request: tuple[Any, ...], of: int) -> None:
        """`of` is the number of the traced call in whose name it is made, 0 for none."""
        model, version, request_id, outputs, parameters, heads, payload = request
        inputs = {tensor.name: tensor for tensor in wire.tensors(heads, wire.unpacked(payload))}
        inner = InferRequest(model, inputs, version, request_id, outputs, parameters)
        asked = _Asked(self, number)
        call = self._asked[number] = Call(inner, asked, None, asked.emit if takes_many else None)
        outer = self._open.get(of)
        if outer is not None and outer.trace is not None:
            outer.trace.follow(call)
        try:
            self._infer([call])
        except Exception as error:
            call.finish(Internal(f"model '{model}' could not be asked: {type(error).__name__}: {error}"))

    def on_cancel(self, number: int) -> None:
        call = self._asked.get(number)
        if call is not None:
            call.is_cancelled = True

    def on_ask(self, number: int, question: str, *details: Any) -> None:
        if question == "control":  # it may take long, and the model may have to answer meanwhile
            threading.Thread(target=self._reply, args=(number, question, *details), name="control", daemon=True).start()
        else:
            self._reply(number, question, *details)

    def _reply(self, number: int, question: str, *details: Any) -> None:
        try:
            value, failure = self._told(question, *details), ""
        except Exception as error:
            value, failure = None, str(error)
        self._send("reply", number, value, failure)

    def _told(self, question: str, *details: Any) -> Any:
        if question == "is cancelled":
            call = self._open.get(details[0])
            return call is None or call.is_cancelled
        if question == "control":
            return self._controlled(*details)
        if question == "family":
            custom_metrics.family(*details)
            return None
        if question == "metrics":  # those told before this question have been taken
            return None
        metric = _metric(*details)
        return metric.value() if question == "value" else None

    def _controlled(self, action: str, *details: Any) -> Any:
        control = control_of(self._infer)
        if control is None:
            raise Unavailable(f"model '{self._name}': nothing loads models here")
        return getattr(control, action)(*details)

    def on_metric(self, *message: Any) -> None:
        *which, change, value = message
        getattr(_metric(*which), change)(value)

    def on_log(self, name: str, level: int, text: str) -> None:
        logging.getLogger(name).log(level, "%s", text)

    def tell_asked(self, number: int, answer: Answer, is_final: bool) -> None:
        """Another model has answered, from any thread."""
        if is_final:
            self._asked.pop(number, None)
        self._send("answered", number, is_final, wire.pack_answers([answer]))


class _Asked:
    """The sink of a request that a model's process makes."""

    def __init__(self, questions: Questions, number: int) -> None:
        self._questions = questions
        self._number = number

    def emit(self, response: InferResponse) -> None:
        self._questions.tell_asked(self._number, response, False)

    def settle(self, calls: Sequence[Call]) -> None:
        answer = calls[0].answer
        assert answer is not None
        self._questions.tell_asked(self._number, answer, True)


def _metric(name: str, description: str, kind: int, labels: Any, buckets: Any) -> custom_metrics.Value:
    return custom_metrics.family(name, description, kind).metric(labels, buckets)
