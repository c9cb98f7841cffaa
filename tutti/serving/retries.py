"""When a poll tries again what failed. Pure."""

# So many polls, at most, pass between two tries.
MOST_POLLS = 16


class Retries:
    """When a poll is to try again what failed: after one poll, two, four, and so on."""

    def __init__(self) -> None:
        self.wait = 0
        self._next = 1

    def failed(self) -> None:
        self.wait = self._next - 1
        self._next = min(2 * self._next, MOST_POLLS)

    def is_due(self) -> bool:
        self.wait -= 1
        return self.wait < 0
