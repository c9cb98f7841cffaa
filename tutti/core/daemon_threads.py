"""Pools of threads that nobody waits for when the process ends, as it would for a ThreadPoolExecutor's.

What hangs in one, as a call of a library, must not hold the process.
"""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_Queue = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class Pool(Executor):
    """At most so many threads, which begin when they are needed, and stay."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._lock = threading.Lock()
        self._begun = 0
        self._is_shut = False
        self._waiting = threading.Semaphore(0)
        self._queue: _Queue = queue.SimpleQueue()
        # They end when it is used no more.
        weakref.finalize(self, self._queue.put, None).atexit = False

    def submit(self, do: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Raises RuntimeError once it has been shut down."""
        future: Future[T] = Future()
        with self._lock:
            if self._is_shut:
                raise RuntimeError(f"the threads '{self._name}' have been shut down")
            self._queue.put((future, partial(do, *args, **kwargs)))
            if not self._waiting.acquire(blocking=False) and self._begun < self._most:
                self._begin(future)
        return future

    def _begin(self, future: Future[Any]) -> None:
        """One thread more. Raises RuntimeError, and the work is none, where there can be none, and none is there."""
        name = f"{self._name} {self._begun + 1}"
        try:
            threading.Thread(target=_work, args=(self._queue, self._waiting), name=name, daemon=True).start()
        except RuntimeError:
            if not self._begun:
                future.cancel()
                raise
        else:
            self._begun += 1

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """Take no more; the threads end after what was submitted, without it where that is cancelled. Never waits."""
        with self._lock:
            self._is_shut = True
        while cancel_futures:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is not None:
                item[0].cancel()
        self._queue.put(None)


def _work(items: _Queue, waiting: threading.Semaphore) -> None:
    while True:
        try:
            item = items.get_nowait()
        except queue.Empty:
            waiting.release()
            item = items.get()
        if item is None:
            items.put(None)  # for the next
            return
        future, do = item
        if future.set_running_or_notify_cancel():
            _settle(future, do)
        del item, future, do  # what they hold does not wait for the next


def _settle(future: Future[Any], do: Callable[[], Any]) -> None:
    try:
        result = do()
    except BaseException as error:  # it is for whoever waits
        future.set_exception(error)
        del error
    else:
        future.set_result(result)
