"""One HTTP/1.1 connection on llhttp: bytes in, exchanges out, responses in the order of the requests.

Owns the duties of an HTTP/1.1 server: ordered answers on pipelined connections, keep-alive, timeouts, back-pressure,
and breaking with clients that do not read. What reads requests, with its limits, is request_reader.py. Knows nothing of
inference.
"""

import asyncio
from collections import deque
from typing import Any, Protocol, cast

from tutti.frontends.held_bytes import COUNTED_BYTES
from tutti.frontends.http.exchange import Exchange, Response, error_response
from tutti.frontends.http.request_reader import Receiving, RequestReader

MAX_PIPELINED = 128
# How long a refused client may go on sending: it reads the answer only if the connection does not break meanwhile.
LINGER_S = 2.0
# How long a client that has closed its side may wait for answers. An app's are given less: they may be endless.
HALF_CLOSED_S = 30.0
HALF_CLOSED_APP_S = 0.5
IDLE_TIMEOUT_S = 75.0
READ_TIMEOUT_S = 60.0
# The slowest a body may come, beyond twice READ_TIMEOUT_S.
LEAST_RATE_BYTES_S = 16 * 1024


class Front(Receiving, Protocol):
    """What a connection belongs to. `stalled` are those whose clients leave answers unread."""

    connections: set["Connection"]
    stalled: set["Connection"]
    is_draining: bool

    def handle(self, exchange: Exchange) -> None:
        """A complete request; `exchange.connection.deliver` answers it, now or later."""

    def refused(self, exchange: Exchange, status: int, message: str) -> None:
        """An exchange has been answered with an error, before anybody was asked for its answer."""


