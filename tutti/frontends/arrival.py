"""How a request came to a front-end process, for the trace that the engine's process may begin. Knows no tracer."""

from collections.abc import Mapping
from typing import NamedTuple

from tutti.core.types import now_ns


class Arrival(NamedTuple):
    """What the trace of a request begins with. `context` is the header traceparent; times are of now_ns's clock."""

    context: str
    protocol: str
    received_ns: int
    started_ns: int
    notes: Mapping[str, object]

    @classmethod
    def now(cls, context: str, protocol: str, received_ns: int = 0) -> "Arrival":
        """The request is decoded now; `received_ns` is when decoding began, 0 where nobody knows."""
        started_ns = now_ns()
        return cls(context, protocol, received_ns or started_ns, started_ns, {})


UNKNOWN = Arrival("", "", 0, 0, {})
