"""CUDA devices through PyTorch, which holds their memory, streams and events.

One thread submits all work of a device: each thread that multiplies matrices keeps a workspace on it. A thread for each
stream that somebody waits for sleeps until the device reaches an event; the interpreter's lock is free meanwhile.
"""

import contextlib
import logging
import queue
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tutti.core.dtypes import Array
from tutti.devices import errors
from tutti.devices.interface import Notice
from tutti.devices.threads import Alarms, run_and_wait

_log = logging.getLogger(__name__)

TORCH = {
    "BOOL": torch.bool, "INT8": torch.int8, "INT16": torch.int16, "INT32": torch.int32, "INT64": torch.int64,
    "UINT8": torch.uint8, "UINT16": torch.uint16, "UINT32": torch.uint32, "UINT64": torch.uint64,
    "FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32, "FP64": torch.float64,
}  # fmt: skip

loading = threading.Lock()
"""Held by who loads a model onto a device, and by who has graphs captured: neither expects the other's calls."""

caches = threading.Lock()
"""Held while a graph is captured, and to empty PyTorch's caches: its allocator bears no emptying meanwhile."""


def empty_caches() -> None:
    """Give memory that PyTorch keeps for later back to the devices."""
    with caches:
        torch.cuda.empty_cache()
        empty_host = getattr(torch._C, "_host_emptyCache", None)
        if empty_host is not None:
            empty_host()


class _HostBlock:
    def __init__(self, size: int) -> None:
        self.tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.array: Array = self.tensor.numpy()


class _DeviceBlock:
    def __init__(self, size: int, device: str) -> None:
        self.size = size
        self.tensor = torch.empty(size, dtype=torch.uint8, device=device)


