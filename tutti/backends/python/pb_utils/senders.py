"""Response senders: answers to one request that come when the model likes, each once, and one at the end."""

import threading
from collections.abc import Callable

from tutti.backends.python.pb_utils.constants import TRITONSERVER_RESPONSE_COMPLETE_FINAL
from tutti.backends.python.pb_utils.errors import TritonModelException
from tutti.backends.python.pb_utils.responses import InferenceResponse
from tutti.core import errors
from tutti.core.types import Call, InferResponse

_CLOSED = "Response sender has been closed."


class InferenceResponseSender:
    """Sends the answers to one request: any number for a decoupled model, one for others."""

    def __init__(
        self,
        call: Call,
        answer_of: Callable[[Call, InferenceResponse], InferResponse | errors.InferError],
        null: InferResponse,
        is_decoupled: bool,
        done: Callable[[], None],
    ) -> None:
        self._call = call
        self._is_decoupled = is_decoupled
        self._answer_of = answer_of
        self._null = null
        self._done = done
        self._lock = threading.Lock()
        self._is_closed = False
        # The one answer of a model that is not decoupled is sent, the final flag may still come.
        self._is_answered = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        """Send a response, or with TRITONSERVER_RESPONSE_COMPLETE_FINAL the last one, or none. Raises when closed."""
        if response is not None and not isinstance(response, InferenceResponse):
            raise TritonModelException(f"send: expected an InferenceResponse, got a {type(response).__name__}")
        if flags not in (0, TRITONSERVER_RESPONSE_COMPLETE_FINAL):
            raise TritonModelException(f"Unable to send response. Unsupported flag provided: {flags}")
        is_final = bool(flags)
        if response is None and not is_final:
            raise TritonModelException(
                "Inference Response object must be provided when the response flags is set to zero."
            )
        with self._lock:
            if self._is_closed:
                if response is None and self._is_answered:
                    self._is_answered = False
                    return  # its one answer was the final one
                reason = "Non-decoupled model cannot send more than one response." if self._is_answered else _CLOSED
                raise TritonModelException(f"Unable to send response. {reason}")
            if response is None and not self._is_decoupled:
                raise TritonModelException(
                    "Unable to send response. Non-decoupled model cannot send complete final before sending a response."
                )
            self._is_closed = is_final
            self._is_answered = not self._is_decoupled and not is_final
            answer = self._null if response is None else self._answer_of(self._call, response)
            emit = self._call.emit if self._is_decoupled and not is_final else None
            if emit is not None and not isinstance(answer, errors.InferError):
                emit(answer)
                return
            # Only a decoupled model's caller takes several answers; an error is its last.
            self._is_closed = True
        self._settle(answer)

    def is_closed(self) -> bool:
        return self._is_closed

    def is_cancelled(self) -> bool:
        return self._call.is_cancelled

    def give_up(self) -> bool:
        """Send nothing any more, another answers; False where it has ended by itself."""
        with self._lock:
            if self._is_closed:
                return False
            self._is_closed = True
        self._done()
        return True

    def fail(self, error: errors.InferError) -> None:
        """End the answers with an error, unless they have ended."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._settle(error)

    def _settle(self, answer: InferResponse | errors.InferError) -> None:
        self._done()
        self._call.finish(answer)

    def __del__(self) -> None:
        if not self._is_closed:
            # Not in this thread, which may hold any lock.
            error = errors.Internal(
                f"model '{self._call.request.model_name}' dropped the request without a final answer"
            )
            threading.Thread(target=self.fail, args=(error,), daemon=True).start()
