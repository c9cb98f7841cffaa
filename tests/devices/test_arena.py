"""How much pinned memory answers hold, and how much is kept for later."""

import numpy as np

from tutti.devices.arena import Arena
from tutti.devices.simulated import Costs, SimulatedDevice
from tutti.devices.simulated_timeline import Timeline

SIZE = 1 << 19


def test_answers_beyond_the_bound_are_copies_and_give_their_memory_back_at_once() -> None:
    device = SimulatedDevice(Timeline(), Costs())
    arena = Arena(device, owned_bytes=2 * SIZE)
    answers = []
    for number in range(5):
        block = arena.take(SIZE)
        block.array[:] = number
        answers.append(arena.owned(block, SIZE))
    assert arena.owned_bytes() == 2 * SIZE
    assert arena.bytes == device.host_bytes == 3 * SIZE
    assert [int(answer[-1]) for answer in answers] == [0, 1, 2, 3, 4]
    parts = [answer[100:] for answer in answers]
    answers.clear()
    assert arena.owned_bytes() == 2 * SIZE  # parts of them live
    parts.clear()
    assert arena.owned_bytes() == 0


def test_no_more_is_kept_for_later_than_the_bound() -> None:
    device = SimulatedDevice(Timeline(), Costs())
    arena = Arena(device, owned_bytes=2 * SIZE)
    blocks = [arena.take(SIZE) for _ in range(5)]
    for block in blocks:
        arena.give(block)
    assert arena.free_bytes() == 2 * SIZE == arena.bytes == device.host_bytes
    assert arena.used_bytes == 0
    assert arena.take(SIZE) in blocks
    assert arena.used_bytes == SIZE
    arena.close()
    assert arena.bytes == SIZE  # which is still taken


def test_a_small_answer_is_a_copy() -> None:
    arena = Arena(SimulatedDevice(Timeline(), Costs()), owned_bytes=1 << 30)
    block = arena.take(1000)
    block.array[:] = 7
    answer = arena.owned(block, 1000)
    block.array[:] = 8
    assert np.all(answer == 7) and arena.owned_bytes() == 0
