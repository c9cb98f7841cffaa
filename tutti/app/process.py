"""The composition root of an engine's process: alone, with the ports, or behind front-end processes of a supervisor.

When a device fails the process ends, since only that frees it: callers are answered, and it exits with a status of its
own, so that whoever started it starts another.
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import uvloop

from tutti import ensembles
from tutti.app import front_end_setup, overview, restarts
from tutti.app.front_end_server import Addresses, Server
from tutti.app.process_end import Ending, held_by, now
from tutti.app.reports import Supervised, end_with
from tutti.console.progress import Pace, Repeats, amount, clock
from tutti.core import garbage
from tutti.core.daemon_threads import Pool
from tutti.core.errors import DeviceLost
from tutti.devices import allocator
from tutti.devices.gpu_metrics import INTERVAL_S, GpuMetrics
from tutti.devices.health import health
from tutti.devices.xid import is_of_device, watch_xid
from tutti.observing.logs import Logs
from tutti.repository import unserved
from tutti.scheduling.rate_limit_threads import RateLimits
from tutti.scheduling.rate_limiting import parse_supply
from tutti.serving import local
from tutti.serving.engine import Engine

_log = logging.getLogger("tutti")

# How long callers in flight may take for their answers once a device has failed.
LEAVE_S = 2.0
# How often a server that loads models says how far it is.
PROGRESS_S = 2.0
LOOK_S = 0.5
# What may hang does so in one of these: loads, the engine's end, and what is asked of drivers.
_THREADS = 8
T = TypeVar("T")


def serve(options: argparse.Namespace, logs: Logs) -> int:
    """Serve until told to end; returns the exit status. Raises ConfigError."""
    supervised: Supervised | None = options.engine_of
    if supervised is not None:
        end_with(supervised.parent)
    allocator.choose()
    ending, threads = Ending(options.exit_timeout_secs), threading.enumerate()
    status: int = uvloop.run(_serve(options, logs, supervised, ending))
    if held := held_by(threads):  # as a model's own: none of ours
        _log.debug("this process waits for the threads %s", ", ".join(held))
        ending.begin()
    return status


async def _serve(options: argparse.Namespace, logs: Logs, supervised: Supervised | None, ending: Ending) -> int:
    addresses = front_end_setup.addresses(options)
    if supervised is not None:
        addresses = replace(addresses, behind=supervised.folder)
    try:
        if not options.check:
            addresses.check_free()
    except OSError as error:
        return _cannot_listen(error)
    run = _Run(options, supervised, ending)
    run.end_watch = await run.in_thread(watch_xid, _told)  # NVML takes a while to begin
    engine = _engine(options)
    server = _server(engine, options, logs, addresses)
    if supervised is not None:
        supervised.report(task=str(server.write_task(supervised.folder.parent)))
        logs.listen(partial(_tell_logs, supervised, logs))
        _tell_logs(supervised, logs)
    await run.load(engine, server)
    if options.check or (engine.failures() and options.exit_on_error):
        ending.begin()
        await run.in_thread(_hint, options)
        status = _verdict(engine, options)
        await run.in_thread(engine.close)
        await run.in_thread(run.end_watch)
        return status
    try:
        await run.serve(engine, server, addresses)
    except OSError as error:
        return _cannot_listen(error)
    finally:
        await run.end(engine, server)
    if left := engine.unfinished():
        now(1, f"this process ends, though not all has: {'; '.join(left)}")
    return 0


def _engine(options: argparse.Namespace) -> Engine:
    engine = local.make_engine(
        options.model_repository,
        local.loop_timer(asyncio.get_running_loop()),
        ensembles.load,
        is_controllable=options.model_control_mode == "explicit",
        cache_bytes=front_end_setup.cache_size(options.cache_config),
        limits=RateLimits(parse_supply(options.rate_limit_resource))
        if options.rate_limit == "execution_count"
        else None,
        control_timeout_s=options.control_timeout_secs,
    )
    engine.is_strict = options.strict_readiness
    engine.loads_at_once = options.model_load_thread_count or engine.loads_at_once
    return engine


def _server(engine: Engine, options: argparse.Namespace, logs: Logs, addresses: Addresses) -> Server:
    gpus = GpuMetrics(interval_s=(options.metrics_interval_ms or 1e3 * INTERVAL_S) / 1e3)
    collect, sample = (gpus.collect, gpus.sample) if options.allow_gpu_metrics is not False else (None, None)
    api = front_end_setup.make_api(engine, options, logs)
    return Server(api, addresses, collect, sample, options.allow_cpu_metrics)


class _Run:
    """One life of the process: what ends it, and what may hang, which does so in threads of their own."""

    def __init__(self, options: argparse.Namespace, supervised: Supervised | None, ending: Ending) -> None:
        self._options = options
        self._supervised = supervised
        self._ending = ending
        self._loop = asyncio.get_running_loop()
        self._stop, self._lost = asyncio.Event(), asyncio.Event()
        self._threads = Pool(_THREADS, "server")
        self._poller: asyncio.Task[None] | None = None
        self.end_watch: Callable[[], None] = lambda: None
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, ending.ask, self._stop)
        health.listen(self._failed)

    def in_thread(self, do: Callable[..., T], *arguments: object) -> "asyncio.Future[T]":
        """What it returns, once it has."""
        return self._loop.run_in_executor(self._threads, do, *arguments)

    def _failed(self, device: str, reason: str) -> None:
        if self._supervised is not None:
            self._supervised.report(failed=f"device {device} has failed: {reason}")
        with contextlib.suppress(RuntimeError):  # the loop has ended: so does the process
            self._loop.call_soon_threadsafe(self._lost.set)

    async def load(self, engine: Engine, server: Server) -> None:
        """All that was asked for, telling how far it is. Ends the process where that is stopped, or a device fails."""
        options = self._options
        is_explicit = options.model_control_mode == "explicit"
        names = (options.load_model or []) if is_explicit and "*" not in (options.load_model or []) else None
        if options.model_control_mode == "poll":
            await self.in_thread(engine.remember)
        # A model that hangs as it is loaded must not keep the others from being served, unless all must be.
        patience_s = None if options.exit_on_error else engine.control_timeout_s
        loading = self.in_thread(engine.load_all, names, patience_s)
        telling = asyncio.create_task(_tell_progress(engine))
        if await _first(_either(loading, self._stop), self._lost):
            await _leave(server)
        telling.cancel()
        if self._stop.is_set() and not loading.done():
            _log.info("stopping, though models are still being loaded")
            now(0)

    async def serve(self, engine: Engine, server: Server, addresses: Addresses) -> None:
        """Until it is to stop, or a device fails. Raises OSError where it cannot listen."""
        options = self._options
        taken = await server.start()
        garbage.settle()
        _show(engine)
        self.in_thread(_hint, options)  # a look at a slow disk, for which nobody waits
        _log.info("ready: %d models from %s", len(engine.models()), options.model_repository)
        command = overview.example(engine.models(), replace(taken, http_tls=addresses.http_tls).url)
        if command:
            _log.info("try: %s", command)
        if self._supervised is not None:
            self._supervised.report(ready=True)
        if options.model_control_mode == "poll":
            self._poller = asyncio.create_task(local.poll_forever(engine, options.repository_poll_secs))
        if await _first(self._stop.wait(), self._lost):
            await _leave(server)
        _log.info("stopping: open requests may end")

    async def end(self, engine: Engine, server: Server) -> None:
        """Let open requests end, then all else."""
        self._ending.begin()  # it may not have been asked to stop
        if self._poller is not None:
            self._poller.cancel()
        await server.stop()
        if await _first(self.in_thread(engine.close), self._lost):
            await _leave(server)
        await self.in_thread(self.end_watch)


def _tell_logs(supervised: Supervised, logs: Logs) -> None:
    """How this process logs, clients may change: its supervisor's lines are beside its own."""
    supervised.report(logs=logs.changeable())


