"""A process with memory on a device, over the driver's API: does what it reads from stdin, one answer a line, in hex.

alloc SIZE DEVICE -> handle    get HANDLE SIZE -> bytes    set HANDLE BYTES -> -    free HANDLE -> -
"""

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Exporter:
    """Such a process, as its parent sees it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def ask(self, *words: object) -> bytes:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the exporting process has died"
        return bytes.fromhex(answer.strip().removeprefix("-"))

    def allocate(self, content: bytes, device: int = 0) -> bytes:
        """The handle of memory with this content."""
        handle = self.ask("alloc", len(content), device)
        self.set(handle, content)
        return handle

    def get(self, handle: bytes, size: int) -> bytes:
        return self.ask("get", handle.hex(), size)

    def set(self, handle: bytes, content: bytes) -> None:
        self.ask("set", handle.hex(), content.hex())

    def free(self, handle: bytes) -> None:
        self.ask("free", handle.hex())


@contextmanager
def exporting() -> Iterator[Exporter]:
    """An exporter with this process's environment."""
    command = [sys.executable, "-m", "tests.devices.exporter"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Exporter(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(20)


class Memory:
    """What this process has on devices; handles and contents as hexadecimal text."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._addresses: dict[bytes, tuple[int, int]] = {}
        self._contexts: dict[int, object] = {}
        self._call("cuInit", 0)

    def _call(self, function: str, *arguments: object) -> object:
        code, *results = getattr(self._driver, function)(*arguments)
        assert not int(code), f"{function}: {code}"
        return results[0] if results else None

    def _enter(self, device: int) -> object:
        """A stream of the device, whose context is this thread's from now on."""
        if device not in self._contexts:
            context = self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", device))
            self._call("cuCtxPushCurrent", context)
            mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            self._call("cuThreadExchangeStreamCaptureMode", mode)
            self._contexts[device] = (context, self._call("cuStreamCreate", 1))
        context, stream = self._contexts[device]  # type: ignore[misc]
        self._call("cuCtxPushCurrent", context)
        return stream  # type: ignore[has-type]

    def alloc(self, size: str, device: str) -> bytes:
        self._enter(int(device))
        address = self._call("cuMemAlloc", int(size))
        struct = self._call("cuIpcGetMemHandle", address)
        handle = ctypes.string_at(struct.getPtr(), 64)  # type: ignore[attr-defined]
        self._addresses[handle] = (int(address), int(device))  # type: ignore[call-overload]
        self._call("cuCtxPopCurrent")
        return handle

    def get(self, handle: str, size: str) -> bytes:
        address, device = self._addresses[bytes.fromhex(handle)]
        content = ctypes.create_string_buffer(int(size))
        stream = self._enter(device)
        self._call("cuMemcpyDtoHAsync", ctypes.addressof(content), address, int(size), stream)
        self._call("cuStreamSynchronize", stream)
        self._call("cuCtxPopCurrent")
        return content.raw

    def set(self, handle: str, content: str) -> bytes:
        address, device = self._addresses[bytes.fromhex(handle)]
        data = bytes.fromhex(content)
        buffer = ctypes.create_string_buffer(data, len(data))
        stream = self._enter(device)
        self._call("cuMemcpyHtoDAsync", address, ctypes.addressof(buffer), len(data), stream)
        self._call("cuStreamSynchronize", stream)
        self._call("cuCtxPopCurrent")
        return b""

    def free(self, handle: str) -> bytes:
        address, device = self._addresses.pop(bytes.fromhex(handle))
        self._enter(device)
        self._call("cuMemFree", address)
        self._call("cuCtxPopCurrent")
        return b""

    def close(self) -> None:
        for handle in list(self._addresses):
            self.free(handle.hex())


def main() -> None:
    memory = Memory()
    for line in sys.stdin:
        command, *words = line.split()
        print("-" + getattr(memory, command)(*words).hex(), flush=True)
    memory.close()


if __name__ == "__main__":
    main()
