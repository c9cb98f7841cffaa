"""The gRPC client of streams: a ModelStreamInfer call for each connection, many requests in it."""

from collections.abc import Sequence

from tritonclient.grpc import service_pb2 as pb

from tutti.loadtest import http2
from tutti.loadtest.client import Done
from tutti.loadtest.grpc_calls import Call, CallPool, framed
from tutti.loadtest.payloads import Message
from tutti.loadtest.scenario import Target

# Bytes of a request's gRPC prefix and id, at most.
_ID_SIZE = 32


class _Stream:
    """One ModelStreamInfer call: the requests that it has, and what is there of the answer that comes."""

    def __init__(self, connection: http2.Connection) -> None:
        self.connection = connection
        self.number = connection.open_call(self)
        self.open: set[int] = set()
        self.buffer = bytearray()


class StreamClient(CallPool):
    """Requests over a few ModelStreamInfer streams; answers are told apart by their ids."""

    METHOD = b"ModelStreamInfer"

    def __init__(self, target: Target, messages: Sequence[Message], done: Done, timeout_s: float) -> None:
        super().__init__(target, messages, done, timeout_s)
        self._streams: dict[http2.Connection, _Stream] = {}

    def _opened(self, connection: http2.Connection) -> None:
        self._streams[connection] = _Stream(connection)
        connection.write(connection.take())

    def _load(self, connection: http2.Connection) -> int:
        return len(self._streams[connection].open)

    def _fits(self, connection: http2.Connection, payload: int) -> bool:
        return connection.fits(len(self._bodies[payload]) + _ID_SIZE, self._streams[connection].number)

    def _put(self, connection: http2.Connection, number: int, payload: int) -> tuple[int, bytes]:
        stream = self._streams[connection]
        # Fields of a message may follow each other: the id comes after a body that is ready.
        request_id = pb.ModelInferRequest(id=str(number)).SerializeToString()
        connection.put(stream.number, framed(self._bodies[payload] + request_id), False)
        return stream.number, connection.take()

    def _go(self, call: Call, connection: http2.Connection, stream: int, data: bytes) -> None:
        self._streams[connection].open.add(call.number)
        super()._go(call, connection, stream, data)

    def _received(self, stream: _Stream, data: bytes, done_s: float) -> None:
        stream.buffer += data
        while len(stream.buffer) >= 5:
            end = 5 + int.from_bytes(stream.buffer[1:5], "big")
            if len(stream.buffer) < end:
                return
            answer = pb.ModelStreamInferResponse.FromString(bytes(stream.buffer[5:end]))
            del stream.buffer[:end]
            number = int(answer.infer_response.id or -1)
            stream.open.discard(number)
            self._finish(number, done_s, answer.error_message, "")

    def _ended(self, stream: _Stream, status: str, message: str, done_s: float) -> None:
        del self._streams[stream.connection]
        stream.connection.close()
        for number in stream.open:
            self._finish(number, done_s, f"the stream broke: {status}", message)

    def _forget(self, connection: http2.Connection, call: Call) -> None:
        if connection in self._streams:
            self._streams[connection].open.discard(call.number)
