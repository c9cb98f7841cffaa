"""The answers to requests that models make, as they come: waited for in the model's thread, without its turn."""

import contextlib
import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from tutti.backends.python.pb_utils import server
from tutti.backends.python.pb_utils.constants import TRITONSERVER_MEMORY_CPU
from tutti.backends.python.pb_utils.errors import TritonError
from tutti.backends.python.pb_utils.memory import PreferredMemory, moved
from tutti.backends.python.pb_utils.responses import InferenceResponse
from tutti.backends.python.pb_utils.tensors import received
from tutti.core import errors
from tutti.core.types import Answer, Call, InferResponse
from tutti.devices import device_turns


class Answers:
    """The answers to a model's own request, in order; a sink."""

    def __init__(
        self,
        timeout_s: float | None,
        preferred: PreferredMemory | None = None,
        held: device_turns.HeldTurn | None = None,
    ) -> None:
        """`held` is the turn of the execution that asks, which it does not need while it waits."""
        self.call: Call | None = None
        self._held = held
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()  # who waits for it may be cancelled, but not the end itself
        self._until_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._preferred = preferred
        self._queue: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()

    def emit(self, response: InferResponse) -> None:
        self._queue.put(response)

    def settle(self, calls: Sequence[Call]) -> None:
        """The last answer of a decoupled model may be an empty one, which the asking model sees, as in Triton."""
        self._queue.put(calls[0].answer)
        self._queue.put(None)
        self.ended.set_result(None)

    def __iter__(self) -> Iterator[InferenceResponse]:
        while True:
            try:
                answer = self._next()
            except queue.Empty:
                assert self.call is not None
                self.call.is_cancelled = True
                server.given_up(self.call)
                yield InferenceResponse(error=TritonError("the request ran out of its execution_timeout"))
                return
            if answer is None:
                return
            yield _response_of(answer, self._preferred)

    def _next(self) -> Answer | None:
        """Raises queue.Empty when it takes too long, and DeviceLost where there is no turn any more to go on with."""
        left_s = self.left_s()
        if left_s is not None and left_s <= 0 and not self.ended.done():
            raise queue.Empty
        with contextlib.suppress(queue.Empty):
            return self._queue.get_nowait()
        with device_turns.given_up(self._held):
            return self._queue.get(timeout=left_s)

    def left_s(self) -> float | None:
        """Of the time for all answers; None for any."""
        return None if self._until_s is None else self._until_s - time.monotonic()


def _response_of(answer: Answer, preferred: PreferredMemory | None) -> InferenceResponse:
    """In the asking model's thread: what has to be copied between memories is copied here."""
    if isinstance(answer, errors.InferError):
        return InferenceResponse(error=TritonError.of(answer))
    is_on_host = preferred is not None and preferred.preferred_memory_type == TRITONSERVER_MEMORY_CPU
    tensors = [received(tensor, is_on_host) for tensor in answer.outputs]
    if preferred is not None and not is_on_host:
        tensors = [moved(tensor, preferred.preferred_device_id) for tensor in tensors]
    return InferenceResponse(tensors, parameters=answer.parameters)
