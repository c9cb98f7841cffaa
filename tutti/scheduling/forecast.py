"""What calls that come now may expect of what is before them, and the refusal of those that could not end in time."""

from collections.abc import Hashable, Sequence

from tutti.core.errors import DeadlineExceeded, InferError, TooLate
from tutti.core.types import Call
from tutti.scheduling.cost import Costs


class Forecast:
    """What calls that come now may expect: how long until all before them, and they, have been executed."""

    def __init__(self, at_ns: int, instances: Sequence[tuple[int, Costs]], batch_rows: int) -> None:
        """`instances` are (when it is expected to be free, 0 where it is; its costs)."""
        self.now_ns = at_ns
        self._instances = instances
        self._batch_rows = batch_rows
        self._free_in_ns = min((max(0, until_ns - at_ns) for until_ns, _ in instances), default=0)
        self._is_idle = any(not until_ns for until_ns, _ in instances)
        self._known: dict[tuple[Hashable, int], tuple[float, int]] = {}

    def needed_ns(self, call: Call, rows_ahead: int) -> int:
        """0 where an instance is idle and nothing waits: then a call is tried whatever is known, and teaches."""
        if self._is_idle and not rows_ahead:
            return 0
        rows = rows_ahead + call.rows
        batches_before, rest = divmod(rows - 1, self._batch_rows)
        last_rows = self._batch_rows if batches_before else rest + 1
        known = self._known.get((call.key, last_rows))
        if known is None:
            known = self._known[call.key, last_rows] = self._learned(call.key, last_rows)
        round_ns, tail_ns = known
        return int(self._free_in_ns + batches_before * round_ns) + tail_ns

    def _learned(self, key: Hashable, rows: int) -> tuple[float, int]:
        """(time per full batch with all instances at work, the tail of one execution of `rows` rows)."""
        models = [costs.of(key) for _, costs in self._instances]
        means = [mean for model in models if (mean := model.mean_ns(self._batch_rows))]
        round_ns = 1 / sum(1 / mean for mean in means) if means else 0.0
        return round_ns, min((model.tail_ns(rows) for model in models), default=0)


def too_late(name: str, call: Call, at_ns: int, needed_ns: int) -> InferError:
    """Why a call that came now, and needs so long, is refused."""
    left_ms = (call.deadline_ns - at_ns) / 1e6
    if left_ms <= 0:
        return DeadlineExceeded(f"model '{name}': the request's deadline had passed when it came")
    return TooLate(
        f"model '{name}': cannot finish in time: {left_ms:.0f} ms are left and about {needed_ns / 1e6:.0f} ms needed; "
        "the request was refused, try again later"
    )
