"""Whether it pays to wait for the clients that were answered last, rather than to begin without them. Pure."""

from tutti.scheduling.cost import LatencyModel


class Returns:
    """How soon clients that have been answered ask again: those that wait for an answer before they do are expected.

    Where an execution costs much whatever its size, one that begins just before they are back is followed by another
    one for them, and so on: half the work in each, for ever. It can be quicker to wait for them.
    """

    MIN_CHANCE = 0.75
    _MOST = 0.9
    _WEIGHT = 1 / 8

    def __init__(self) -> None:
        self.chance = 0.0
        self.delay_ns = 0.0
        self._answered_ns = 0
        self._answered_rows = 0
        self._arrived_rows = 0
        self._longest_ns = 0
        self._is_known = True

    def answered(self, now_ns: int, rows: int, took_ns: int) -> None:
        """A batch of `rows` rows, which took `took_ns` to execute, gets its answers."""
        if not self._is_known:
            self.chance -= self.chance * self._WEIGHT  # most of the last one's did not come back
        self._answered_ns, self._answered_rows, self._arrived_rows, self._is_known = now_ns, rows, 0, False
        self._longest_ns = took_ns

    def arrived(self, now_ns: int, rows: int) -> None:
        self._arrived_rows += rows
        if self._is_known or self._arrived_rows < self._MOST * self._answered_rows:
            return
        self._is_known = True
        delay_ns = now_ns - self._answered_ns
        if delay_ns > self._longest_ns:  # these were not waited for
            self.chance -= self.chance * self._WEIGHT
            return
        self.delay_ns += (delay_ns - self.delay_ns) * (self._WEIGHT if self.delay_ns else 1.0)
        self.chance += (1 - self.chance) * self._WEIGHT

    def coming(self, most: int) -> int:
        """Rows that are still expected, of at most `most`."""
        return max(0, min(self._answered_rows - self._arrived_rows, most))

    def pays(self, rows: int, executing: int, limit: int, idle_ns: int, model: LatencyModel) -> bool:
        """Whether to wait for the answers of what executes, and for those clients, rather than to begin with `rows`.

        Otherwise the two groups take turns. Together they are one batch, before which the device idles for `idle_ns`
        and as long as clients take to ask again.
        """
        first, second = (rows, executing) if rows else (1, executing - 1)
        together = first + second
        if self.chance < self.MIN_CHANCE or second < 1 or first >= limit or together > limit:
            return False
        return model.mean_ns(together) + idle_ns + self.delay_ns < model.mean_ns(first) + model.mean_ns(second)

    def wait_ns(self, now_ns: int, rows: int, limit: int, model: LatencyModel) -> int:
        """How long to wait for more with `rows` rows at hand, of at most `limit`; 0 where it is quicker not to."""
        coming = self.coming(limit - rows)
        left_ns = self._answered_ns + int(self.delay_ns) - now_ns
        patience_ns = left_ns + int(self.delay_ns) // 2
        if self.chance < self.MIN_CHANCE or coming <= 0 or patience_ns <= 0:
            return 0
        together_ns = model.mean_ns(rows + coming) + max(0, left_ns)
        return patience_ns if (rows + coming) * model.mean_ns(rows) > rows * together_ns else 0
