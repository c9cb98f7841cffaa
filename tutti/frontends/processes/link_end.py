"""What both ends of a link have: frames, memory of their own that the peer reads, and the peer's.

Knows nothing of what is sent, but that blocks are lent and given back.
"""

import asyncio
import contextlib
import socket
from collections import deque

from tutti.core.types import Raw
from tutti.frontends.processes.frames import Frames
from tutti.frontends.processes.shared_blocks import Arena, Borrowed, Place, new_arena, receive_arena, send_arena

# Blocks are given back together, this long after the first.
_GIVE_BACK_S = 0.002


class End(Frames):
    """One end of a link: frames, memory of its own that the peer reads, and the peer's."""

    def __init__(self) -> None:
        super().__init__()
        self.arena: Arena | None = new_arena()
        self._borrowed: Borrowed | None = None
        # Blocks of the peer's memory that nobody here reads any more.
        self._ended: deque[int] = deque()
        self._is_giving_back = False

    def greet(self, connection: socket.socket) -> None:
        """Greet the peer, before anything is received. Raises OSError."""
        send_arena(connection, self.arena)

    def give_up(self, connection: socket.socket) -> None:
        """There is no link after all."""
        connection.close()
        if self.arena is not None:
            self.arena.close_file()

    async def meet(self, connection: socket.socket) -> None:
        """Receive the peer's greeting. Raises OSError when it has gone."""
        await _readable(self._loop, connection)
        self._borrowed = receive_arena(connection, self._give_back)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of both memories. Views that are still used keep theirs."""
        self._transport = None
        self.arena = self._borrowed = None

    def lend(self, raw: Raw) -> Place | None:
        arena = self.arena
        return arena.lend(raw) if arena is not None else None

    def find(self, place: Place, size: int) -> Raw:
        assert self._borrowed is not None
        return self._borrowed.view(place, size)

    def _give_back(self, block: int) -> None:
        """From any thread, at any moment: a view of the peer's memory has gone."""
        self._ended.append(block)
        if self._is_giving_back:
            return
        self._is_giving_back = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: so is the link
            self._loop.call_soon_threadsafe(self._loop.call_later, _GIVE_BACK_S, self._send_ended)

    def _send_ended(self) -> None:
        self._is_giving_back = False  # first: what ends from now on is sent the next time
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        self.send(("free", ended))


async def _readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    is_readable = loop.create_future()

    def readable() -> None:
        if not is_readable.done():
            is_readable.set_result(None)

    loop.add_reader(connection, readable)
    try:
        await is_readable
    finally:
        loop.remove_reader(connection)
