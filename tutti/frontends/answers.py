"""Answers on their way to a coroutine: for streams, and for servers that await each call."""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tutti.errors import InferError, Unavailable
from tutti.types import Answer, Call, InferRequest, InferResponse

MAX_UNREAD = 10_000


@dataclass(frozen=True, slots=True)
class Item:
    """One answer of `call`. After the last one, `is_final`, there are no more; it may be null."""

    call: Call
    answer: Answer
    is_final: bool


class Answers:
    """A queue of the answers to any number of calls, in the order they come. `get` on one event loop; a sink.

    A reader that falls behind by MAX_UNREAD answers loses the call: a model must not fill the memory.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[Item] = deque()
        self._ready = asyncio.Event()
        self._has_ended = False
        self._failure: InferError | None = None
        self.open: set[Call] = set()

    def call(self, request: InferRequest, token: Any = None) -> Call:
        """A call whose answers come here."""
        made = Call(request, self, token)
        made.emit = lambda response: self._emit(made, response)
        self.open.add(made)
        return made

    def settle(self, calls: Sequence[Call]) -> None:
        for call in calls:
            assert call.answer is not None
            call.emit = None  # it refers back to the call
            self._items.append(Item(call, call.answer, True))
        self._wake()

    def end(self) -> None:
        """No more calls will be made."""
        self._has_ended = True
        self._ready.set()

    async def next(self) -> Item | None:
        """The next answer; None when no more calls will be made and all have their last answer.

        Raises what `fail` was given, after the answers that came before it.
        """
        while not self._items:
            if self._failure is not None:
                raise self._failure
            if self._has_ended and not self.open:
                return None
            self._ready.clear()
            await self._ready.wait()
        item = self._items.popleft()
        if item.is_final:
            self.open.discard(item.call)
        return item

    async def get(self) -> Item:
        """The next answer, of a call that is open."""
        item = await self.next()
        assert item is not None, "nothing is open"
        return item

    def fail(self, error: InferError) -> None:
        """No more answers will come."""
        self._failure = error
        self._ready.set()

    def cancel(self) -> None:
        """Nobody waits any more."""
        for call in self.open:
            call.is_cancelled = True

    def _emit(self, call: Call, response: InferResponse) -> None:
        if len(self._items) >= MAX_UNREAD:
            call.is_cancelled = True
            raise Unavailable(f"model '{call.request.model_name}': the client does not take its answers")
        self._items.append(Item(call, response, False))
        self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop is closed: nobody waits
            return
