"""What must not hold a process that is to end: threads that hang, a log that hangs, and how long it has."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.serving import wait_until
from tutti.app import supervisor
from tutti.app.supervisor import Supervisor
from tutti.core.daemon_threads import Pool
from tutti.observing.logs import Logs

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0


def test_a_pool_has_as_many_threads_as_it_needs_and_may() -> None:
    pool, go = Pool(3, "test"), threading.Event()
    names = [pool.submit(lambda: threading.current_thread().name).result(LIMIT_S) for _ in range(5)]
    assert len(set(names)) <= 2, "one that is free, or is about to be, is used again"
    entered = threading.Semaphore(0)

    def wait() -> int:
        entered.release()
        assert go.wait(LIMIT_S)
        return threading.get_ident()

    waiting = [pool.submit(wait) for _ in range(6)]
    for _ in range(3):
        assert entered.acquire(timeout=LIMIT_S)
    assert not entered.acquire(blocking=False)
    go.set()
    assert len({each.result(LIMIT_S) for each in waiting}) == 3


def test_a_pool_tells_what_was_raised_and_takes_nothing_when_it_is_shut() -> None:
    pool, go = Pool(1, "test"), threading.Event()
    with pytest.raises(SystemExit):
        pool.submit(sys.exit, 3).result(LIMIT_S)
    first, second = pool.submit(go.wait, LIMIT_S), pool.submit(int)
    wait_until(first.running)
    pool.shutdown(cancel_futures=True)
    assert second.cancelled()
    with pytest.raises(RuntimeError, match="'test' have been shut down"):
        pool.submit(int)
    go.set()
    assert first.result(LIMIT_S)


def test_a_pool_does_with_the_threads_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool, none = Pool(3, "test"), Pool(3, "none")
    go = threading.Event()
    first = pool.submit(go.wait, LIMIT_S)
    monkeypatch.setattr(threading.Thread, "start", fails)
    second = pool.submit(int)
    go.set()
    assert first.result(LIMIT_S) and second.result(LIMIT_S) == 0
    with pytest.raises(RuntimeError, match="can't start"):
        none.submit(int)


def test_threads_of_a_pool_end_with_it() -> None:
    pool = Pool(2, "ends")
    pool.submit(int).result(LIMIT_S)
    assert any(thread.name.startswith("ends") for thread in threading.enumerate())
    del pool
    wait_until(lambda: not any(thread.name.startswith("ends") for thread in threading.enumerate()))


HANGS = "import threading; from tutti.core.daemon_threads import Pool; Pool(1, 'x').submit(threading.Event().wait)"
LOG_HANGS = """
import logging, threading
from tutti.app import process_end as ending
handler = logging.StreamHandler()
logging.getLogger().addHandler(handler)
held = threading.Event()
def hold():
    with handler.lock:
        held.set()
        threading.Event().wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
{}
"""
AT_ONCE = "ending.now(3, 'why')"
IN_TIME = "ending.Ending(0.01).begin(); threading.Event().wait()"


@pytest.mark.parametrize(
    ("code", "status"), [(HANGS, 0), (LOG_HANGS.format(AT_ONCE), 3), (LOG_HANGS.format(IN_TIME), 1)]
)
def test_what_hangs_does_not_hold_the_process(code: str, status: int) -> None:
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=LIMIT_S).returncode == status


HOLDS_THE_LOCK = """
import ctypes, sys
from tutti.core.lifeline import end_with
end_with(int(sys.argv[1]))
print("on", flush=True)
ctypes.PyDLL(None).pause()
"""


def test_a_process_ends_with_its_lifeline_whatever_it_does() -> None:
    theirs, lifeline = os.pipe()
    command = [sys.executable, "-c", HOLDS_THE_LOCK, str(theirs)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, pass_fds=[theirs], start_new_session=True
    ) as process:
        os.close(theirs)
        assert process.stdout is not None and process.stdout.readline() == b"on\n"
        os.close(lifeline)
        assert process.wait(LIMIT_S) == -signal.SIGKILL


ENGINE = """
import json, os, signal, sys
signal.signal(signal.SIGTERM, {})
descriptor = int(sys.argv[sys.argv.index("--engine-of") + 1].split(":")[0])
os.write(descriptor, json.dumps({{"ready": True}}).encode() + b"\\n")
while True:
    signal.pause()
"""


@pytest.mark.parametrize(
    ("on_stop", "exit_timeout_s", "status"), [("signal.SIG_IGN", 0.1, 1), ("lambda *_: os._exit(7)", 600.0, 7)]
)
def test_a_supervised_engine_has_the_time_that_the_user_gives(
    monkeypatch: pytest.MonkeyPatch, on_stop: str, exit_timeout_s: float, status: int
) -> None:
    waits: list[float] = []
    within = supervisor._within

    async def noted(timeout_s: float, work: object) -> None:
        waits.append(timeout_s)
        await within(timeout_s, work)

    monkeypatch.setattr(supervisor, "_within", noted)
    command = [sys.executable, "-c", ENGINE.format(on_stop)]
    supervising = Supervisor(command, 0, exit_timeout_s, Logs())

    async def serve() -> int:
        serving = asyncio.create_task(supervising.run("127.0.0.1", 0, 0))
        async with asyncio.timeout(LIMIT_S):
            while supervising._engine is None or supervising._engine.ready_at_s is None:
                await asyncio.sleep(0.01)
            supervising._ask_to_stop()
            return await serving

    assert asyncio.run(serve()) == status
    assert exit_timeout_s < waits[0] < exit_timeout_s + 10
