"""What the command says of a cluster that starts, of the application on it, and of its pools while they serve.

On a cluster nobody sees what its processes log: this is all that a person is told.
"""

import asyncio
import io
import logging
import re
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tutti.console.progress import Repeats
from tutti.core.errors import ConfigError
from tutti.ray_app.news import News, Start, progress

_log = logging.getLogger("tutti")

APP = "tutti"
READY_TIMEOUT_S = 120.0
# How often a server that starts says how far it is; what is not new it says more and more seldom.
PROGRESS_S = 5.0
_LOOK_INTERVAL_S = 0.5
# How often a gateway is asked how many replicas it has, and how long its answer may take.
Pools = dict[str, list[str]]
"""The names of the replicas that each pool has, by its name."""

_POOLS_INTERVAL_S = 1.0
_POOLS_TIMEOUT_S = 3.0
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def telling(wait: str) -> Iterator[None]:
    """Say what is waited for, and for how long by now."""
    has_ended, start_s = threading.Event(), time.monotonic()
    repeats = Repeats(PROGRESS_S)
    repeats.is_due(wait, start_s)

    def tell() -> None:
        while not has_ended.wait(_LOOK_INTERVAL_S):
            now_s = time.monotonic()
            if repeats.is_due(wait, now_s):
                _log.info("%s: %.0f s by now", wait, now_s - start_s)

    _log.info("%s", wait)
    threading.Thread(target=tell, name="progress", daemon=True).start()
    try:
        yield
    finally:
        has_ended.set()


def wait_until_running(store: News, stop: threading.Event) -> None:
    """Until all replicas are there, saying how far they are. Raises ConfigError with the reason where one cannot start.

    Serve would try that again, and in the end tell where in its code that was.
    """
    from ray import serve

    start_s, repeats = time.monotonic(), Repeats(PROGRESS_S)
    repeats.is_due("", start_s)
    warned: set[str] = set()
    while not stop.wait(_LOOK_INTERVAL_S):
        application, starts = serve.status().applications[APP], store.read()
        if failures := dict.fromkeys(start.failure for start in starts if start.failure):
            raise ConfigError("; ".join(failures))
        if application.status == "RUNNING":
            return
        if application.status == "DEPLOY_FAILED":
            raise ConfigError(f"{_summary(application.message)} {_reasons(application)}")
        states, now_s = _states(application, starts), time.monotonic()
        if repeats.is_due(states, now_s):
            _log.info("starting replicas: %s; %.0f s by now", states, now_s - start_s)
            messages = {deployment.message for deployment in application.deployments.values()}
            for message in messages - warned - {""}:
                warned.add(message)
                _log.warning("%s", _summary(message))


def _states(application: Any, starts: Sequence[Start]) -> str:
    """How many replicas of each deployment are there, and how many models they have loaded."""
    told = []
    for name, deployment in application.deployments.items():
        counts = deployment.replica_states
        told.append(f"{counts.get('RUNNING', 0)} of {sum(counts.values())} in {name}")
    loaded = progress(starts)
    return ", ".join(told) + (f"; {loaded}" if loaded else "")


def _reasons(application: Any) -> str:
    """What Serve says of each deployment that is not healthy."""
    messages = {name: deployment.message for name, deployment in application.deployments.items()}
    return "; ".join(f"{name}: {_summary(message)}" for name, message in messages.items() if message)


def _summary(message: str) -> str:
    """Its first line; and of a traceback the last one, too, which says what has been raised."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or [""]
    return lines[0] if len(lines) < 3 else f"{lines[0]} {lines[-1]}"


async def report_ready(handle: Any, stop: threading.Event) -> Pools:
    """Say where the gateway listens and what it serves, once it does; returns which replicas pools had just before.

    Raises TimeoutError where that never comes.
    """
    taken = await handle.addresses.remote()
    ports = f"http {taken.http_port}, grpc {taken.grpc_port}, metrics {taken.metrics_port}"
    _log.info("listening on %s: %s", taken.host, ports)
    until_s = time.monotonic() + READY_TIMEOUT_S
    while not stop.is_set() and not await handle.has_begun.remote():
        if time.monotonic() > until_s:
            raise TimeoutError(f"not ready within {READY_TIMEOUT_S:g} s: {await handle.unready.remote()}")
        await asyncio.sleep(0.1)
    if stop.is_set():
        return {}
    pools = await _replicas(handle)
    (await handle.overview.remote()).tell(_log)
    return pools


async def tell_pools(handle: Any, stop: threading.Event, known: Pools | None = None) -> None:
    """Log which replicas pools have, when that changes from what is `known`, by default from now on.

    Gateways may differ for a moment: it is to be said twice.
    """
    known = known or await _replicas(handle)
    last = known
    while not stop.is_set():
        await asyncio.sleep(_POOLS_INTERVAL_S)
        pools = await _replicas(handle)
        if pools == last and pools != known and not stop.is_set():
            for name in [name for name in pools if name in known and pools[name] != known[name]]:
                level = logging.WARNING if len(pools[name]) < len(known[name]) else logging.INFO
                _log.log(level, "pool '%s' %s", name, _change(known[name], pools[name]))
            known = pools
        last = pools or last


def _change(before: Sequence[str], after: Sequence[str]) -> str:
    gone = [name for name in before if name not in after]
    new = [name for name in after if name not in before]
    count = f"has {len(after)} replica{'' if len(after) == 1 else 's'}, it had {len(before)}"
    parts = [f"{', '.join(names)} {verb}" for names, verb in ((gone, "left"), (new, "came")) if names]
    return f"{count}: {'; '.join(parts)}"


async def _replicas(handle: Any) -> Pools:
    """Empty where no gateway answers now."""
    try:
        async with asyncio.timeout(_POOLS_TIMEOUT_S):
            pools: Pools = await handle.replicas.remote()
            return pools
    except Exception as error:
        _log.debug("no gateway says which replicas there are: %s", error)
        return {}


class _InLog(io.TextIOBase):
    """What Ray prints, as lines of the log; but once this process is to stop, when all that ends is meant to."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def write(self, text: str) -> int:
        for line in _ANSI.sub("", text).splitlines():
            if line.strip() and not self._stop.is_set():
                _log.warning("Ray: %s", textwrap.shorten(line, 200, placeholder=" ..."))
        return len(text)


def quieten(stop: threading.Event) -> None:
    """What Ray and Serve say of themselves, but for warnings: this command says what of it concerns people.

    That a cluster of this machine's asks for a token is Ray's default, and no warning.
    """
    from ray import serve  # noqa: F401  # it sets the level

    sys.stdout = _InLog(stop)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
