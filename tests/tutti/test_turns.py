"""Turns on a shared device: one at a time, and the one that has had least goes next."""

import threading

from tests.serving import wait_until
from tutti.backends.turns import Device, device


def test_one_name_is_one_device() -> None:
    assert device("cuda:7") is device("cuda:7")
    assert device("cuda:7") is not device("cuda:8")


def test_turns_are_exclusive_and_a_greedy_model_does_not_keep_others_waiting() -> None:
    shared, order, inside = Device(), [], []
    stop = threading.Event()

    def greedy() -> None:
        while not stop.is_set():
            with shared.turn("greedy"):
                inside.append("greedy")
                assert len(inside) == 1
                threading.Event().wait(0.005)
                inside.pop()
                order.append("greedy")

    threads = [threading.Thread(target=greedy) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(order) > 10)
    for _ in range(5):
        before = len(order)
        with shared.turn("modest"):
            inside.append("modest")
            assert len(inside) == 1
            inside.pop()
        assert len(order) - before <= 2, "it waits for the turn that is on, not for all that wait"
    stop.set()
    for thread in threads:
        thread.join(5)


def test_who_comes_back_is_not_owed_what_it_did_not_ask_for() -> None:
    shared = Device()
    with shared.turn("old"):
        threading.Event().wait(0.05)
    with shared.turn("new"):
        threading.Event().wait(0.005)
    with shared.turn("new"):
        pass
    assert shared._used_ns["new"] < shared._used_ns["old"]
    with shared.turn("old"):
        pass
    with shared.turn("new"):
        pass
    assert shared._used_ns["new"] >= shared._used_ns["old"] - 10_000_000
