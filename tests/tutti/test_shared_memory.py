"""Registered regions of both kinds: names, bounds, and use while they are unregistered."""

import os
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.devices.machine import Allocation, Machine, Process
from tests.serving import wait_until
from tutti.core.errors import AlreadyExists, InferError, Internal, InvalidArgument, NotFound, Unavailable, Unsupported
from tutti.core.types import SharedRegion
from tutti.devices.ipc import HANDLE_BYTES, ForeignMemory
from tutti.frontends.v2 import shared_memory
from tutti.frontends.v2.shared_memory import CudaRegion, SharedMemory, SystemRegion

SIZE = 256


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def client(machine: Machine) -> Process:
    return machine.process()


@pytest.fixture
def server(machine: Machine) -> Process:
    return machine.process()


@pytest.fixture
def regions(server: Process) -> Iterator[SharedMemory]:
    made = SharedMemory(True, server)
    yield made
    made.close()


@pytest.fixture
def key() -> Iterator[str]:
    """Of a segment with SIZE bytes."""
    import _posixshmem

    name = f"/tutti_regions_{uuid.uuid4().hex[:10]}"
    descriptor = _posixshmem.shm_open(name, os.O_CREAT | os.O_RDWR, mode=0o600)
    os.write(descriptor, bytes(range(SIZE)))
    yield name
    os.close(descriptor)
    _posixshmem.shm_unlink(name)


def filled(client: Process, size: int = SIZE) -> Allocation:
    made = client.allocate(size)
    made.set(bytes(n % 256 for n in range(size)))
    return made


def test_a_request_reads_and_writes_by_name_whatever_the_kind(regions: SharedMemory, client: Process, key: str) -> None:
    regions.register("s", key, 16, SIZE - 16)
    regions.register_cuda("c", filled(client).handle, 1, SIZE)
    assert bytes(regions.read(SharedRegion("s", 0, 4))) == bytes([16, 17, 18, 19])
    assert bytes(regions.read(SharedRegion("c", 16, 4))) == bytes([16, 17, 18, 19])
    for name in ("s", "c"):
        regions.write(SharedRegion(name, 8, 4), memoryview(b"abc"))
        assert bytes(regions.read(SharedRegion(name, 7, 5))) == bytes(
            [23 if name == "s" else 7, *b"abc", 27 if name == "s" else 11]
        )
        assert bytes(regions.read(SharedRegion(name, 3, 0))) == b""


def test_a_region_tells_whether_it_is_on_a_device(regions: SharedMemory, client: Process, key: str) -> None:
    regions.register("s", key, 0, SIZE)
    regions.register_cuda("c", filled(client).handle, 1, SIZE - 1)
    with regions.borrow(SharedRegion("s", 0, 4)) as host, regions.borrow(SharedRegion("c", 4, 4)) as device:
        assert host.memory is None
        assert isinstance(device.memory, ForeignMemory)
        assert (device.memory.device, device.memory.size, device.stretch.offset) == (1, SIZE, 4)


def test_names_are_one_space_over_both_kinds(regions: SharedMemory, client: Process, key: str) -> None:
    handle = filled(client).handle
    regions.register("s", key, 0, SIZE)
    regions.register_cuda("c", handle, 0, SIZE)
    for taken in ("s", "c"):
        with pytest.raises(AlreadyExists, match=f"'{taken}' already in manager"):
            regions.register(taken, key, 0, SIZE)
        with pytest.raises(AlreadyExists, match=f"'{taken}' already in manager"):
            regions.register_cuda(taken, handle, 0, SIZE)
    assert regions.status() == [SystemRegion("s", key, 0, SIZE)]
    assert regions.cuda_status() == regions.cuda_status("c") == [CudaRegion("c", 0, SIZE)]
    with pytest.raises(NotFound, match="'c' is registered as CUDA shared memory, not system shared memory"):
        regions.status("c")
    with pytest.raises(NotFound, match="'s' is registered as system shared memory, not CUDA shared memory"):
        regions.cuda_status("s")
    with pytest.raises(NotFound, match="Unable to find cuda shared memory region: 'x'"):
        regions.cuda_status("x")


def test_unregistering_is_of_one_kind(regions: SharedMemory, client: Process, key: str) -> None:
    allocation = filled(client)
    regions.register("s", key, 0, SIZE)
    for name in ("c", "d"):
        regions.register_cuda(name, allocation.handle, 0, SIZE)
    regions.unregister("c")
    regions.unregister_cuda("s")
    regions.unregister_cuda("nowhere")
    assert len(regions.status()) + len(regions.cuda_status()) == 3
    regions.unregister()
    assert [region.name for region in regions.cuda_status()] == ["c", "d"]
    regions.unregister_cuda("c")
    with pytest.raises(NotFound, match="'c'"):
        regions.read(SharedRegion("c", 0, 1))
    assert bytes(regions.read(SharedRegion("d", 1, 1))) == b"\x01", "the other opening of the same memory stays"
    regions.unregister_cuda()
    allocation.free()  # asserts that nobody has it open