def _verdict(engine: Engine, options: argparse.Namespace) -> int:
    """The status of a process that only checks, or cannot begin."""
    _show(engine)
    count = len(engine.failures())
    if options.check:
        is_empty = not engine.models() and options.model_control_mode != "explicit"
        return 1 if count or is_empty else 0
    _log.error("%d models could not be loaded (--exit-on-error=false serves the others)", count)
    return restarts.UNUSABLE


def _show(engine: Engine) -> None:
    """What is served, and what could not be loaded and why, a line each."""
    for line in overview.table(engine.models()):
        _log.info("%s", line)
    for failure in engine.failures():
        _log.error("not served: %s", failure)


def _hint(options: argparse.Namespace) -> None:
    """What else lies in the repository, a line each."""
    if options.model_control_mode != "explicit":
        for sentence in unserved.unserved(options.model_repository):
            _log.warning("%s", sentence)


async def _tell_progress(engine: Engine) -> None:
    """While models load: how many have, and how long the others may take."""
    start, repeats, pace = time.monotonic(), Repeats(PROGRESS_S), Pace()
    while True:
        await asyncio.sleep(LOOK_S)
        done, total = engine.started()
        passed_s = time.monotonic() - start
        left_s = pace.left_s(done, total, passed_s)
        if not total or passed_s < PROGRESS_S or not repeats.is_due(done, passed_s):
            continue  # the repository is still being looked at, or there is nothing new
        left = f", {amount(left_s)} left" if left_s is not None else ""
        _log.info("loading: %d of %d models after %s%s", done, total, clock(passed_s, is_up=False), left)


def _cannot_listen(error: OSError) -> int:
    _log.error("cannot listen: %s", error)
    return restarts.UNUSABLE


async def _either(work: "asyncio.Future[None]", stop: asyncio.Event) -> None:
    """Until the work has ended, or the process is asked to stop. Raises what the work does."""
    stopping = asyncio.ensure_future(stop.wait())
    both: set[asyncio.Future[Any]] = {work, stopping}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if work.done():
        work.result()


def _told(device: str, xid: int) -> None:
    """The driver has reported a critical error. What a process has executed, that process hears of by itself."""
    if is_of_device(xid):
        health.fail(device, f"the driver reports Xid {xid}")
    else:
        _log.warning("device %s: the driver reports Xid %d, of what some process has executed", device, xid)


async def _first(work: Awaitable[object], lost: asyncio.Event) -> bool:
    """Wait for the work, but no longer than until a device fails; returns whether one has."""
    working, losing = asyncio.ensure_future(work), asyncio.ensure_future(lost.wait())
    await asyncio.wait([working, losing], return_when=asyncio.FIRST_COMPLETED)
    losing.cancel()
    if not lost.is_set():
        await working
    return lost.is_set()


async def _leave(server: Server) -> None:
    """Let callers have their answers, and end at once: threads that wait for a failed device never end."""
    causes = "; ".join(f"device {device} has failed: {reason}" for device, reason in health.failures().items())
    _log.error("this process ends, since %s", causes)
    try:
        async with asyncio.timeout(2 * LEAVE_S):
            await server.leave(DeviceLost(f"{causes}; the engine's process is started anew, try again later"), LEAVE_S)
    except Exception:
        _log.exception("callers could not be answered to the last")
    finally:
        now(restarts.DEVICE_FAILED)
