"""Answers on their way to a coroutine: for streams, and for servers that await each call."""

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutti.core.errors import InferError, Unavailable
from tutti.core.types import RAW_TYPES, Answer, Call, InferRequest, InferResponse, Tensor

MAX_UNREAD = 10_000
MAX_UNREAD_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Item:
    """One answer of `call`. After the last one, `is_final`, there are no more; it may be null."""

    call: Call
    answer: Answer
    is_final: bool
    # Bytes that count as unread; 0 for the last answer.
    size: int = 0


class Answers:
    """A queue of the answers to any number of calls, in the order they come. `get` on one event loop; a sink.

    A reader that falls behind by MAX_UNREAD answers, or by several of MAX_UNREAD_BYTES, loses the call: a model must
    not fill the memory.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[Item] = deque()
        self._ready = asyncio.Event()
        self._has_ended = False
        self._failure: InferError | None = None
        self._lock = threading.Lock()
        self._unread_bytes = 0
        self.open: set[Call] = set()

    def call(self, request: InferRequest, token: Any = None) -> Call:
        """A call whose answers come here."""
        call = Call(request, self, token)
        call.emit = lambda response: self._emit(call, response)
        self.open.add(call)
        return call

    def settle(self, calls: Sequence[Call]) -> None:
        for call in calls:
            assert call.answer is not None
            call.emit = None  # it refers to the call: a cycle
            self._items.append(Item(call, call.answer, True))
        self._wake()

    def end(self) -> None:
        """Say that no more calls will be made."""
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
        if item.size:
            with self._lock:
                self._unread_bytes -= item.size
        if item.is_final:
            self.open.discard(item.call)
        return item

    async def get(self) -> Item:
        """The next answer, of a call that is open."""
        item = await self.next()
        assert item is not None, "nothing is open"
        return item

    def fail(self, error: InferError) -> None:
        """Have readers get `error` once they have read the answers that are there."""
        self._failure = error
        self._ready.set()

    def cancel(self) -> None:
        """Cancel the calls that are open: nobody waits for them."""
        for call in self.open:
            call.is_cancelled = True

    def _emit(self, call: Call, response: InferResponse) -> None:
        size = _size(response)
        with self._lock:
            is_too_much = bool(self._unread_bytes) and self._unread_bytes + size > MAX_UNREAD_BYTES
            self._unread_bytes += 0 if is_too_much else size
        if is_too_much or len(self._items) >= MAX_UNREAD:
            call.is_cancelled = True
            raise Unavailable(f"model '{call.request.model_name}': the client does not take its answers")
        self._items.append(Item(call, response, False, size))
        self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop is closed: nobody waits
            return


def _size(response: InferResponse) -> int:
    """Bytes of its tensors."""
    return sum(map(_tensor_size, response.outputs))


def _tensor_size(tensor: Tensor) -> int:
    data: Any = tensor.data
    if isinstance(data, RAW_TYPES):
        return len(data)
    if isinstance(data, np.ndarray) and data.dtype.hasobject:
        return sum(len(element) for element in data.reshape(-1) if isinstance(element, bytes | str))
    return int(data.nbytes)