def refused(register: Callable[[], None]) -> str:
    with pytest.raises(InvalidArgument) as caught:
        register()
    return caught.value.message


def test_what_cannot_be_registered(regions: SharedMemory, client: Process, server: Process) -> None:
    allocation = filled(client)
    handle = allocation.handle
    for length in (0, 1, HANDLE_BYTES - 1, HANDLE_BYTES + 1, 1000):
        message = refused(lambda length=length: regions.register_cuda("r", bytes(length), 0, 1))
        assert f"expected 64 bytes, got {length}" in message
    for size in (0, -1):
        assert "byte_size of 1 or more" in refused(lambda size=size: regions.register_cuda("r", handle, 0, size))
    for size in (SIZE + 1, 2**63, 2**64 - 1):
        message = refused(lambda size=size: regions.register_cuda("r", handle, 0, size))
        assert f"'r': invalid args: byte_size {size} is more than its allocation has, which is {SIZE}" in message
    for device in (-1, 2, 2**40):
        message = refused(lambda device=device: regions.register_cuda("r", handle, device, 1))
        assert f"'r': device_id {device}: expected 0 to 1" in message
    for unknown in (bytes(64), server.allocate(8).handle):  # nobody's, and the server's own
        assert "'r': the handle cannot be opened" in refused(
            lambda unknown=unknown: regions.register_cuda("r", unknown, 0, 1)
        )
    for name in ("", "a\nb", "x" * 256):
        assert "expected a name" in refused(lambda name=name: regions.register_cuda(name, handle, 0, 1))
    assert not regions.cuda_status()
    allocation.free()  # nothing that was refused is open


def test_a_name_that_is_taken_while_the_memory_is_opened(
    regions: SharedMemory, client: Process, server: Process, key: str
) -> None:
    allocation = filled(client)
    server.before_open = lambda: regions.register("r", key, 0, SIZE)
    with pytest.raises(AlreadyExists, match="'r'"):
        regions.register_cuda("r", allocation.handle, 0, SIZE)
    assert [region.name for region in regions.status()] == ["r"]
    allocation.free()


def test_each_kind_is_off_unless_allowed(client: Process, server: Process, key: str) -> None:
    handle = filled(client).handle
    with pytest.raises(Unsupported, match="--allow-client-cuda-shm"):
        SharedMemory(True).register_cuda("r", handle, 0, 1)
    with pytest.raises(Unsupported, match="--allow-client-shm"):
        SharedMemory(False, server).register("r", key, 0, 1)
    with pytest.raises(Unsupported, match="shared memory is off"):
        SharedMemory().read(SharedRegion("r", 0, 1))
    for allowed in (SharedMemory(True), SharedMemory(False, server)):
        with pytest.raises(NotFound):
            allowed.check(SharedRegion("r", 0, 1))


def test_no_offset_and_size_reach_outside(regions: SharedMemory, client: Process, key: str) -> None:
    """Seeded stretches against the obvious rule; the machine fails the test for any access outside."""
    rng = random.Random(17)
    registered = SIZE - 8
    allocation = filled(client)
    regions.register("s", key, 8, registered)
    regions.register_cuda("c", allocation.handle, 0, registered)
    edges = [0, 1, registered - 1, registered, registered + 1, SIZE, 2**31, 2**32, 2**62, 2**63, 2**64, 2**64 - SIZE]
    inside = 0
    for _ in range(4000):
        offset, size = (
            rng.choice(edges) * rng.choice((1, 1, 1, -1)) + rng.randint(-2, 2)
            if rng.random() < 0.4
            else rng.randrange(SIZE)
            for _ in range(2)
        )
        fits = offset >= 0 and size >= 0 and offset + size <= registered
        inside += fits
        for name, start in (("s", 8), ("c", 0)):
            stretch = SharedRegion(name, offset, size)
            if fits:
                regions.check(stretch)
                before = bytes((start + offset + n) % 256 for n in range(size))
                assert bytes(regions.read(stretch)) == before
                regions.write(stretch, before)
                with pytest.raises(InvalidArgument, match="do not fit"):
                    regions.write(stretch, before + b"x")
                continue
            for use in (regions.check, regions.read, regions.borrow, lambda stretch: regions.write(stretch, b"")):
                with pytest.raises(InvalidArgument, match="Invalid offset \\+ byte size for shared memory region"):
                    use(stretch)
    assert 400 < inside < 3600
    assert allocation.get() == bytes(range(SIZE))
    assert allocation.is_intact()


