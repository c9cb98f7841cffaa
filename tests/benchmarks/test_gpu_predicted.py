"""What the engine would make of a bare loop's times."""

import pytest

from benchmarks.gpu import predicted


def test_full_batches_of_many_clients_are_predicted_at_the_bare_loops_rate() -> None:
    # 0.5 ms and 10 us a row.
    rows = [{"batch": batch, "graph alone ms": 0.5 + 0.01 * batch} for batch in (1, 16, 256)]
    made = predicted.rate(rows, clients=512, request_rows=8, max_rows=256, row_bytes=(1000, 1500))
    assert made == pytest.approx(256 / 3.06e-3, rel=0.05)


def test_one_client_waits_for_its_call_and_the_way() -> None:
    rows = [{"batch": 1, "alone ms": 1.0}, {"batch": 8, "alone ms": 2.0}]
    made = predicted.rate(rows, clients=1, request_rows=8, max_rows=256, row_bytes=(1000, 1500))
    assert made == pytest.approx(8 / 2.45e-3, rel=0.1)


def test_without_times_nothing_is_predicted() -> None:
    assert predicted.rate([{"batch": 1, "alone ms": 1.0}], 1, 8, 256, (1, 1)) == 0.0