class Connection(RequestReader):
    """One client connection: bytes in, exchanges out, responses in the order of the requests."""

    def __init__(self, front: Front) -> None:
        self.pending: deque[Exchange] = deque()
        super().__init__(front)
        self._front: Front = front
        # Bytes that its client has not read, and when it last read any.
        self._unread = 0
        self.read_at = 0.0
        # The client's address, as the system says it.
        self.peer: Any = None
        self._is_write_paused = False
        self._can_write = asyncio.Event()
        self._can_write.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from it
        self.peer = transport.get_extra_info("peername")
        self.last_read = self._loop.time()
        self._front.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._front.connections.discard(self)
        self._end_stall()
        for exchange in self.pending:
            if exchange.call is not None:
                exchange.call.is_cancelled = True
            if exchange.task is not None:
                exchange.task.cancel()
            if exchange.call is None and exchange.task is None and exchange.response is not None:
                exchange.release()  # calls and apps release theirs when they answer
        self.pending.clear()
        self._can_write.set()
        if self._counting is not None:
            self._counting.release()

    def eof_received(self) -> bool:
        """The client sends no more. It may wait for its answers: what is being executed is answered.

        Most such clients have gone, so what only waits in a queue is cancelled.
        """
        if not self.pending or self._is_reading:
            return False
        self._is_closing = True
        self.pending[-1].keep_alive = False
        is_app = False
        for exchange in self.pending:
            is_app = is_app or exchange.task is not None
            if exchange.call is not None:
                exchange.call.is_cancelled = True
        self._loop.call_later(HALF_CLOSED_APP_S if is_app else HALF_CLOSED_S, self._close)
        return True

    @property
    def has_gone(self) -> bool:
        """Whether the connection has ended, so that nothing can be told any more. From any thread."""
        return self._transport is None

    def _accept(self, exchange: Exchange) -> None:
        self.pending.append(exchange)
        if self._front.is_draining:
            exchange.keep_alive = False
        if not exchange.keep_alive:
            self._is_closing = True
        if self._is_write_paused or len(self.pending) >= MAX_PIPELINED:
            self._update_reading()
        self._front.handle(exchange)

    # responses

    def passed_ns(self) -> int:
        """Nanoseconds since something came last."""
        return int((self._loop.time() - self.last_read) * 1e9)

    def respond(self, exchange: Exchange, status: int, message: str) -> None:
        """Answer with an error."""
        headers = exchange.about()
        self._front.refused(exchange, status, message)
        self.deliver(exchange, error_response(status, message, exchange.keep_alive, headers))

    def deliver(self, exchange: Exchange, response: Response) -> None:
        """Write the response now, or when those before it have been written.

        A large one for which there is no room, since clients do not read theirs, is refused.
        """
        if exchange.held:
            exchange.release()
        if type(response) is list or len(response) >= COUNTED_BYTES:
            response = self._with_room(exchange, response)
        exchange.response = response
        exchange.call = None  # the two are a cycle: left to the garbage collector, it costs milliseconds
        self._flush()

    def _with_room(self, exchange: Exchange, response: Response) -> Response:
        if exchange.parts is not None or exchange not in self.pending:  # too late to refuse it, or nobody waits
            return response
        size = sum(map(len, response)) if isinstance(response, list) else len(response)
        if not self.holding.take(size):
            self._front.make_room(size)
            if not self.holding.take(size):
                return error_response(503, self.holding.refusal, exchange.keep_alive, exchange.about())
        exchange.held = size
        return response

    async def send_part(self, exchange: Exchange, data: bytes) -> None:
        """Write a part of a response that `deliver` ends, when those before it have been written.

        Waits while the client does not read.
        """
        if exchange.parts is None:
            exchange.parts = []
        exchange.parts.append(data)
        self._flush()
        await self._can_write.wait()

    def _flush(self) -> None:
        while self.pending:
            done = self.pending[0]
            if done.parts:
                self._write(b"".join(done.parts))
                done.parts.clear()
            if done.response is None:
                break
            self.pending.popleft()
            self._write(done.response)
            if done.held:
                done.release()
            if not done.keep_alive:
                if done.method:
                    self._close()
                else:
                    self._linger()
                return
        if self._is_read_paused:
            self._update_reading()

    def refuse_open(self, status: int, message: str) -> None:
        """Answer all open requests with an error, and close; but none behind a response that has begun."""
        waiting = list(self.pending)
        for exchange in waiting:
            if exchange.parts is not None:
                return
            if exchange.response is None:
                exchange.keep_alive = exchange is not waiting[-1]
                self.respond(exchange, status, message)

    def _refuse(self, status: int, message: str) -> None:
        """Answer after what is pending, then close: what follows on this connection cannot be trusted."""
        if self._is_closing:
            return
        self._is_closing = True
        exchange = Exchange(self, b"", b"", keep_alive=False)
        if self._is_reading:  # what is known of the request so far
            exchange.url, exchange.headers = self._url, self._headers
        self.pending.append(exchange)
        self.respond(exchange, status, message)

    def _continue(self) -> None:
        if not self.pending and not self._is_closing:
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _write(self, data: Response) -> None:
        if self._transport is not None and not self._transport.is_closing():
            if isinstance(data, list):
                self._transport.writelines(data)
            else:
                self._transport.write(data)
            if self._is_write_paused:
                self._count_unread()

    # clients that do not read

    def pause_writing(self) -> None:
        self._is_write_paused = True
        self._can_write.clear()
        self._front.stalled.add(self)
        self.read_at = self._loop.time()
        self._count_unread()
        self._update_reading()

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._can_write.set()
        self._end_stall()
        self._update_reading()

    def _count_unread(self) -> None:
        if self._transport is not None:
            size = self._transport.get_write_buffer_size()
            self.holding.change(size - self._unread)
            self._unread = size

    def _end_stall(self) -> None:
        self._front.stalled.discard(self)
        self.holding.give(self._unread)
        self._unread = 0

    def close_if_unread(self, now: float, after_s: float) -> None:
        """Break with a client that has read nothing for so long: its answers are held for nobody."""
        before = self._unread
        self._count_unread()
        if self._unread < before:
            self.read_at = now
        elif now - self.read_at > after_s:
            self._is_closing = True
            self.abort()
            self._end_stall()

    def _update_reading(self) -> None:
        """Read only while the client takes its answers and has not sent too far ahead."""
        should_pause = self._is_write_paused or len(self.pending) >= MAX_PIPELINED
        if self._transport is None or should_pause == self._is_read_paused or self._transport.is_closing():
            return
        self._is_read_paused = should_pause
        if should_pause:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    # ends

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def end(self) -> None:
        """Close now; at once where something is still under way."""
        if self.pending or self._is_reading:
            self.abort()
        else:
            self._close()

    def close_if_idle(self, now: float) -> None:
        """Close when nothing was sent for long: between requests silently, within one with a 408."""
        if self.pending or self._is_write_paused or self._is_closing:
            return
        if self._is_reading and now - self.last_read > READ_TIMEOUT_S:
            self._refuse(408, f"no data for {READ_TIMEOUT_S:.0f} s within a request")
        elif self._is_reading and now - self._begun_at > self._longest_s():
            self._refuse(408, f"a request comes with at least {LEAST_RATE_BYTES_S} bytes a second")
        elif not self._is_reading and now - self.last_read > IDLE_TIMEOUT_S:
            self._close()

    def _longest_s(self) -> float:
        return 2 * READ_TIMEOUT_S + self._front.limits.max_input_size / LEAST_RATE_BYTES_S

    def _close(self) -> None:
        self._is_closing = True
        if self._transport is not None:
            self._transport.close()

    def _linger(self) -> None:
        """Close after a refusal, but take and forget for a while what the client still sends."""
        self._is_closing = True
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if transport.can_write_eof():
            transport.write_eof()
        self._loop.call_later(LINGER_S, transport.close)
