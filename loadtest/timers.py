"""Waits that end when they are over: event loops wait in whole milliseconds, and processes wake up late."""

import asyncio
import ctypes
import os
import struct
import sys
import time

_CLOCK_MONOTONIC = 1
_NONBLOCK = os.O_NONBLOCK
# The last 0.3 ms of a wait are spent awake, since waking up takes about 0.1 ms on a virtual machine, and taking in an
# answer as long. This stops where it would take more than a tenth of all time.
_AWAKE_S = 3e-4
_MOST_AWAKE = 0.1


class Alarm:
    """A timer of the kernel that a loop can wait for (timerfd); where there is none, the loop's own."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        self._file = self._library.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK) if self._library is not None else -1
        self._waiting: asyncio.Future[None] | None = None
        self._began_s = time.perf_counter()
        # Seconds spent awake only to be punctual.
        self.awake_s = 0.0
        if self._file >= 0:
            asyncio.get_running_loop().add_reader(self._file, self._rings)

    async def until(self, at_s: float) -> None:
        """Until a time of time.perf_counter(), a few microseconds late at best."""
        now = time.perf_counter()
        is_punctual = self.awake_s < _MOST_AWAKE * (now - self._began_s)
        asleep = at_s - now - (_AWAKE_S if is_punctual else 0.0)
        if asleep > 0:
            await self.sleep(asleep)
        if is_punctual:
            began = time.perf_counter()
            while time.perf_counter() < at_s:
                pass
            self.awake_s += time.perf_counter() - began

    async def sleep(self, seconds: float) -> None:
        """Wait for so long, but for a microsecond at least: 0 would stop the kernel's timer."""
        if self._file < 0:
            await asyncio.sleep(seconds)
            return
        assert self._library is not None
        whole = max(1000, int(seconds * 1e9))
        value = struct.pack("4q", 0, 0, whole // 1_000_000_000, whole % 1_000_000_000)
        self._waiting = asyncio.get_running_loop().create_future()
        self._library.timerfd_settime(self._file, 0, value, None)
        await self._waiting

    def _rings(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:
            return
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def close(self) -> None:
        if self._file >= 0:
            asyncio.get_running_loop().remove_reader(self._file)
            os.close(self._file)
            self._file = -1
