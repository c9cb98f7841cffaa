"""The recipe of CONTRIBUTING.md for a batching rule: an instance that wants its batches in multiples of four rows."""

from collections.abc import Iterable

from tutti.core.types import Call, InferRequest, settle
from tutti.observing.statistics import ModelStatistics
from tutti.repository.policies import BatchingPolicy
from tutti.scheduling.batching import BatchQueue
from tutti.scheduling.cost import Costs
from tutti.scheduling.scheduler import Scheduler


def in_fours(calls: Iterable[Call], limit: int) -> int:
    """The rule: as many rows of the calls that come first as make whole fours, all of them where they are fewer."""
    total, most = 0, 0
    for call in calls:
        total += call.rows
        if total > limit:
            break
        most = total if total % 4 == 0 else most
    return most or limit


class FourInstance:
    """Executes nothing: it notes the sizes of its batches."""

    rank = 0

    def __init__(self) -> None:
        self.costs = Costs()
        self.cut = in_fours
        self.sizes: list[int] = []
        self.executing: list[Call] = []

    def ahead_ns(self, at_ns: int) -> int:
        return 0

    def start(self, batch: list[Call]) -> None:
        self.sizes.append(sum(call.rows for call in batch))
        self.executing = batch

    def close(self) -> None: ...


class Sink:
    def settle(self, calls: list[Call]) -> None: ...


def calls(rows: Iterable[int]) -> list[Call]:
    made = [Call(InferRequest("m", {}), Sink()) for _ in rows]  # type: ignore[arg-type]
    for call, size in zip(made, rows, strict=True):
        call.rows = size
    return made


def batches(instance: FourInstance, rows: list[int]) -> list[int]:
    """The sizes of what follows a first request, with `rows` waiting behind it."""
    queue = BatchQueue(BatchingPolicy(max_batch_size=16), 1000)
    scheduler = Scheduler("m", queue, ModelStatistics(), lambda *_: None)
    scheduler.add(instance)
    scheduler(calls([1]))
    scheduler(calls(rows))
    while instance.executing:
        done, instance.executing = instance.executing, []
        settle(done)
        scheduler.release(instance)
    return instance.sizes[1:]


def test_batches_end_where_the_rule_says() -> None:
    assert batches(FourInstance(), [1] * 7) == [4, 3], "what is left is not held back"
    assert batches(FourInstance(), [3, 1, 2, 2, 3]) == [8, 3]
    assert batches(FourInstance(), [1] * 40) == [16, 16, 8], "no more than the model takes at once"


def test_without_the_rule_batches_are_as_large_as_they_can_be() -> None:
    plain = FourInstance()
    del plain.cut
    assert batches(plain, [1] * 7) == [7]
