"""What CudaIpc has to do, each as a process of its own: `python -m tests.devices.ipc_scenarios NAME`.

The processes run over whatever libcuda.so.1 the system finds first: a real driver's, or the one of libcuda.c.
"""

import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.devices.exporter import Exporter, Memory, exporting
from tutti.core.errors import InferError, Internal, InvalidArgument, Unavailable, Unsupported
from tutti.devices.ipc import CudaIpc, ForeignMemory

# The smallest block of its own that a device gives.
SIZE = 2 * 1024 * 1024
CONTENT = bytes(range(256)) * (SIZE // 256)


def message(kind: type[InferError], work: object, *arguments: object) -> str:
    """The text of the error of this very kind that the call raises."""
    with pytest.raises(InferError) as caught:
        work(*arguments)  # type: ignore[operator]
    assert type(caught.value) is kind, repr(caught.value)
    return caught.value.message


def reads_and_writes(exporter: Exporter) -> None:
    ipc = CudaIpc()
    handle = exporter.allocate(CONTENT)
    memory = ipc.open(handle, 0)
    assert (memory.device, memory.size) == (0, SIZE)
    for offset, size in ((0, SIZE), (0, 1), (7, 1000), (SIZE - 1, 1), (SIZE, 0), (0, 0)):
        copy = ipc.read(memory, offset, size)
        assert type(copy) is bytearray and copy == CONTENT[offset : offset + size]
    expected = bytearray(CONTENT)
    for offset, data in ((0, b"ab"), (5, memoryview(b"cde")[1:]), (SIZE - 1, bytearray(b"f")), (SIZE, b"")):
        ipc.write(memory, offset, data)
        expected[offset : offset + len(data)] = data
    assert exporter.get(handle, SIZE) == expected, "the other process sees it at once"
    exporter.set(handle, b"new")
    assert ipc.read(memory, 0, 4) == b"new" + expected[3:4]
    ipc.close(memory)
    exporter.free(handle)


def opens_count(exporter: Exporter) -> None:
    ipc = CudaIpc()
    handle = exporter.allocate(CONTENT)
    first, second = ipc.open(handle, 0), ipc.open(handle, 0)
    assert first == second
    ipc.close(first)
    assert ipc.read(second, 0, 16) == CONTENT[:16]
    ipc.close(second)
    again = ipc.open(handle, 0)
    assert ipc.read(again, 1, 1) == CONTENT[1:2]
    ipc.close(again)


def refuses(exporter: Exporter) -> None:
    from cuda.bindings import driver

    ipc = CudaIpc()
    handle = exporter.allocate(CONTENT)
    count = driver.cuDeviceGetCount()[1] if int(driver.cuInit(0)[0]) == 0 else 0
    for device in (-1, count, 2**31, -(2**63)):
        said = message(InvalidArgument, ipc.open, handle, device)
        assert f"device_id {device}: expected 0 to {count - 1}" in said, said
    for unknown in (bytes(64), b"\xff" * 64):
        said = message(InvalidArgument, ipc.open, unknown, 0)
        assert "the handle cannot be opened on cuda:0: cuIpcOpenMemHandle: CUDA_ERROR_" in said, said
    own = Memory()
    said = message(InvalidArgument, ipc.open, own.alloc(str(SIZE), "0"), 0)
    assert "the handle cannot be opened on cuda:0: cuIpcOpenMemHandle: CUDA_ERROR_" in said, said
    own.close()
    memory = ipc.open(handle, 0)
    assert ipc.read(memory, 2, 2) == CONTENT[2:4], "the device still works"
    ipc.close(memory)


def serves_threads(exporter: Exporter) -> None:
    """Many threads, each in its own stretch of one allocation."""
    ipc = CudaIpc()
    handle = exporter.allocate(bytes(SIZE))
    memory = ipc.open(handle, 0)

    def work(number: int) -> None:
        for turn in range(50):
            data = bytes([number, turn]) * 512
            ipc.write(memory, number * 1024, data)
            assert ipc.read(memory, number * 1024, 1024) == data
            other = ipc.open(handle, 0)
            ipc.close(other)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert exporter.get(handle, 2048) == bytes([0, 49]) * 512 + bytes([1, 49]) * 512


# The following look into the driver of libcuda.c.


def gives_way_to_other_threads(exporter: Exporter) -> None:
    """A copy waits for what another thread does, which does nothing if the interpreter's lock is held."""
    fake = ctypes.CDLL("libcuda.so.1")
    ipc = CudaIpc()
    memory = ipc.open(exporter.allocate(CONTENT), 0)
    fake.fake_shut_gate(1)
    with ThreadPoolExecutor(1) as pool:
        copied = pool.submit(ipc.read, memory, 0, 4)
        while not fake.fake_is_waiting():
            assert not copied.done(), copied.result()
        fake.fake_shut_gate(0)
        assert copied.result() == CONTENT[:4]


def refuses_what_is_freed(exporter: Exporter) -> None:
    ipc = CudaIpc()
    handle = exporter.allocate(CONTENT)
    ipc.close(ipc.open(handle, 0))
    exporter.free(handle)
    assert "the handle cannot be opened on cuda:0" in message(InvalidArgument, ipc.open, handle, 0)


def leaves_the_thread_as_it_was(exporter: Exporter) -> None:
    fake = ctypes.CDLL("libcuda.so.1")
    ipc = CudaIpc()
    handle = exporter.allocate(CONTENT, 1)

    def state() -> tuple[int, int]:
        return fake.fake_depth(), fake.fake_mode()

    for unknown in (bytes(64), b"\xff" * 64):
        message(InvalidArgument, ipc.open, unknown, 1)
        assert state() == (0, 0)
    memory = ipc.open(handle, 1)
    ipc.write(memory, 0, ipc.read(memory, 0, 8))
    assert message(Internal, ipc.read, ForeignMemory(1, 4096, 8), 0, 8).startswith("cuda:1: cuMemcpyDtoHAsync: ")
    assert state() == (0, 0)
    assert fake.fake_openings() == 1
    ipc.close(memory)
    assert (fake.fake_openings(), fake.fake_retained()) == (0, 1), "only the context that was used"
    assert state() == (0, 0)


def names_what_failed(exporter: Exporter) -> None:
    fake = ctypes.CDLL("libcuda.so.1")
    libc = ctypes.CDLL(None)
    handle = exporter.allocate(CONTENT)

    def failing(call: str, code: int) -> None:
        """The C library's environment, which the driver reads; os.environ is Python's copy."""
        libc.setenv(b"FAKE_CUDA_FAIL", f"{call}:{code}".encode(), 1)

    for call, code, kind, said in (
        ("cuDevicePrimaryCtxRetain", 2, Unavailable, "cuda:0: cuDevicePrimaryCtxRetain: CUDA_ERROR_OUT_OF_MEMORY (2)"),
        ("cuStreamCreate", 700, Internal, "cuda:0: cuStreamCreate: CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
        ("cuIpcOpenMemHandle", 2, Unavailable, "cuda:0: cuIpcOpenMemHandle: CUDA_ERROR_OUT_OF_MEMORY (2)"),
        ("cuIpcOpenMemHandle", 700, Internal, "cuda:0: cuIpcOpenMemHandle: CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
        ("cuIpcOpenMemHandle", 801, InvalidArgument, "cuIpcOpenMemHandle: CUDA_ERROR_NOT_SUPPORTED (801)"),
        ("cuMemGetAddressRange", 500, Internal, "cuda:0: cuMemGetAddressRange: CUDA_ERROR_NOT_FOUND (500)"),
    ):
        failing(call, code)
        began = fake.fake_retained()
        got = message(kind, CudaIpc().open, handle, 0)
        assert said in got, got
        assert fake.fake_openings() == 0 and fake.fake_depth() == 0
        assert fake.fake_retained() == began + (call in ("cuIpcOpenMemHandle", "cuMemGetAddressRange"))
    failing("", 0)
    ipc = CudaIpc()
    memory = ipc.open(handle, 0)
    for call, work, arguments in (
        ("cuMemcpyDtoHAsync", ipc.read, (memory, 0, 8)),
        ("cuMemcpyHtoDAsync", ipc.write, (memory, 0, b"x")),
        ("cuStreamSynchronize", ipc.read, (memory, 0, 8)),
        ("cuIpcCloseMemHandle", ipc.close, (memory,)),
    ):
        failing(call, 719)
        assert message(Internal, work, *arguments) == f"cuda:0: {call}: CUDA_ERROR_LAUNCH_FAILED (719)"


def says_that_there_is_no_device(_: object) -> None:
    """With FAKE_CUDA_DEVICES=0, as a machine whose driver shows none."""
    said = message(Unsupported, CudaIpc().open, bytes(64), 0)
    assert said == "no CUDA device can be used: cuInit: CUDA_ERROR_NO_DEVICE (100)", said


def main(name: str) -> None:
    scenario = globals()[name]
    if os.environ.get("FAKE_CUDA_DEVICES") == "0":
        scenario(None)
        return
    with exporting() as exporter:
        scenario(exporter)


if __name__ == "__main__":
    main(sys.argv[1])
