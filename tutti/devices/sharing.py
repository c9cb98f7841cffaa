"""Whose batch a device executes next: the user that has had the least device time for its weight. Pure.

A user that comes back after a pause is not owed the time it did not ask for, and one that never pauses cannot keep
another from its share.
"""

from collections.abc import Hashable, Iterable

# Who comes a little late with its next batch keeps its claim; who pauses for longer loses what is beyond this.
_CREDIT_NS = 20_000_000


class Shares:
    """Device time of each user, in nanoseconds divided by the user's weight."""

    def __init__(self) -> None:
        self._used: dict[Hashable, float] = {}
        self._weights: dict[Hashable, float] = {}
        # The share of the user that was chosen last: no user that asks has a smaller one.
        self._level = 0.0

    def add(self, user: Hashable, weight: float = 1.0) -> None:
        """A user with `weight` 2 gets twice the device time of one with 1, where both ask for all they can."""
        self._used[user] = self._level
        self._weights[user] = weight

    def remove(self, user: Hashable) -> None:
        self._used.pop(user, None)
        self._weights.pop(user, None)

    def asks(self, user: Hashable) -> None:
        """The user had no work, and has some now."""
        self._used[user] = max(self._used[user], self._level - _CREDIT_NS)

    def choose(self, users: Iterable[Hashable]) -> Hashable:
        """Who goes next of those that ask, the first of equals."""
        chosen = min(users, key=lambda user: self._used[user])
        self._level = max(self._level, self._used[chosen])
        return chosen

    def charge(self, user: Hashable, device_ns: int) -> None:
        """The user has had, or is expected to take, so much device time; negative corrects an expectation."""
        if user in self._used:
            self._used[user] += device_ns / self._weights[user]
