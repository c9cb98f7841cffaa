"""What answers say of their requests: ids that may be headers, and where the time went."""

import pytest

from tutti.core.types import Spent, Times
from tutti.ensembles.explain import StepsTimes
from tutti.frontends.http import answer_headers
from tutti.observing.statistics import BatchTimes

MS = 1_000_000


@pytest.mark.parametrize(
    ("sent", "is_taken"),
    [
        (b"a", True), (b"Root=1-67891233-abcdef;Parent=53995c", True), (b"x" * 128, True), (b"x" * 129, False),
        (b"", False), (b"a b", False), (b"a\nb", False), (b"a\x7f", False), (b"\xff", False), (b"a\n", False),
    ],
)  # fmt: skip
def test_an_id_comes_back_where_it_may_be_a_header(sent: bytes, is_taken: bool) -> None:
    assert answer_headers.id_of(sent) == (sent if is_taken else b"")


def test_a_request_has_its_own_id_or_a_new_one() -> None:
    assert answer_headers.request_id("own") == b"own"
    made = {answer_headers.request_id(own) for own in ("", "", "two words", "é", "\ud800", "x" * 200)}
    assert len(made) == 6
    assert all(answer_headers.id_of(one) for one in made)


def test_ids_of_a_batch_are_its_own() -> None:
    made = [answer_headers.new_ids() + answer_headers.place(number) for _ in range(3) for number in range(1000)]
    assert len(set(made)) == len(made)
    assert all(one.endswith(b"\r\n\r\n") and answer_headers.id_of(one[:-4]) for one in made)


def steps() -> StepsTimes:
    times = StepsTimes()
    times.add("a", BatchTimes(2 * MS, 2 * MS, 5 * MS, 5 * MS, 3), 1 * MS)
    times.add("b", Spent(1 * MS, 2 * MS), 6 * MS)
    times.add("a", BatchTimes(6 * MS, 6 * MS, 7 * MS, 7 * MS, 1), 6 * MS)
    return times


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        (None, "total;dur=9.00"),
        (BatchTimes(3 * MS, 4 * MS, 5 * MS, 6 * MS), "queue;dur=2.00, compute;dur=3.00, total;dur=9.00"),
        (Spent(123_456, 7_000, 4), "queue;dur=0.12, compute;dur=0.00, total;dur=9.00"),
        (Spent(is_cached=True), "cache;desc=hit, total;dur=9.00"),
        (steps(), "queue;dur=2.00, compute;dur=6.00, total;dur=9.00"),
    ],
)
def test_timing_names_what_is_known(times: Times | None, shown: str) -> None:
    assert answer_headers.timing(1 * MS, times, 10 * MS) == shown.encode()


def test_a_call_that_came_nowhere_has_taken_no_time() -> None:
    assert answer_headers.timing(0, None, 10 * MS) == b"total;dur=0.00"


def test_a_step_that_was_executed_twice_is_told_once() -> None:
    assert steps().spent(0) == Spent(2 * MS, 6 * MS, steps=(("a", 1 * MS, 4 * MS, 3), ("b", 1 * MS, 2 * MS, 0)))


class _Asked:
    """Times that count who asks."""

    asked = 0

    def spent(self, arrived_ns: int) -> Spent:
        self.asked += 1
        return Spent(MS, MS)


def test_what_many_requests_share_is_added_up_once() -> None:
    """A frame's requests all ask, for their answers' headers and for the log, and each of many pieces would count."""
    times, piece = StepsTimes(), _Asked()
    assert times.spent(0) == Spent()
    for count in (1, 2, 3):
        times.add("a", piece, 0)
        before = piece.asked
        told = [times.spent(arrived_ns) for arrived_ns in range(10)]
        assert set(told) == {Spent(count * MS, count * MS, steps=(("a", count * MS, count * MS, 0),))}
        assert piece.asked - before == count


def test_times_differ_by_batch_though_they_are_equal() -> None:
    one, two = BatchTimes(1, 2, 3, 4), BatchTimes(1, 2, 3, 4)
    assert len({one, two, steps(), steps()}) == 4  # they are keys of what a batch's answers share