def test_unregistering_waits_for_a_copy(regions: SharedMemory, client: Process, server: Process) -> None:
    allocation = filled(client)
    regions.register_cuda("r", allocation.handle, 0, SIZE)
    is_copying, may_copy = threading.Event(), threading.Event()

    def before_copy() -> None:
        is_copying.set()
        assert may_copy.wait(20)

    server.before_copy = before_copy
    with ThreadPoolExecutor(2) as pool:
        copied = pool.submit(regions.read, SharedRegion("r", 0, SIZE))
        assert is_copying.wait(20)
        ended = pool.submit(regions.unregister_cuda, "r")
        wait_until(lambda: not regions.cuda_status())  # no new user finds it
        with pytest.raises(NotFound):
            regions.read(SharedRegion("r", 0, 1))
        assert allocation.openings[server] == 1
        assert not ended.done()
        may_copy.set()
        ended.result(20)
        allocation.free()  # from now on its owner may
        assert bytes(copied.result(20)) == bytes(range(SIZE))


def test_unregistering_says_when_the_memory_is_still_in_use(
    regions: SharedMemory, client: Process, server: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "UNREGISTER_TIMEOUT_S", 0.01)
    allocation = filled(client)
    regions.register_cuda("r", allocation.handle, 0, SIZE)
    lease = regions.borrow(SharedRegion("r", 0, SIZE))
    with pytest.raises(Unavailable, match="'r' is unregistered, but still in use"):
        regions.unregister_cuda("r")
    regions.register_cuda("r", allocation.handle, 0, 1)  # the name is free at once
    assert lease.memory is not None and bytes(server.read(lease.memory, 0, SIZE)) == bytes(range(SIZE))
    regions.unregister_cuda("r")
    lease.give_back()
    lease.give_back()
    allocation.free()


def test_many_threads_register_use_and_unregister(regions: SharedMemory, client: Process) -> None:
    allocations = [filled(client) for _ in range(3)]

    def work(seed: int) -> int:
        rng = random.Random(seed)
        done = 0
        for _ in range(300):
            name, size = f"r{rng.randrange(4)}", rng.randrange(SIZE)
            try:
                rng.choice(
                    (
                        lambda: regions.register_cuda(name, rng.choice(allocations).handle, 0, SIZE),  # noqa: B023
                        lambda: regions.unregister_cuda(name if rng.random() < 0.9 else ""),  # noqa: B023
                        lambda: regions.read(SharedRegion(name, SIZE - size, size)),  # noqa: B023
                        lambda: regions.write(SharedRegion(name, 0, size), bytes(range(size))),  # noqa: B023
                    )
                )()
                done += 1
            except (NotFound, AlreadyExists):
                continue
        return done

    with ThreadPoolExecutor(4) as pool:
        assert min(pool.map(work, range(8))) > 20
    regions.unregister_cuda()
    for allocation in allocations:
        allocation.free()
        assert allocation.is_intact()


class Broken(Process):
    """Its device fails after it was opened."""

    def read(self, memory: ForeignMemory, offset: int, size: int) -> bytearray:
        raise Internal("cuda:0: cuMemcpyDtoHAsync: CUDA_ERROR_ILLEGAL_ADDRESS (700)")

    def close(self, memory: ForeignMemory) -> None:
        raise Internal("cuda:0: cuIpcCloseMemHandle: CUDA_ERROR_ILLEGAL_ADDRESS (700)")


def test_failures_of_the_device_name_the_region(machine: Machine, client: Process) -> None:
    regions = SharedMemory(devices=Broken(machine))
    for name in ("a", "b"):
        regions.register_cuda(name, filled(client).handle, 0, SIZE)
    with pytest.raises(Internal, match="region 'a': cuda:0: cuMemcpyDtoHAsync: CUDA_ERROR_ILLEGAL_ADDRESS"):
        regions.read(SharedRegion("a", 0, 1))
    with pytest.raises(Internal, match=r"region 'a': cuda:0: cuIpcCloseMemHandle.*region 'b': cuda:0"):
        regions.unregister_cuda()
    assert not regions.cuda_status()
    regions.close()


def test_so_many_regions_can_be_registered(regions: SharedMemory, client: Process, key: str) -> None:
    handle = filled(client).handle
    for n in range(256):
        if n % 2:
            regions.register(f"r{n}", key, 0, SIZE)
        else:
            regions.register_cuda(f"r{n}", handle, 0, SIZE)
    for more in (lambda: regions.register("x", key, 0, 1), lambda: regions.register_cuda("x", handle, 0, 1)):
        with pytest.raises(InferError, match="at most 256"):
            more()
