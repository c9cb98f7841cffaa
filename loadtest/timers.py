"""Waits that end when they are over: event loops wait in whole milliseconds, which is longer than many gaps."""

import asyncio
import ctypes
import os
import struct
import sys

_CLOCK_MONOTONIC = 1
_NONBLOCK = os.O_NONBLOCK


class Alarm:
    """A timer of the kernel that a loop can wait for (timerfd); where there is none, the loop's own."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        self._file = self._library.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK) if self._library is not None else -1
        self._waiting: asyncio.Future[None] | None = None
        if self._file >= 0:
            asyncio.get_running_loop().add_reader(self._file, self._rings)

    async def sleep(self, seconds: float) -> None:
        """At least a microsecond."""
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
