"""What front-end processes follow: how the engine's process logs, and whether it traces requests.

It decides, and writes the traces; they say how and when a request came. The engine's end tells all of them of a change,
and waits for a while until they know: whoever has changed a setting may count on it.
"""

import itertools
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from tutti.core.types import Call
from tutti.frontends.arrival import Arrival
from tutti.frontends.v2.api import Api
from tutti.observing.logs import Settings

# How long a client's change waits for processes that do not answer.
PATIENCE_S = 2.0


class Followed(NamedTuple):
    """`is_traced`: some requests are; `has_contexts`: a trace may be part of one that a request's headers name."""

    logs: Settings
    is_traced: bool
    has_contexts: bool


class Follower:
    """One front-end process, to the engine's end."""

    # The number of the last change that it knows of.
    followed = 0
    has_ended = False

    def send(self, values: Any) -> None:
        """From any thread, in the order of the calls."""
        raise NotImplementedError


class Leader:
    """Tells followers what holds now. Thread-safe; build it on the thread of the loop that their answers come to."""

    def __init__(self, api: Api, followers: Collection[Follower]) -> None:
        self._api = api
        self._followers = followers
        self._thread = threading.get_ident()
        self._numbers = itertools.count(1)
        self._turn = threading.Lock()
        self._answered = threading.Condition()
        api.logs.listen(self._tell_all)
        api.tracer.listen(self._tell_all)

    def tell(self, followers: Sequence[Follower]) -> int:
        """Send them what holds now; returns the change's number."""
        tracer = self._api.tracer
        with self._turn:
            number = next(self._numbers)
            state = tuple(Followed(self._api.logs.changeable(), tracer.is_on, tracer.needs_headers))
            for follower in followers:
                follower.send(("follow", number, state))
            return number

    def look(self) -> None:
        """A follower has answered, or has ended."""
        with self._answered:
            self._answered.notify_all()

    def _tell_all(self) -> None:
        followers = list(self._followers)
        number = self.tell(followers)
        if threading.get_ident() == self._thread:  # their answers come on this thread: waiting here would block them
            return
        with self._answered:
            self._answered.wait_for(
                lambda: all(follower.followed >= number or follower.has_ended for follower in followers), PATIENCE_S
            )


class _Noted:
    """Stands for a trace: the trace itself is in the engine's process."""

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival

    def record(self, activity: str, ns: int) -> None:
        """Nothing happens to a call here."""

    def note(self, label: str, value: object) -> None:
        self.arrival = self.arrival._replace(notes={**self.arrival.notes, label: value})

    def follow(self, call: Call) -> None:
        """No calls are made here."""


class TracesElsewhere:
    """A front-end process's tracer: it notes how requests came, for the engine's, which has the traces."""

    def __init__(self) -> None:
        self.is_on = self.needs_headers = False

    def begin(self, call: Call, context: str = "", protocol: str = "", received_ns: int = 0) -> None:
        call.trace = _Noted(Arrival.now(context, protocol, received_ns))

    def end(self, call: Call) -> None:
        call.trace = None

    def close(self) -> None:
        """Nothing here."""

    def arrivals(self, calls: Mapping[int, Call], numbers: range) -> dict[int, tuple[Any, ...]]:
        """How the numbered calls came, as far as it was noted."""
        traces = {number: calls[number].trace for number in numbers}
        return {number: tuple(trace.arrival) for number, trace in traces.items() if isinstance(trace, _Noted)}
