"""What replicas and gateways that start say of themselves: how far they are, and why they cannot.

Nobody can ask them, since Serve lets nobody reach one that is not there yet, and what it tells of one that has failed
is a traceback. So they write it into the cluster's key-value store, where the command that starts them reads it.
"""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

from tutti.console.progress import Pace, amount
from tutti.core.errors import TuttiError

_log = logging.getLogger(__name__)

WRITE_INTERVAL_S = 1.0
# A writer that says nothing new for this long is gone: a process that is killed as it loads leaves its last news.
_SILENT_S = 10 * WRITE_INTERVAL_S


class Store(Protocol):
    """Key -> value, for all processes of the cluster."""

    def replace(self, key: str, value: bytes) -> None: ...

    def clear(self, prefix: str) -> None: ...

    def under(self, prefix: str) -> list[bytes]:
        """The values of all keys that begin so."""


@dataclass(frozen=True, slots=True)
class Start:
    """A process that starts: it has loaded `done` of `total` models, or `failure` says why not.

    `left_s` is how long the others may take, None where nobody knows.
    """

    deployment: str
    done: int = 0
    total: int = 0
    left_s: float | None = None
    failure: str = ""


class News:
    """Those of one application's processes. Its methods block."""

    def __init__(self, store: Store, app: str) -> None:
        self._store = store
        self._prefix = f"start/{app}/"
        # What was read last, and since when by this process's clock: clocks of other machines may be wrong.
        self._seen: dict[bytes, float] = {}

    def tell(self, process: str, start: Start) -> None:
        """`process` is its name, of all of the application's."""
        self._store.replace(f"{self._prefix}{process}", json.dumps(asdict(start)).encode())

    def tell_failure(self, process: str, start: Start) -> None:
        """Why `process` does not start. Of a deployment the last one stays: Serve tries for ever."""
        self.tell(f"failure/{start.deployment}", start)
        self.forget(process)

    def forget(self, process: str = "") -> None:
        """One that has started has no news any more; "" is for all of an earlier start."""
        self._store.clear(f"{self._prefix}{process}")

    def read(self) -> list[Start]:
        """Of those that go on with it, and of those that have failed."""
        now_s = time.monotonic()
        self._seen = {entry: self._seen.get(entry, now_s) for entry in self._store.under(self._prefix)}
        starts = [(Start(**json.loads(entry)), now_s - since_s) for entry, since_s in self._seen.items()]
        return [start for start, silent_s in starts if start.failure or silent_s < _SILENT_S]


class Writer:
    """Of one process, on its event loop: `async with`, while it starts. Why that has failed stays to be read.

    Nothing starts worse where the store cannot be written.
    """

    def __init__(
        self, news: News, process: str, deployment: str, progress: Callable[[], tuple[int, int]] = lambda: (0, 0)
    ) -> None:
        """`progress` says how many models are done, of how many."""
        self._news = news
        self._process = process
        self._deployment = deployment
        self._progress = progress
        self._start_s, self._pace = time.monotonic(), Pace()
        self._lock = threading.Lock()
        self._has_ended = False
        self._writing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Writer":
        self._writing = asyncio.create_task(self._write_forever())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        assert self._writing is not None
        self._writing.cancel()
        await asyncio.to_thread(self._end, str(error) if isinstance(error, TuttiError | OSError) else "")

    async def _write_forever(self) -> None:
        while True:
            await asyncio.to_thread(self._write)
            await asyncio.sleep(WRITE_INTERVAL_S)

    def _write(self) -> None:
        with self._lock, _best_effort():
            if not self._has_ended:  # a thread goes on when its waiting task is cancelled
                done, total = self._progress()
                left_s = self._pace.left_s(done, total, time.monotonic() - self._start_s)
                self._news.tell(self._process, Start(self._deployment, done, total, left_s))

    def _end(self, failure: str) -> None:
        with self._lock, _best_effort():
            self._has_ended = True
            if failure:
                self._news.tell_failure(self._process, Start(self._deployment, failure=failure))
            else:
                self._news.forget(self._process)


@contextmanager
def _best_effort() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _log.debug("how far the start is cannot be written: %s", error)


def progress(starts: Sequence[Start]) -> str:
    """For people: of each deployment, how far the one is that has most to do still; "" where nobody says."""
    told = {}
    for start in sorted(starts, key=lambda start: start.done - start.total, reverse=True):
        if start.done < start.total:
            left = f", {amount(start.left_s)} left" if start.left_s is not None else ""
            told[start.deployment] = f"{start.deployment} has loaded {start.done} of {start.total} models{left}"
    return "; ".join(told[name] for name in sorted(told))
