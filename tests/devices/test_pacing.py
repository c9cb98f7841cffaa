"""When batches are cut, as numbers."""

from tutti.devices.pacing import Lateness, Stages, latest_cut_ns

MS = 1_000_000


def test_a_batch_is_cut_so_that_its_copy_ends_with_the_execution_before_it() -> None:
    cut = latest_cut_ns(Stages(host_ns=MS, copy_ns=2 * MS, execution_ns=9 * MS), 0, 10 * MS)
    assert 6 * MS < cut < 7 * MS


def test_lateness_follows_what_the_device_waited_for() -> None:
    lateness, late_ns = Lateness(), MS // 2
    for _ in range(200):
        lateness.record(max(0, late_ns - lateness.ns), 2 * MS)
    assert 0.9 * late_ns < lateness.ns < 1.1 * late_ns
    for _ in range(2000):
        lateness.record(0, 2 * MS)
    assert lateness.ns == 0


def test_lateness_is_an_execution_at_most() -> None:
    lateness = Lateness()
    for _ in range(100):
        lateness.record(50 * MS, 2 * MS)
    assert lateness.ns == 2 * MS
