"""The open-loop engine under Locust: workers each send a shard of the schedule, the master adds up what they saw.

    locust -f loadtest/locustfile.py --scenario SCENARIO.json --result RESULT.json [--headless] [--processes N] ...
    locust -f loadtest/locustfile.py --worker --master-host HOST [--raw FOLDER]           # on another machine

`tutti loadtest` writes the first file and starts this. Locust gives distribution, processes, the live table and the web
page; its own statistics are for watching, and what is reported is the engine's.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gevent
import gevent.subprocess
from locust import User, events, task
from locust.env import Environment
from locust.runners import STATE_MISSING, LocalRunner, MasterRunner, WorkerRunner

# The folder that has the package: of a checkout, Locust may be given loadtest/ or the link to it in tutti/.
ROOT = next(folder for folder in Path(__file__).absolute().parents if (folder / "tutti" / "__init__.py").is_file())
_BEGIN_S = 1.0
_PROGRESS_S = 0.5
# The engine's package is found wherever this file is, and nothing in the folder where a person stands shadows anything.
_ENTER = "import sys; sys.path.append(sys.argv.pop(1)); import tutti.loadtest.engine; tutti.loadtest.engine.enter()"


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    parser.add_argument("--scenario", default="", help="the scenario, as JSON; workers get it from the master")
    parser.add_argument("--result", default="", help="where the master writes what was seen")
    parser.add_argument("--raw", default="", help="folder for the raw requests, as Parquet (default: the result's)")


class OpenLoop(User):
    """Stands for a worker in Locust's tables; the engine sends."""

    @task
    def stand_by(self) -> None:
        gevent.sleep(3600)


