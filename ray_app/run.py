"""`tutti serve --ray`: start or join a cluster, run the application, and leave nothing behind."""

import argparse
import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from tutti.app import restarts
from tutti.app.reports import Supervised, end_with
from tutti.core.errors import ConfigError
from tutti.ray_app import checks, environment, processes
from tutti.ray_app.head import Head
from tutti.ray_app.journal import RayStore
from tutti.ray_app.news import News
from tutti.ray_app.options import Options
from tutti.ray_app.planning import checked, load_placement
from tutti.ray_app.starting import APP, quieten, report_ready, tell_pools, telling, wait_until_running

environment.apply()  # before ray.serve is imported

_log = logging.getLogger("tutti")

_LOOK_INTERVAL_S = 0.5
# Processes that Ray has begun to end get this long.
_LAST_S = 3.0
# Ray's message on a machine that is too busy: its limit of half a minute is fixed.
_STOPPING_EARLY = "stopping, though the cluster is still being started"
_SLOW_START = "timed out during startup"


class ClusterLost(Exception):
    """The cluster is gone. A new one may do better."""


def serve_on_ray(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status, that of a temporary failure when the head is lost."""
    stop = _Stop(options.exit_timeout_secs, options.ray_address is None)
    supervised: Supervised | None = options.engine_of
    if supervised is not None:
        end_with(supervised.parent, signal.SIGTERM)  # SIGTERM, not SIGKILL: this process has a cluster to end
    is_ours = stop.is_ours
    if is_ours:
        processes.adopt_orphans()
        environment.stay_on_loopback()
    status = 0
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.ask())
        application = _checked(options)
        _start_ray(options, stop)
        for number in (signal.SIGINT, signal.SIGTERM):  # ray.init has set handlers of its own
            signal.signal(number, lambda *_: stop.ask())
        _serve(options, application, stop)
    except (SystemExit, KeyboardInterrupt):  # raised by Ray's own signal handlers while it starts
        _log.info(_STOPPING_EARLY)
    except ClusterLost as lost:
        stop.end_lost(str(lost), supervised)
    except ConfigError as error:  # the same status as without Ray
        _log.error("cannot serve on Ray: %s", error)
        status = restarts.UNUSABLE
    except Exception as error:  # Ray raises anything; its processes must be ended in each case
        _log.error("cannot serve on Ray: %s", error)
        status = 1
    finally:
        if is_ours:
            processes.end_descendants(grace_s=5.0)
    logging.shutdown()
    # Ray's own exit handlers would wait for the processes that have just been ended.
    os._exit(status)


def _serve(options: argparse.Namespace, application: Options, stop: "_Stop") -> None:
    """Until asked to stop. Raises ClusterLost where what has failed is the cluster."""
    watch = _HeadWatch(stop.is_ours)
    threading.Thread(target=watch.run, args=(stop, options.engine_of), name="watch", daemon=True).start()
    with _loop() as loop:
        try:
            _run(options, application, stop, loop)
        except Exception as error:
            if lost := watch.lost():
                raise ClusterLost(f"{lost} ({error})") from None
            raise
        finally:
            stop.asked.set()
            watch.close()
            _stop_serving(options.exit_timeout_secs, stop)


class _Stop:
    """Whether this process has been asked to stop. It then ends within a time; asked again, at once."""

    def __init__(self, timeout_s: float, is_ours: bool) -> None:
        """The cluster ends with this process if it `is_ours`."""
        self.is_ours = is_ours
        # Whether the application is on the cluster, and whether it serves.
        self.has_deployed = False
        self.is_serving = False
        self.asked = threading.Event()
        self._timeout_s = timeout_s

    def ask(self) -> None:
        if self.asked.is_set():
            _log.error("asked to stop again: ending at once")
            self._end(1)
        self.asked.set()
        if not self.has_deployed or (self.is_ours and not self.is_serving):
            _log.info(_STOPPING_EARLY)
            self._end(0)
        threading.Thread(target=self._end_late, name="exit", daemon=True).start()

    def _end_late(self) -> None:
        time.sleep(self._timeout_s)
        _log.error("not all has ended within %g s (--exit-timeout-secs): ending all the same", self._timeout_s)
        self._end(1)

    def end_lost(self, why: str, supervised: Supervised | None) -> NoReturn:
        """End this process at once. The cluster is not asked: there is none any more."""
        _log.error("the cluster is lost: %s", why)
        if supervised is not None:
            supervised.report(failed=why)
        self._end(restarts.DEVICE_FAILED)

    def _end(self, status: int) -> NoReturn:
        if self.is_ours:
            processes.end_descendants(grace_s=0.0)
        logging.shutdown()
        os._exit(status)


class _HeadWatch:
    """Whether there is a cluster still: the processes of its head, where they are this one's, and what it answers."""

    def __init__(self, is_ours: bool) -> None:
        self._head = Head(_what_is_wrong)
        self._processes = processes.of_the_head() if is_ours else {}

    def lost(self) -> str:
        ended = processes.ended(self._processes)
        return f"its head has ended: {ended}" if ended else self._head.lost()

    def close(self) -> None:
        """Ask no more. Must be called before Ray is shut down, which ends a process that asks afterwards."""
        self._head.close()

    def run(self, stop: _Stop, supervised: Supervised | None) -> None:
        """End this process when its cluster is lost: what Ray is doing then may never end."""
        while not stop.asked.wait(_LOOK_INTERVAL_S):
            lost = self.lost()
            if lost and not stop.asked.is_set():  # once asked to stop, the cluster ends on purpose
                stop.end_lost(lost, supervised)


def _what_is_wrong() -> str:
    """What the head says of this node. Raises what Ray raises when it does not answer, or hangs."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    dead = [node for node in ray.nodes() if node["NodeID"] == node_id and not node["Alive"]]
    return "its head takes this node for dead" if dead else ""


def _checked(options: argparse.Namespace) -> Options:
    """The application's options. Raises ConfigError for what would keep it from serving."""
    application = application_options(options)
    checks.files_and_flags(application, options.num_gpus)
    if options.ray_address is None:
        checks.machine(application)
    elif options.ray_address != "auto":
        checks.address(options.ray_address)
    return application


def _start_ray(options: argparse.Namespace, stop: _Stop) -> None:
    is_ours = stop.is_ours
    with telling("starting Ray on this machine" if is_ours else f"joining the cluster at {options.ray_address}"):
        import ray

        if not options.log_verbose:
            quieten(stop.asked)
        try:
            ray.init(
                address="local" if is_ours else _address(options.ray_address),
                num_gpus=options.num_gpus if is_ours else None,
                include_dashboard=False if is_ours else None,
                log_to_driver=bool(options.log_verbose),
                logging_level=logging.WARNING,
                runtime_env={"env_vars": environment.SETTINGS},
            )
        except Exception as error:
            if _SLOW_START in str(error):  # a busy machine, not a wrong flag
                raise ClusterLost("it has not started in the time that Ray gives it") from None
            if not is_ours and not isinstance(error, ConfigError):
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise ConfigError(f"--ray-address {options.ray_address}: {lines[0]}") from None
            raise


def _address(text: str) -> str:
    """The address of the head. Raises ConfigError if none answers there, ConnectionError if "auto" finds none."""
    if text != "auto":
        return text
    from ray._private import services

    address: str = services.canonicalize_bootstrap_address_or_die(text)
    checks.address(address)
    return address


def _run(options: argparse.Namespace, application: Options, stop: _Stop, loop: asyncio.AbstractEventLoop) -> None:
    from ray import serve

    from tutti.ray_app.app import build

    with telling("starting Ray Serve"):
        # Serve's own proxies stay off: the gateway owns the ports.
        serve.start(proxy_location="Disabled")
        store = News(RayStore(), APP)
        store.forget()
        target = serve.RunTarget(build(application), name=APP, route_prefix=None)
        stop.has_deployed = True
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
    wait_until_running(store, stop.asked)
    if stop.asked.is_set():
        return
    known = asyncio.run_coroutine_threadsafe(report_ready(handle, stop.asked), loop).result()
    stop.is_serving = True
    if options.engine_of is not None:
        options.engine_of.report(ready=True)
    telling_pools = asyncio.run_coroutine_threadsafe(tell_pools(handle, stop.asked, known), loop)
    stop.asked.wait()
    telling_pools.cancel()  # a call after Ray's shutdown would start Ray again
    _log.info("stopping: open requests may end")
    if stop.is_ours:
        finishing = asyncio.run_coroutine_threadsafe(_finish(handle), loop)
        _within(options.exit_timeout_secs, lambda: finishing.result())


async def _finish(handle: Any) -> None:
    """Have all gateways answer what they have."""
    await handle.broadcast("finish").results_async()


def application_options(options: argparse.Namespace) -> Options:
    """What the flags say to the application. Raises ConfigError naming what is wrong.

    What has not been given keeps the application's default.
    """
    flags = {name: getattr(options, name, None) for name in Options.model_fields}
    settings = {name: value for name, value in flags.items() if value is not None}
    if options.placement is not None:
        settings |= load_placement(options.placement)
    return checked({**settings, "model_repository": str(options.model_repository)})


def _stop_serving(timeout_s: float, stop: _Stop) -> None:
    """A cluster of this process's own ends with its processes, an application on another one by itself."""
    import ray
    from ray import serve

    if stop.has_deployed and not stop.is_ours:
        _within(timeout_s, lambda: serve.delete(APP))
    _within(timeout_s, ray.shutdown)


def _within(timeout_s: float, work: Callable[[], object]) -> None:
    """Run `work`, but wait no longer, nor for a cluster that has died under us: it cannot be shut down politely.

    It has where a signal went to the whole process group, as systemd and timeout(1) send it.
    """

    def run() -> None:
        try:
            work()
        except Exception as error:
            _log.debug("not all has stopped as it should: %s", error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = time.monotonic() + timeout_s
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.2)
        if processes.has_dead_children():
            deadline = min(deadline, time.monotonic() + _LAST_S)
    if thread.is_alive():
        _log.debug("the cluster is gone or does not stop: its processes are ended")


@contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own: a Serve handle needs one for as long as it lives."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="serve-handle", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=1.0)
