"""Answers that the native gRPC server has got, and how many bytes of them have not left it yet.

No status tells of one call: the bytes follow from what was given, from the server's own counts of ended calls, and from
the calls that still wait. Whose answers they are, memory_guard.py knows.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from tutti.core.types import Call
from tutti.frontends.door import Failure
from tutti.frontends.grpc import log_events as grpc_events
from tutti.frontends.grpc.methods import MODEL_INFER, RESOURCE_EXHAUSTED, UNAVAILABLE
from tutti.frontends.held_bytes import Holding

# The native server holds no answer if at so many looks in a row all its calls were waiting for theirs.
_LOOKS = 10


class Guarding(Protocol):
    """Who says whether there is room for an answer."""

    def may_give(self, peer: str, size: int) -> bool: ...


class GivenAnswers:
    """Gives answers to the native server, and counts them. From any thread."""

    def __init__(self, native: Any, holding: Holding, open_calls: Mapping[int, tuple[Call, str]]) -> None:
        """`open_calls` are those that wait for their answers, by their ids."""
        self.native = native
        self._holding = holding
        self.open_calls = open_calls
        # All bytes of answers that the native server has got.
        self.total = 0
        self.largest = 0
        # Bytes in `total` that no status will ever tell of: of answers given just as their calls ended.
        self._lost = 0
        # What seemed lost at the last looks. One look may be wrong, for calls that came and went during it.
        self._missing: deque[int] = deque(maxlen=_LOOKS)

    def respond(self, call_id: int, message: bytes) -> Failure | None:
        """Answer. Returns why not, if the client has left."""
        size = len(message)
        self.total += size
        if self.native.respond(call_id, message):
            return None
        self.total -= size
        return grpc_events.GONE

    def give(self, guard: Guarding, call_id: int, message: bytes, peer: str) -> Failure | None:
        """Answer, if the answer may be held until its client has read it. Returns why not."""
        size = len(message)
        limit = self._holding.limit
        if size > limit:  # an error that says so, since trying again would not help
            why = f"the answer has {size} bytes, all that are held at a time at most {limit} (--max-inflight-bytes)"
            return RESOURCE_EXHAUSTED, why
        self.largest = max(self.largest, size)
        self.total += size  # first: the guard never takes more to be owed than has been given
        has_room = guard.may_give(peer, size)
        failure = self.respond(call_id, message) if has_room else (UNAVAILABLE, self._holding.refusal)
        self.total -= size
        return failure

    def under_way(self) -> int:
        """How many bytes of answers the native server has, at most. One thread at a time asks."""
        # Both are read before the metrics: what is given in between must not seem to be lost.
        total = self.total
        waiting = [call_id for call_id, (call, _) in list(self.open_calls.items()) if not call.is_cancelled]
        metrics = self.native.metrics()
        assert metrics is not None
        infer = metrics["methods"][MODEL_INFER]
        ended = infer["status"].values()
        unsent = total - sum(int(status["sent"]["sum"]) for status in ended)
        open_count = infer["started"] - sum(int(status["count"]) for status in ended)
        answered = max(0, open_count - sum([call_id in self.open_calls for call_id in waiting]))
        self._missing.append(unsent - answered * self.largest)
        if len(self._missing) == _LOOKS:
            self._lost = max(self._lost, min(self._missing))
        return unsent - self._lost
