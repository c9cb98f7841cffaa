"""Answers that the native gRPC server has, and the system has not yet taken from it, by connection. Pure.

A connection is known by its peer's name; what the system has taken of it is told in bytes since the connection began.
"""

from dataclasses import dataclass

# A client that reads more slowly, bytes a second, counts as one that reads nothing.
LEAST_RATE_BYTES_S = 16 * 1024


@dataclass(slots=True)
class _Debt:
    """`left` bytes were not taken when `taken` was told last; `moved` is how many were at `moved_at`, seconds."""

    left: int
    taken: int
    moved: int
    moved_at: float


class Unread:
    """How many bytes are owed to which connection."""

    def __init__(self) -> None:
        self._debts: dict[str, _Debt] = {}
        # Bytes owed to peers that nobody knows.
        self.unknown = 0

    def __bool__(self) -> bool:
        return bool(self._debts) or self.unknown > 0

    @property
    def peers(self) -> list[str]:
        return list(self._debts)

    @property
    def left(self) -> int:
        return self.unknown + sum(debt.left for debt in self._debts.values())

    def gives(self, peer: str, size: int, taken: int, now: float) -> None:
        """An answer is about to be given to a connection, "" for one that nobody knows, of which `taken` are taken."""
        if not peer:
            self.unknown += size
            return
        debt = self._debts.get(peer)
        if debt is None:
            debt = self._debts[peer] = _Debt(0, taken, taken, now)
        debt.left += size

    def saw(self, peer: str, taken: int | None, now: float) -> int:
        """How much is taken now, None for a connection that has gone; returns how many bytes are owed no more."""
        debt = self._debts.get(peer)
        if debt is None:
            return 0
        if taken is None or taken - debt.taken >= debt.left:
            del self._debts[peer]
            return debt.left
        came, debt.taken = taken - debt.taken, taken
        debt.left -= came
        if taken - debt.moved > LEAST_RATE_BYTES_S * (now - debt.moved_at):
            debt.moved, debt.moved_at = taken, now
        return came

    def waits(self, peer: str, now: float) -> int:
        """Its connection is being ended: it is not stalled again before long. Returns what is owed to it."""
        debt = self._debts[peer]
        debt.moved_at = now
        return debt.left

    def forgive(self, most: int) -> int:
        """No more than `most` bytes are owed in truth, since calls were cancelled; returns how many no longer are.

        Whose they were nobody knows: most likely of those that have read nothing for longest.
        """
        surplus = rest = max(0, self.left - most)
        for debt in sorted(self._debts.values(), key=lambda debt: debt.moved_at):
            forgiven = min(rest, debt.left)
            debt.left -= forgiven
            rest -= forgiven
        self._debts = {peer: debt for peer, debt in self._debts.items() if debt.left > 0}
        self.unknown -= rest
        return surplus

    def stalled(self, now: float, after_s: float) -> list[str]:
        """Whose clients have read nothing for so long, the longest first."""
        late = [(debt.moved_at, peer) for peer, debt in self._debts.items() if now - debt.moved_at > after_s]
        return [peer for _, peer in sorted(late)]
