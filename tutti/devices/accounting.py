"""How long a device has been busy, and whose its time was, where turns overlap each other and batches. Pure.

Times are nanoseconds of the host's clock.
"""

from collections import deque
from collections.abc import Hashable

# A batch that executed beside a turn is told of after the turn has ended, but not long after.
_REMEMBERED = 32


class Accounting:
    """Of one device. Turns are told of as they begin and end, batches when they have ended."""

    def __init__(self) -> None:
        # The union of all spans that have ended.
        self.busy_ns = 0
        self._shares: dict[Hashable, float] = {}
        self._shared_until_ns = 0
        # Since when there has been a turn; before that, when there were some.
        self._since_ns = 0
        self._spans: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED)

    def begin(self, turn: Hashable, now_ns: int) -> None:
        self._share(now_ns)
        if not self._shares:
            self._since_ns = now_ns
        self._shares[turn] = 0.0

    def end(self, turn: Hashable, now_ns: int) -> int:
        """Returns the turn's part of the time: turns that overlap share it equally."""
        self._share(now_ns)
        part_ns = self._shares.pop(turn)
        if not self._shares:
            self.busy_ns += now_ns - self._since_ns
            self._spans.append((self._since_ns, now_ns))
        return round(part_ns)

    def executed(self, lasted_ns: int, now_ns: int) -> None:
        """A batch has executed for so long until now. What a turn has had of that is counted with the turn."""
        start_ns = now_ns - lasted_ns
        spans = [*self._spans, (self._since_ns, now_ns)] if self._shares else self._spans
        overlap_ns = sum([max(0, min(end, now_ns) - max(begin, start_ns)) for begin, end in spans])
        self.busy_ns += max(0, lasted_ns - overlap_ns)

    def _share(self, now_ns: int) -> None:
        elapsed_ns = now_ns - self._shared_until_ns
        self._shared_until_ns = now_ns
        for turn in self._shares:
            self._shares[turn] += elapsed_ns / len(self._shares)
