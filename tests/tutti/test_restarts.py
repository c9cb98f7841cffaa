import pytest

from tutti.app.restarts import DEVICE_FAILED, MAX_DELAY_S, STEADY_S, Again, End, Ended, Restarts

LOST = "device cuda:0 has failed: illegal access"


@pytest.mark.parametrize(("status", "shown"), [(1, 1), (2, 2), (-11, 139), (-9, 137)])
def test_a_first_start_that_fails_ends_the_server(status: int, shown: int) -> None:
    assert Restarts().after(Ended(status)) == End(shown)


def test_one_that_ends_as_asked_ends_the_server() -> None:
    restarts = Restarts()
    assert restarts.after(Ended(0)) == End(0)
    restarts.after(Ended(-9, ready_s=5))
    assert restarts.after(Ended(0)) == End(0)


def test_a_failed_device_is_no_mistake_even_at_the_first_start() -> None:
    assert Restarts().after(Ended(DEVICE_FAILED)) == Again("a device has failed", 1, 1)
    assert Restarts().after(Ended(-9, LOST)) == Again(LOST, 1, 1)


def test_what_has_served_is_replaced_with_the_reason() -> None:
    assert Restarts().after(Ended(-11, ready_s=5)) == Again("it was killed by SIGSEGV", 1, 1)
    assert Restarts().after(Ended(3, ready_s=5)) == Again("it ended with status 3", 1, 1)
    assert Restarts().after(Ended(-9, LOST, 5)) == Again(LOST, 1, 1), "not the kill that followed"
    assert Restarts().after(Ended(-64, ready_s=5)) == Again("it was killed by SIGRTMAX", 1, 1)
    assert Restarts().after(Ended(-50, ready_s=5)) == Again("it was killed by signal 50", 1, 1)


def test_a_later_start_that_fails_is_tried_again() -> None:
    restarts = Restarts()
    restarts.after(Ended(-9, ready_s=5))
    assert restarts.after(Ended(1)) == Again("it ended with status 1", 2, 2)


def test_one_that_fails_again_and_again_is_given_longer_and_longer() -> None:
    restarts = Restarts()
    delays = [restarts.after(Ended(DEVICE_FAILED, LOST, 0.5)).delay_s for _ in range(7)]  # type: ignore[union-attr]
    assert delays == [1, 2, 4, 8, 16, 30, 30]
    assert max(delays) == MAX_DELAY_S
    assert restarts.after(Ended(DEVICE_FAILED, LOST, STEADY_S)) == Again(LOST, 0, 8), "it has served well"
    assert restarts.after(Ended(DEVICE_FAILED, LOST, 0.5)) == Again(LOST, 1, 9)
