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
from typing import Any

from ray_app import environment, processes
from ray_app.cli import checked, load_placement
from ray_app.options import Options
from tutti.errors import ConfigError

environment.apply()  # before ray.serve is imported

_log = logging.getLogger("tutti")

APP = "tutti"
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0


def serve_on_ray(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status."""
    stop = threading.Event()
    is_ours = options.ray_address is None
    if is_ours:
        processes.adopt_orphans()
        environment.stay_on_loopback()
    status = 0
    try:
        _start_ray(options, is_ours)
        for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which sets handlers of its own
            signal.signal(number, lambda *_: stop.set())
        with _loop() as loop:
            try:
                _run(options, stop, loop)
            finally:
                _stop_serving(is_ours)
    except Exception as error:  # whatever Ray raises: the processes must be ended all the same
        _log.error("cannot serve on Ray: %s", error)
        status = 1
    finally:
        if is_ours:
            processes.end_descendants(grace_s=5.0)
    logging.shutdown()
    # Ray's own exit handlers would wait for the processes that have just been ended.
    os._exit(status)


def _start_ray(options: argparse.Namespace, is_ours: bool) -> None:
    import ray

    ray.init(
        address="local" if is_ours else options.ray_address,
        num_gpus=options.num_gpus if is_ours else None,
        include_dashboard=False if is_ours else None,
        log_to_driver=bool(options.log_verbose),
        logging_level=logging.WARNING,
        runtime_env={"env_vars": environment.SETTINGS},
    )


def _run(options: argparse.Namespace, stop: threading.Event, loop: asyncio.AbstractEventLoop) -> None:
    from ray import serve

    from ray_app.app import build

    # Serve's own proxies stay off: the gateway owns the ports.
    serve.start(proxy_location="Disabled")
    try:
        handle = serve.run(build(application_options(options)), name=APP, route_prefix=None)
    except RuntimeError as error:
        raise ConfigError(f"{error} {_reasons()}") from None
    asyncio.run_coroutine_threadsafe(_report_ready(handle, stop), loop).result()
    stop.wait()
    _log.info("stopping")


def application_options(options: argparse.Namespace) -> Options:
    """What the flags say to the application. Raises ConfigError naming what is wrong.

    What has not been given keeps the application's default.
    """
    flags = {name: getattr(options, name, None) for name in Options.model_fields}
    given = {name: value for name, value in flags.items() if value is not None}
    if options.placement is not None:
        given |= load_placement(options.placement)
    return checked({**given, "model_repository": str(options.model_repository)})


def _reasons() -> str:
    """What Serve says of each deployment that is not healthy: the constructor's error is in there."""
    from ray import serve

    application = serve.status().applications.get(APP)
    deployments = application.deployments if application else {}
    return "; ".join(f"{name}: {one.message}" for name, one in deployments.items() if one.message)


async def _report_ready(handle: Any, stop: threading.Event) -> None:
    """Say where the gateway listens, and wait for its first pool. Raises TimeoutError when none comes up."""
    taken = await handle.addresses.remote()
    ports = f"http {taken.http_port}, grpc {taken.grpc_port}, metrics {taken.metrics_port}"
    _log.info("listening on %s: %s", taken.host, ports)
    async with asyncio.timeout(READY_TIMEOUT_S):
        while not stop.is_set() and not await handle.is_ready.remote():
            await asyncio.sleep(0.1)
    _log.info("ready on Ray")


def _stop_serving(is_ours: bool) -> None:
    import ray
    from ray import serve

    _within(STOP_TIMEOUT_S, serve.shutdown if is_ours else lambda: serve.delete(APP))
    _within(STOP_TIMEOUT_S, ray.shutdown)


def _within(timeout_s: float, work: Callable[[], object]) -> None:
    """Run `work`, but wait no longer: a cluster that has died under us cannot be shut down politely.

    It has where a signal went to the whole process group, as systemd and timeout(1) send it.
    """
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    deadline = time.monotonic() + timeout_s
    while thread.is_alive() and time.monotonic() < deadline and not processes.has_dead_children():
        thread.join(0.2)
    if thread.is_alive():
        _log.warning("the cluster is gone or does not stop: ending its processes")


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
