"""A large HTTP body, received where it stays: the system writes into the one buffer that the request's tensors view."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from tutti.frontends.held_bytes import COUNTED_BYTES
from tutti.frontends.http.exchange import Exchange


class Receiver(Protocol):
    """The connection that a large body stands in for."""

    last_read: float

    def hold(self, exchange: Exchange, size: int) -> bool:
        """Count what has come; False where the request has been refused."""

    def end_large_body(self, exchange: Exchange) -> None:
        """The whole body is there."""

    def connection_lost(self, exc: Exception | None) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


class LargeBody(asyncio.BufferedProtocol):
    """Stands in for a connection while a large body comes, so that the system writes it where it stays."""

    def __init__(self, connection: Receiver, exchange: Exchange, memory: memoryview, begun: Sequence[bytes]) -> None:
        """`memory` is as large as the body, whose first pieces are `begun`."""
        self._connection = connection
        # None once it has its body.
        self._exchange: Exchange | None = exchange
        self._body = memory
        self._size = 0
        for piece in begun:
            self._body[self._size : self._size + len(piece)] = piece
            self._size += len(piece)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._exchange is not None:
            self._exchange.release()
        self._body = memoryview(b"")
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._body[self._size :]

    def buffer_updated(self, nbytes: int) -> None:
        exchange = self._exchange
        assert exchange is not None, "the protocol is another from then on"
        self._size += nbytes
        if not self._connection.hold(exchange, nbytes):
            self._body = memoryview(bytearray(COUNTED_BYTES))  # what is still sent is received here and forgotten
            self._size = 0
            return
        self._connection.last_read = asyncio.get_running_loop().time()
        if self._size == len(self._body):
            self._exchange = None
            exchange.body = self._body
            self._body = memoryview(b"")  # let go: the transport keeps a reference to this object
            self._connection.end_large_body(exchange)