class Engine:
    """The engine's process, seen from a worker."""

    def __init__(self, environment: Environment, scenario: dict[str, Any], shard: int, shards: int) -> None:
        self._environment = environment
        options: Any = environment.parsed_options
        folder = _raw_folder(options)
        self._scenario = scenario
        self._name = scenario["payloads"][0]["model"] if len(scenario["payloads"]) == 1 else "mixed"
        job = folder / f"job.{shard}.json"
        raw = folder / f"requests.{shard}.parquet"
        headers = scenario["target"]["headers"]
        kept = {**scenario, "target": {**scenario["target"], "headers": {}}}
        job.write_text(json.dumps({"scenario": kept, "shard": shard, "shards": shards, "raw": str(raw)}))
        self.process = gevent.subprocess.Popen(
            [sys.executable, "-P", "-c", _ENTER, str(ROOT), str(job)],
            stdin=gevent.subprocess.PIPE, stdout=gevent.subprocess.PIPE, text=True, bufsize=1, start_new_session=True,
        )  # fmt: skip
        self._tell(json.dumps(headers))

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()

    def lines(self) -> Any:
        for line in self.process.stdout:
            if line.startswith("{"):
                yield json.loads(line)

    def begin(self, start_at: float) -> None:
        self._tell(repr(start_at))

    def _tell(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def show(self, progress: dict[str, Any]) -> None:
        """In Locust's table and charts: as many as were answered, by a sample of their latencies, and their errors."""
        stats: Any = self._environment.stats
        protocol = self._scenario["target"]["protocol"]
        sample = progress["ms"] or [0.0]
        for number in range(progress["new"]):
            stats.log_request(protocol, self._name, sample[number % len(sample)], 0)
        for error, count in progress["errors"].items():
            for _ in range(count):
                stats.log_error(protocol, self._name, error)


def _raw_folder(options: Any) -> Path:
    if not options.raw and not options.result:
        return Path(tempfile.mkdtemp(prefix="tutti-loadtest-"))
    folder = Path(options.raw or Path(options.result).parent)
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def _scenario(environment: Environment) -> dict[str, Any]:
    options: Any = environment.parsed_options
    document: dict[str, Any] = json.loads(Path(options.scenario).read_text())
    return document


def follow(engine: Engine, ready: Any, ended: Any) -> None:
    """Hand on what an engine says: that it is `ready`, and how it `ended`."""
    try:
        _follow(engine, ready, ended)
    except Exception as error:
        ended({"failed": f"the run was not followed to its end: {_told(error)}"})


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _follow(engine: Engine, ready: Any, ended: Any) -> None:
    for said in engine.lines():
        if "ready" in said:
            ready()
        elif "progress" in said:
            engine.show(said["progress"])
        else:
            ended(said)
            return
    ended({"failed": f"the run was stopped before its end (the engine ended with status {engine.process.wait()})"})


class Progress:
    """How far the run is, each half second, in a file beside the result."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        options: Any = environment.parsed_options
        self._path = Path(options.result).with_name("progress.json")
        self._began_s = 0.0

    def begin(self, in_s: float) -> None:
        self._began_s = time.monotonic() + in_s

    def watch(self) -> None:
        while True:
            temporary = self._path.with_suffix(".new")
            temporary.write_text(json.dumps(self._said()))
            temporary.replace(self._path)
            gevent.sleep(_PROGRESS_S)

    def _said(self) -> dict[str, Any]:
        if not self._began_s:
            runner: Any = self._environment.runner
            options: Any = self._environment.parsed_options
            return {"workers": len(getattr(runner, "clients", ())), "wanted": getattr(options, "expect_workers", 1)}
        total: Any = self._environment.stats.total  # type: ignore[no-untyped-call]
        second = max(0.0, time.monotonic() - self._began_s)
        return {"second": second, "answered": total.num_requests, "errors": total.num_failures}


class Conductor:
    """The master: has all begin at once, and gathers what they saw."""

    def __init__(self, environment: Environment, progress: Progress) -> None:
        self._environment = environment
        self._progress = progress
        self._ready: set[str] = set()
        self._results: dict[str, Any] = {}
        self._workers: list[str] = []
        self._is_over = False

    def start(self) -> None:
        try:
            self._start()
        except Exception as error:
            finish(self._environment, [{"failed": _told(error)}])

    def _start(self) -> None:
        runner: Any = self._environment.runner
        self._ready, self._results = set(), {}
        self._workers = sorted(runner.clients)
        job = {"scenario": _scenario(self._environment), "shards": len(self._workers)}
        for number, worker in enumerate(self._workers):
            runner.send_message("open_loop", {**job, "shard": number}, client_id=worker)

    def watch(self) -> None:
        """A worker that is lost says nothing any more."""
        runner: Any = self._environment.runner
        while not self._is_over:
            gevent.sleep(1)
            there = {name for name, worker in runner.clients.items() if worker.state != STATE_MISSING}
            for lost in set(self._workers) - set(self._results) - there:
                self._end(lost, {"failed": f"worker {lost} was lost"})

    def on_ready(self, environment: Environment, msg: Any, **_: Any) -> None:
        self._ready.add(msg.node_id)
        if len(self._ready) == len(self._workers):
            runner: Any = environment.runner
            runner.send_message("open_loop_begin", {"at": time.time() + _BEGIN_S})
            self._progress.begin(_BEGIN_S)

    def on_ended(self, environment: Environment, msg: Any, **_: Any) -> None:
        self._end(msg.node_id, msg.data)

    def _end(self, worker: str, said: dict[str, Any]) -> None:
        self._results[worker] = said
        if not self._is_over and (len(self._results) == len(self._workers) or "failed" in said):
            self._is_over = True
            finish(self._environment, list(self._results.values()))


def finish(environment: Environment, results: list[Any]) -> None:
    """Write what was seen, and leave."""
    options: Any = environment.parsed_options
    path = Path(options.result)
    try:
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps({"workers": results}))
        temporary.replace(path)
    finally:  # also where the disk is full
        environment.process_exit_code = 1 if any("failed" in result for result in results) else 0
        gevent.spawn(_quit, environment)


def _quit(environment: Environment) -> None:
    runner: Any = environment.runner
    runner.quit()
    if environment.web_ui is not None:
        environment.web_ui.stop()


@events.init.add_listener
def listen(environment: Environment, **_: Any) -> None:
    runner: Any = environment.runner
    options: Any = environment.parsed_options
    if isinstance(runner, WorkerRunner):
        _listen_as_worker(environment, runner)
        return
    if not options.scenario or not options.result:
        sys.exit("locustfile.py: expected --scenario and --result: start it with `tutti loadtest run`")
    progress = Progress(environment)
    gevent.spawn(progress.watch)
    if isinstance(runner, MasterRunner):
        conductor = Conductor(environment, progress)
        runner.register_message("open_loop_ready", conductor.on_ready)
        runner.register_message("open_loop_ended", conductor.on_ended)
        events.test_start.add_listener(lambda **_: conductor.start())
        gevent.spawn(conductor.watch)
    elif isinstance(runner, LocalRunner):
        events.test_start.add_listener(lambda **_: gevent.spawn(_run_alone, environment, progress))


def _listen_as_worker(environment: Environment, runner: Any) -> None:
    engines: list[Engine] = []

    def start(environment: Environment, msg: Any, **_: Any) -> None:
        def ended(said: Any) -> None:
            runner.send_message("open_loop_ended", said)

        try:
            engine = Engine(environment, msg.data["scenario"], msg.data["shard"], msg.data["shards"])
        except Exception as error:
            ended({"failed": _told(error)})
            return
        engines.append(engine)
        gevent.spawn(follow, engine, lambda: runner.send_message("open_loop_ready"), ended)

    runner.register_message("open_loop", start)
    runner.register_message("open_loop_begin", lambda environment, msg, **_: engines[-1].begin(msg.data["at"]))
    _stop_when_stopped(engines)


def _stop_when_stopped(engines: Sequence[Engine]) -> None:
    """By hand: in the web page, or with Ctrl-C."""

    def stop(**_: Any) -> None:
        for engine in engines:
            engine.stop()

    for event in (events.test_stop, events.quitting):
        event.add_listener(stop)


def _run_alone(environment: Environment, progress: Progress) -> None:
    def begin() -> None:
        progress.begin(0.2)
        engine.begin(time.time() + 0.2)

    try:
        engine = Engine(environment, _scenario(environment), 0, 1)
    except Exception as error:
        finish(environment, [{"failed": _told(error)}])
        return
    _stop_when_stopped([engine])
    follow(engine, begin, lambda said: finish(environment, [said]))


@events.quit.add_listener
def leave(exit_code: int) -> None:
    """At once: there is nothing to wait for."""
    os._exit(exit_code)
