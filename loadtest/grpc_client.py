"""The gRPC client of unary calls: a ModelInfer call for each request, many on an HTTP/2 connection."""

from collections.abc import Sequence

from tutti.loadtest import http2
from tutti.loadtest.client import TIMED_OUT, Done
from tutti.loadtest.grpc_calls import Call, CallPool, framed
from tutti.loadtest.payloads import Message
from tutti.loadtest.scenario import Target


class GrpcClient(CallPool):
    """Unary calls."""

    METHOD = b"ModelInfer"

    def __init__(self, target: Target, messages: Sequence[Message], done: Done, timeout_s: float) -> None:
        super().__init__(target, messages, done, timeout_s)
        self._framed = [framed(body) for body in self._bodies]

    def _more_headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"grpc-timeout", f"{max(1, int(self._timeout_s * 1e3))}m".encode())]

    def _load(self, connection: http2.Connection) -> int:
        return connection.in_flight

    def _fits(self, connection: http2.Connection, payload: int) -> bool:
        return connection.fits(len(self._framed[payload]))

    def _put(self, connection: http2.Connection, number: int, payload: int) -> tuple[int, bytes]:
        stream = connection.open_call(number)
        connection.put(stream, self._framed[payload], True)
        return stream, connection.take()

    def _ended(self, number: int, status: str, message: str, done_s: float) -> None:
        call = self._calls.get(number)
        if call is None or call.connection is None:
            return  # the request has timed out, or was prepared and never sent
        if status == http2.UNPROCESSED and done_s < call.deadline_s:
            self._place(call)
        else:
            error = {"OK": "", "DEADLINE_EXCEEDED": TIMED_OUT, http2.UNPROCESSED: http2.UNAVAILABLE}.get(status, status)
            self._finish(number, done_s, error, message)
        self._send_waiting(number % len(self._hosts))

    def _forget(self, connection: http2.Connection, call: Call) -> None:
        connection.cancel(call.stream)