class CudaDevice:
    """A Device (interface.py): GPU `index` of those that the process sees."""

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self._index = index
        self._posted: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._alarms = Alarms(f"{self.name} alarms")
        self._waiters: dict[Any, _Waiter] = {}
        self._probe: tuple[Any, Any] | None = None
        self._memory: Any = None
        self._thread = threading.Thread(target=self._run, name=f"{self.name} submits", daemon=True)
        self._thread.start()
        self.alarm(0, self._enter)
        self.call(self._enter)  # raises what CUDA says where it does not begin

    # Threads.

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def post(self, work: Callable[[], None]) -> None:
        self._posted.put(work)

    def call(self, work: Callable[[], None]) -> None:
        run_and_wait(self.post, work)

    def alarm(self, delay_ns: int, work: Callable[[], None]) -> None:
        self._alarms.set(delay_ns, work)

    def close(self) -> None:
        self._posted.put(None)
        self._thread.join()
        for waiter in self._waiters.values():
            waiter.close()
        self._alarms.close()

    def _enter(self) -> None:
        """Make the device the calling thread's: CUDA would use, and begin, device 0 in a new one.

        The call after it gives the thread its context, which PyTorch leaves to chance and compiled kernels need.
        """
        torch.cuda.set_device(self._index)
        torch.cuda.current_stream(self._index).query()

    def _run(self) -> None:
        while (work := self._posted.get()) is not None:
            try:
                work()
            except Exception:
                _log.exception("device %s: work failed", self.name)
            work = None  # what it refers to may be memory of the device

    # Memory.

    def host_block(self, size: int) -> _HostBlock:
        return _HostBlock(size)

    def free_host(self, block: Any) -> None:
        """PyTorch keeps pinned memory for later; release_cached gives it back."""
        block.tensor = block.array = None

    def device_block(self, size: int) -> _DeviceBlock:
        """From a stream that executes nothing: memory that PyTorch keeps of another one may be in use there still."""
        self._memory = self._memory or self.stream()
        with torch.cuda.stream(self._memory):
            return _DeviceBlock(size, self.name)

    def free_device(self, block: Any) -> None:
        block.tensor = None

    def view(self, block: Any, offset: int, datatype: str, shape: Sequence[int]) -> Any:
        dtype = TORCH[datatype]
        size = dtype.itemsize
        for length in shape:
            size *= length
        return block.tensor[offset : offset + size].view(dtype).view(tuple(shape))

    def apart(self, array: Any, block: Any, stream: Any) -> Any:
        if array.untyped_storage().data_ptr() != block.tensor.untyped_storage().data_ptr():
            return array
        with torch.cuda.stream(stream):
            return array.clone()

    def nbytes(self, array: Any) -> int:
        return int(array.numel() * array.element_size())

    # Streams.

    def stream(self, priority: int = 0) -> Any:
        return torch.cuda.Stream(self.name, priority=priority)

    def event(self, is_urgent: bool = False) -> Any:
        return torch.cuda.Event(enable_timing=True, blocking=not is_urgent)

    def record(self, event: Any, stream: Any) -> None:
        event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def copy_in(self, source: Any, target: Any, size: int, stream: Any) -> None:
        with torch.cuda.stream(stream):
            target.tensor[:size].copy_(source.tensor[:size], non_blocking=True)

    def copy_out(self, source: Any, target: Any, offset: int, stream: Any) -> None:
        size = self.nbytes(source)
        if not size:
            return
        with torch.cuda.stream(stream):
            host = target.tensor[offset : offset + size].view(source.dtype).view(source.shape)
            # A copy with gaps would go through memory of its own, and wait for it.
            host.copy_(source if source.is_contiguous() else source.contiguous(), non_blocking=True)

    def is_reached(self, event: Any) -> bool:
        return bool(event.query())

    def elapsed_ns(self, start: Any, end: Any) -> int:
        return int(start.elapsed_time(end) * 1e6)

    def notify(self, event: Any, stream: Any, notice: Notice) -> None:
        waiter = self._waiters.get(stream)
        if waiter is None:
            waiter = self._waiters[stream] = _Waiter(f"{self.name} waits {len(self._waiters)}", self._enter)
        waiter.queue.put((event, notice))

    def linger(self, event: Any, stream: Any, most_ns: int, notice: Notice) -> None:
        until_ns = time.monotonic_ns() + most_ns
        while self._posted.empty() and time.monotonic_ns() < until_ns:
            try:
                is_reached = event.query()
            except Exception as error:
                notice(error)
                return
            if is_reached:
                notice(None)
                return
            select.select((), (), (), 0)  # others have the interpreter's lock meanwhile; a sleep of 0 may take 60 us
        self.notify(event, stream, notice)

    def forward(self, launch: Callable[[], Any], stream: Any) -> Any:
        with torch.cuda.stream(stream):
            return launch()

    def read(self, array: Any) -> Array:
        host = array.cpu()
        if host.dtype == torch.bfloat16:  # numpy has no such type: its bits, as the server keeps them
            host = host.view(torch.int16).numpy().view(np.uint16)
            return np.asarray(host)
        return np.asarray(host.numpy())

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._index)

    # Errors.

    def is_memory_error(self, error: BaseException) -> bool:
        return errors.is_out_of_memory(error)

    def fault(self, error: BaseException) -> str:
        reason = errors.sticky(error)
        if reason or torch.version.cuda is None:  # a build for processors cannot ask; other libraries use the device
            return reason
        try:
            if self._probe is None:
                self._probe = torch.cuda.Stream(self.name), torch.cuda.Event(blocking=True)
            stream, event = self._probe
            event.record(stream)
            event.synchronize()
        except Exception as failure:
            return errors.sticky(failure) or f"{type(failure).__name__}: {failure}"
        return ""

    def release_cached(self) -> None:
        empty_caches()


class _Waiter:
    """Waits for the events of one stream, in their order."""

    def __init__(self, name: str, enter: Callable[[], None]) -> None:
        """`enter` is called first in its thread."""
        self.queue: queue.SimpleQueue[tuple[Any, Notice] | None] = queue.SimpleQueue()
        self._enter = enter
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.queue.put(None)
        self._thread.join(timeout=1)  # one that waits for what never comes goes with the process

    def _run(self) -> None:
        with contextlib.suppress(Exception):  # the device is lost: so say the events
            self._enter()
        while (entry := self.queue.get()) is not None:
            event, notice = entry
            failure: Exception | None = None
            try:
                event.synchronize()
            except Exception as error:
                failure = error
            try:
                notice(failure)
            except Exception:
                _log.exception("a notice failed")
            del entry, notice, event  # as above
