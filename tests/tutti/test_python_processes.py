"""What a model.py may do in a process of its own, and what its ends and errors cost: nothing but itself."""

import errno
import logging
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.models import IN_PROCESS, Repository
from tests.serving import Gather, engine_over, infer, timer, wait_until
from tests.tutti.test_isolated import has_ended
from tests.tutti.test_python_backend import Answers
from tutti.backends import completion
from tutti.backends.python import interpreter, isolated, isolated_process, isolated_questions, isolated_wire, loading
from tutti.core import rows
from tutti.core.errors import Internal, Unavailable
from tutti.core.types import Call, Columns, InferRequest, InferResponse, Tensor
from tutti.observing import custom_metrics
from tutti.serving import local, warmup
from tutti.serving.engine import Engine

CONFIG = """
backend: "python"
input { name: "x" data_type: TYPE_FP32 dims: -1 }
output { name: "y" data_type: TYPE_FP32 dims: -1 }
"""
DECOUPLED = CONFIG + "model_transaction_policy { decoupled: true }"
HEAD = """
import asyncio, os, signal, sys, threading
import numpy as np
import triton_python_backend_utils as pb_utils

def x_of(request):
    return pb_utils.get_input_tensor_by_name(request, "x").as_numpy()

def response(*values):
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array(values, np.float32))])

class TritonPythonModel:
"""
ECHO = "def execute(self, requests): return [response(*x_of(r)) for r in requests]"


def source(body: str) -> str:
    return HEAD + textwrap.indent(textwrap.dedent(body), "    ")


def add(repository: Repository, name: str, body: str, config: str = CONFIG, **files: str) -> None:
    """A model from the body of its class, with other files beside it: `helper` is helper.py."""
    repository.add(name, config, {"model.py": source(body), **{f"{stem}.py": text for stem, text in files.items()}})


def request(name: str, *values: float) -> InferRequest:
    return InferRequest(name, {"x": Tensor.of("x", np.array(values or (1.0,), np.float32))})


def ask(engine: Engine, name: str, *values: float) -> object:
    (answer,) = infer(engine, [request(name, *values)])
    return answer


def y(answer: object) -> list[float]:
    assert isinstance(answer, InferResponse), answer
    values: list[float] = answer.tensor("y").array().tolist()
    return values


def reasons(engine: Engine) -> dict[str, str]:
    """By the name of the model."""
    return {failure.split("'")[1]: failure for failure in engine.failures()}


@pytest.fixture
def engine(repository: Repository) -> Iterator[Engine]:
    """Over whatever the test has added; it loads the models itself."""
    engine = local.make_engine(repository.root, timer, lambda *_: None, is_controllable=True)  # type: ignore[arg-type]
    yield engine
    engine.close()


@pytest.mark.parametrize("extra", ["", IN_PROCESS])
def test_helpers_of_one_name_are_each_models_own(repository: Repository, engine: Engine, extra: str) -> None:
    body = "from helper import K\n" + "def execute(self, requests): return [response(self.K) for r in requests]"
    for name, number in (("a", 100), ("b", 200)):
        add(repository, name, body, CONFIG + extra, helper=f"K = {number}")
    engine.load_all()
    assert (y(ask(engine, "a")), y(ask(engine, "b"))) == ([100], [200])
    (repository.root / "a" / "1" / "helper.py").write_text("K = 300")
    engine.load("a")
    assert (y(ask(engine, "a")), y(ask(engine, "b"))) == ([300], [200])


def test_imports_work_late_relative_and_from_the_models_folder(repository: Repository, engine: Engine) -> None:
    body = """
    def execute(self, requests):
        import late
        from . import near
        from .package import inner
        import at_model
        from sub.thing import T
        return [response(late.K, near.K, inner.K, at_model.K, T) for r in requests]
    """
    add(repository, "m", body, late="K = 1", near="K = 2")
    folder = repository.root / "m"
    for path, text in {"1/package/__init__.py": "", "1/package/inner.py": "K = 3", "at_model.py": "K = 4"}.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)
    (folder / "sub").mkdir()
    (folder / "sub" / "thing.py").write_text("from at_model import K\nT = K + 1")
    engine.load_all()
    assert y(ask(engine, "m")) == [1, 2, 3, 4, 5]
    assert not list(folder.rglob("__pycache__"))


def test_event_loops_signals_and_pickles_work_as_in_a_main_thread(repository: Repository, engine: Engine) -> None:
    add(
        repository,
        "m",
        """
        def initialize(self, args):
            self.seen = 0
            signal.signal(signal.SIGUSR1, self.on_signal)

        def on_signal(self, *_):
            self.seen += 1

        def execute(self, requests):
            import pickle
            async def seven():
                return 7
            os.kill(os.getpid(), signal.SIGUSR1)
            seven = asyncio.get_event_loop().run_until_complete(seven())
            same = pickle.loads(pickle.dumps(x_of)) is x_of
            x = x_of(requests[0])
            x += 1
            return [response(seven, self.seen, same, x[0]) for r in requests]
        """,
    )
    engine.load_all()
    assert [y(ask(engine, "m", 5)) for _ in range(2)] == [[7, 1, 1, 6], [7, 2, 1, 6]]


KEEPS = """
started = None
async def execute(self, requests):
    if self.started is None:
        self.started = asyncio.Event()
        self.go = asyncio.Event()
        self.task = asyncio.create_task(self.work())
        return [response(0) for r in requests]
    self.go.set()
    await self.task
    return [response(1) for r in requests]

async def work(self):
    await self.go.wait()
"""


@pytest.mark.parametrize("extra", ["", IN_PROCESS])
def test_a_task_lives_from_one_execution_to_the_next(repository: Repository, engine: Engine, extra: str) -> None:
    add(repository, "m", KEEPS, CONFIG + extra)
    engine.load_all()
    assert [y(ask(engine, "m")) for _ in range(2)] == [[0], [1]]


MEET = """
waiting = None
async def execute(self, requests):
    if self.waiting is None:
        self.waiting = asyncio.Event()
    for request in requests:
        sender = request.get_response_sender()
        if x_of(request)[0] == 1:
            await self.waiting.wait()
        self.waiting.set()
        sender.send(response(*x_of(request)))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


@pytest.mark.parametrize("extra", ["", IN_PROCESS])
def test_coroutines_of_a_decoupled_model_run_side_by_side(repository: Repository, engine: Engine, extra: str) -> None:
    add(repository, "m", MEET, DECOUPLED + extra)
    engine.load_all()
    first, second = Answers(), Answers()
    engine([first.call(request("m", 1))])  # waits for the second
    engine([second.call(request("m", 2))])
    first.gather.wait()
    second.gather.wait()
    assert [len(each.emitted) for each in (first, second)] == [1, 1]


ENDS = ["sys.exit(3)", "raise KeyboardInterrupt", "raise asyncio.CancelledError", "raise GeneratorExit", "raise Silent"]
SILENT = """
class Silent(BaseException):
    def __str__(self): raise ValueError
"""
RAISES = """
ways = {ways}
def execute(self, requests):
    way = int(x_of(requests[0])[0])
    if way < 0:
        return [response(*x_of(r)) for r in requests]
    exec(self.ways[way], globals())
async def nothing(self): pass
"""


@pytest.mark.parametrize("extra", ["", IN_PROCESS])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_whatever_execute_raises_is_an_error_of_its_batch(
    repository: Repository, engine: Engine, extra: str, asynchronous: bool
) -> None:
    body = RAISES.format(ways=ENDS)
    body = body.replace("def execute", "async def execute") if asynchronous else body
    repository.add("m", CONFIG + extra, {"model.py": SILENT + source(body)})
    engine.load_all()
    says = ["SystemExit: 3", "KeyboardInterrupt: ", "CancelledError: ", "GeneratorExit: ", "Silent, whose text cannot"]
    for way, text in enumerate(says):
        answer = ask(engine, "m", way)
        assert isinstance(answer, Internal)
        assert f"model 'm': execute raised {text}" in answer.message
    assert y(ask(engine, "m", -1)) == [-1]


@pytest.mark.parametrize("extra", ["", IN_PROCESS])
@pytest.mark.parametrize("body", ["def initialize(self, args): sys.exit(4)\n" + ECHO, "sys.exit(4)"])
def test_an_exit_in_a_load_is_that_models_failure(
    repository: Repository, engine: Engine, extra: str, body: str
) -> None:
    add(repository, "good", ECHO)
    add(repository, "bad", body, CONFIG + extra)
    engine.load_all()
    (failure,) = reasons(engine).values()
    assert failure == "model 'bad': model.py failed to load: SystemExit: 4"
    assert y(ask(engine, "good", 2)) == [2]


def test_the_end_of_a_process_is_told_with_its_status(repository: Repository, engine: Engine) -> None:
    add(repository, "m", "def initialize(self, args): os._exit(5)\n" + ECHO)
    engine.load_all()
    (failure,) = reasons(engine).values()
    assert failure == "model 'm': its process ended while it started (status 5)"


def test_an_exit_in_finalize_ends_nothing_else(repository: Repository) -> None:
    for name, extra in (("a", ""), ("b", IN_PROCESS)):
        add(repository, name, ECHO + "\ndef finalize(self): sys.exit(1)", CONFIG + extra)
    with engine_over(repository.root) as engine:
        assert y(ask(engine, "a", 1)) == y(ask(engine, "b", 1)) == [1]


FORKS = """
def execute(self, requests):
    way = x_of(requests[0])[0]
    if way == 1:  # both return
        os.fork()
    if way == 2:  # a helper that has all that this has, and outlives it
        reading, writing = os.pipe()
        if os.fork() == 0:
            signal.pause()
        os._exit(7)
    return [response(os.getpid()) for r in requests]
"""


def test_what_a_model_forks_neither_answers_nor_hides_its_death(repository: Repository, engine: Engine) -> None:
    add(repository, "m", FORKS)
    engine.load_all()
    (before,) = y(ask(engine, "m", 0))
    assert [y(ask(engine, "m", 1)) for _ in range(3)] == [[before]] * 3
    dead = ask(engine, "m", 2)
    assert isinstance(dead, Unavailable)
    assert "model 'm': its process ended while it executed (status 7) and is started anew" in dead.message
    assert y(ask(engine, "m", 0)) != [before]


SIDE = """
def initialize(self, args):
    family = pb_utils.MetricFamily("of_processes", "For a test.", pb_utils.MetricFamily.COUNTER)
    self.metric = family.Metric({"model": "m"})

def execute(self, requests):
    pb_utils.Logger.log_warn("told by a model")
    self.metric.increment(2)
    inner = pb_utils.InferenceRequest(
        model_name="inner", inputs=[pb_utils.Tensor("x", x_of(requests[0]) * 2)], requested_output_names=["y"])
    answer = inner.exec()
    y = pb_utils.get_output_tensor_by_name(answer, "y").as_numpy()
    return [response(*y, self.metric.value()) for r in requests]
"""


def test_metrics_logs_and_other_models_are_the_servers(
    repository: Repository, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    add(repository, "m", SIDE)
    add(repository, "inner", ECHO, CONFIG + IN_PROCESS)
    engine.load_all()
    large = list(range(50_000))
    with caplog.at_level(logging.WARNING):
        answers = [y(ask(engine, "m", *large)) for _ in range(2)]
    assert [answer[-1] for answer in answers] == [2, 4]
    assert answers[0][:-1] == [2.0 * each for each in large]
    assert caplog.messages.count("told by a model") == 2
    (family,) = [each for each in custom_metrics.collect() if each.name == "of_processes"]
    assert [(sample.labels, sample.value) for sample in family.samples] == [({"model": "m"}, 4)]


COUNTS = """
def initialize(self, args):
    family = pb_utils.MetricFamily("of_answers", "For a test.", pb_utils.MetricFamily.COUNTER)
    self.metric = family.Metric({"model": "m"})

def execute(self, requests):
    self.metric.increment(len(requests))
    return [response(1) for r in requests]
"""


def test_an_answer_comes_after_what_was_counted_for_it(
    repository: Repository, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = isolated_questions.Questions.on_metric

    def take_late(self: isolated_questions.Questions, *change: Any) -> None:
        time.sleep(0.2)  # answers have a channel of their own, and overtake
        take(self, *change)

    monkeypatch.setattr(isolated_questions.Questions, "on_metric", take_late)
    add(repository, "m", COUNTS)
    engine.load_all()
    for turn in (1, 2):
        assert y(ask(engine, "m")) == [1.0]
        (family,) = [each for each in custom_metrics.collect() if each.name == "of_answers"]
        assert [sample.value for sample in family.samples] == [turn]


GOES_ON = """
def execute(self, requests):
    for request in requests:
        threading.Thread(target=self.answer, args=(request, request.get_response_sender())).start()

def answer(self, request, sender):
    while not request.is_cancelled():
        sender.send(response(1))
    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def test_a_model_sees_that_its_caller_has_gone_and_its_death_ends_its_streams(
    repository: Repository, engine: Engine
) -> None:
    ends = GOES_ON.replace("sender.send(response(1))\n", "sender.send(response(1))\n        os._exit(9)\n")
    add(repository, "goes_on", GOES_ON, DECOUPLED)
    add(repository, "ends", ends, DECOUPLED)
    engine.load_all()
    gather, first = Gather(1), threading.Event()
    call = Call(request("goes_on"), gather, None, lambda _: first.set())
    engine([call])
    assert first.wait(30)
    call.is_cancelled = True
    gather.wait()
    assert isinstance(call.answer, InferResponse) and call.answer.is_null
    answers = Answers()
    dying = answers.call(request("ends"))
    engine([dying])
    answers.gather.wait()
    assert isinstance(dying.answer, Unavailable) and "status 9" in dying.answer.message


def environment(folder: Path, version: str = "") -> Path:
    """A virtual environment with a package that only it has."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "only_here.py").write_text("K = 42")
    if version:
        (folder / "bin" / "python").unlink()
        (folder / "bin" / "python").write_text(f"#!/bin/sh\necho {version}\n")
        (folder / "bin" / "python").chmod(0o755)
    return folder


def with_environment(path: str) -> str:
    return CONFIG + f'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{path}" }} }}'


NEEDS = """
def execute(self, requests):
    import only_here
    return [response(only_here.K) for r in requests]
"""


def test_an_environment_of_its_own_is_honoured(repository: Repository, engine: Engine, tmp_path: Path) -> None:
    folder = environment(tmp_path / "environment")
    add(repository, "folder", NEEDS, with_environment(str(folder)))
    add(repository, "archive", NEEDS, with_environment("$$TRITON_MODEL_DIRECTORY/environment.tar.gz"))
    with tarfile.open(repository.root / "archive" / "environment.tar.gz", "w:gz") as archive:
        archive.add(folder, ".")
    engine.load_all()
    assert not engine.failures()
    assert y(ask(engine, "folder")) == y(ask(engine, "archive")) == [42]


def test_an_environment_that_cannot_be_used_is_refused(repository: Repository, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "no.tar.gz").write_bytes(b"no archive")
    add(repository, "absent", NEEDS, with_environment("/no/such/environment.tar.gz"))
    add(repository, "broken", NEEDS, with_environment(str(tmp_path / "no.tar.gz")))
    add(repository, "older", NEEDS, with_environment(str(environment(tmp_path / "older", "3.8"))))
    add(repository, "here", NEEDS, with_environment("/no/such/environment.tar.gz") + IN_PROCESS)
    engine.load_all()
    said = reasons(engine)
    assert "model 'absent': parameters.EXECUTION_ENV_PATH: '/no/such/environment.tar.gz': no such" in said["absent"]
    assert "model 'broken': parameters.EXECUTION_ENV_PATH" in said["broken"]
    assert f"expected Python 3.{sys.version_info.minor}, as the server's, got 3.8" in said["older"]
    assert "does not go with parameters.EXECUTION_ENV_PATH" in said["here"]


def test_a_configuration_is_completed_in_a_process(repository: Repository, engine: Engine) -> None:
    body = "@staticmethod\ndef auto_complete_config(config):\n    {}\n    return config\n" + ECHO
    fills = (
        "config.add_input({'name': 'x', 'data_type': 'TYPE_FP32', 'dims': [-1]});"
        "config.add_output({'name': 'y', 'data_type': 'TYPE_FP32', 'dims': [-1]})"
    )
    add(repository, "good", body.format(fills), 'backend: "python"')
    add(repository, "exits", body.format("sys.exit(3)"), 'backend: "python"')
    add(repository, "ends", body.format("os._exit(3)"), 'backend: "python"')
    # A helper has all that the process has, and outlives it.
    add(repository, "forks", body.format("os.fork() or signal.pause(); os._exit(4)"), 'backend: "python"')
    engine.load_all()
    assert y(ask(engine, "good", 3)) == [3]
    said = reasons(engine)
    assert "model.py could not complete its configuration: SystemExit: 3" in said["exits"]
    assert "model.py could not complete its configuration: its process ended (status 3)" in said["ends"]
    assert "model.py could not complete its configuration: its process ended (status 4)" in said["forks"]


PAUSES = """
@staticmethod
def auto_complete_config(config):
    open(os.path.join(os.path.dirname(__file__), "pid"), "w").write(f"{os.getpid()} ")
    signal.pause()
"""


def test_a_configuration_that_is_never_completed_is_not_waited_for(
    repository: Repository, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "OWN_CODE_HANG_TIMEOUT_S", 0.5)
    add(repository, "m", PAUSES, 'backend: "python"')
    engine.load_all()
    assert "its configuration: it did not end within 0.5 s" in reasons(engine)["m"]


def test_a_process_that_completes_a_configuration_ends_with_the_server(repository: Repository) -> None:
    add(repository, "m", PAUSES, 'backend: "python"')
    told = repository.root / "m" / "1" / "pid"
    code = "import pathlib, sys, tutti.backends.completion as c; c.open_model(pathlib.Path(sys.argv[1]), 'm')"
    command = [sys.executable, "-c", code, str(repository.root)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as server:
        wait_until(lambda: told.exists() and told.read_text().endswith(" "), 60)
        server.kill()
    pid = int(told.read_text())
    try:
        wait_until(lambda: has_ended(pid))
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        raise


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("model_transaction_policy { decoupled: true }", "reshape: is not supported for a decoupled model"),
        ("model_warmup { name: 'w' inputs { key: 'x' value { data_type: TYPE_FP32 dims: 1 zero_data: true } } }", ""),
    ],
)
def test_a_load_that_is_refused_late_leaves_no_process(
    repository: Repository, engine: Engine, monkeypatch: pytest.MonkeyPatch, extra: str, says: str
) -> None:
    def exits(*_: object) -> None:
        raise SystemExit(3)

    monkeypatch.setattr(warmup, "run", exits)
    config = CONFIG.replace("dims: -1 }", "dims: 1 reshape { shape: [] } }", 1)
    add(repository, "m", ECHO, f"{config} {extra}")
    before = set(psutil.Process().children())
    engine.load_all()
    assert (says or "SystemExit: 3") in reasons(engine)["m"]
    assert set(psutil.Process().children()) <= before


def test_one_that_is_given_up_while_it_starts_again_does_not_stay(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(repository, "m", ECHO)
    folder = completion.open_model(repository.root, "m")
    (backend,) = loading.load(folder, 1, lambda _: None)
    assert isinstance(backend, isolated.IsolatedBackend)
    started, go = threading.Event(), threading.Event()
    process = isolated_process.ModelProcess

    def slow(*given: Any) -> isolated_process.ModelProcess:
        made = process(*given)
        started.set()
        assert go.wait(60)
        return made

    monkeypatch.setattr(isolated, "ModelProcess", slow)
    before = backend._process
    assert before is not None
    before.kill()
    call = Answers().call(request("m"))
    with ThreadPoolExecutor(1) as thread:
        executing = thread.submit(backend.execute, [call])
        assert started.wait(60)
        backend.give_up()
        go.set()
        with pytest.raises(Unavailable, match="given up while it started"):
            executing.result(60)
    assert backend._process is not None and backend._process.has_ended()
    backend.close()


LOSES_ITS_CHANNEL = """
def execute(self, requests):
    import logging, socket
    self.senders = [each.get_response_sender() for each in requests]
    number = logging.getLogger().handlers[0]._server._channel.fileno()
    {}
"""
SHUTS = "socket.socket(fileno=os.dup(number)).shutdown(socket.SHUT_RDWR)"
CLOSES = "os.close(number); threading.Thread(target=self.senders[0].send, args=[response(1)]).start()"


@pytest.mark.parametrize("way", [SHUTS, CLOSES])
def test_one_that_can_say_nothing_any_more_is_ended(
    repository: Repository, engine: Engine, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(isolated_process, "LEAVE_TIMEOUT_S", 0.1)
    add(repository, "m", LOSES_ITS_CHANNEL.format(way), DECOUPLED)
    engine.load_all()
    answers = Answers()
    call = answers.call(request("m"))
    engine([call])
    answers.gather.wait()
    assert isinstance(call.answer, Unavailable) and "its process ended" in call.answer.message


def test_what_cannot_be_started_whole_leaves_nothing(
    repository: Repository, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there are no more descriptors."""
    started: list[subprocess.Popen[bytes]] = []
    start = interpreter.Command.start

    def noted(command: interpreter.Command, *given: Any) -> Any:
        process, lifeline = start(command, *given)
        started.append(process)
        return process, lifeline

    def fails(_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(interpreter.Command, "start", noted)
    monkeypatch.setattr(os, "pidfd_open", fails)
    add(repository, "m", ECHO)
    before = set(os.listdir("/proc/self/fd"))
    engine.load_all()
    assert "Too many open files" in reasons(engine)["m"]
    assert [process.returncode for process in started] == [-signal.SIGKILL]
    assert set(os.listdir("/proc/self/fd")) == before


def test_one_that_dies_while_idle_is_replaced_by_the_next_request(repository: Repository, engine: Engine) -> None:
    ends = "def execute(self, requests):\n    threading.Timer(0.01, os._exit, [3]).start()\n"
    add(repository, "m", ends + "    return [response(os.getpid())]")
    engine.load_all()
    (first,) = y(ask(engine, "m"))
    wait_until(lambda: not Path(f"/proc/{int(first)}").exists())
    assert y(ask(engine, "m")) != [first]


KEEPS_INPUTS = """
def initialize(self, args): self.kept = []
def execute(self, requests):
    self.kept.append(x_of(requests[0]))
    return [response(*np.concatenate(self.kept)[::10_000])]
"""


def test_what_a_model_or_a_caller_keeps_stays_what_it_was(repository: Repository, engine: Engine) -> None:
    add(repository, "m", KEEPS_INPUTS)
    add(repository, "echo", "def execute(self, requests): return [response(*(x_of(r) + 1)) for r in requests]")
    engine.load_all()
    for count in range(1, 4):
        expected = [float(each) for each in range(1, count + 1) for _ in range(2)]
        assert y(ask(engine, "m", *[count] * 20_000)) == expected
    answers = [ask(engine, "echo", *[count] * 20_000) for count in range(4)]
    assert [set(y(answer)) for answer in answers] == [{1}, {2}, {3}, {4}]


UNSAYABLE = """
def execute(self, requests):
    way, lone = int(x_of(requests[0])[0]), chr(0xD800)
    if way == 0:
        raise ValueError(lone)
    error = [None, pb_utils.TritonError(lone), 7, None, None][way]
    parameters = {lone: lone} if way == 3 else {}
    y = np.ones(1, np.complex64 if way == 4 else np.float32)
    return [pb_utils.InferenceResponse([pb_utils.Tensor("y", y)], error=error, parameters=parameters)]
"""


@pytest.mark.parametrize("extra", ["", IN_PROCESS])
def test_what_no_protocol_can_say_is_said_otherwise(repository: Repository, engine: Engine, extra: str) -> None:
    add(repository, "m", UNSAYABLE, CONFIG + extra)
    engine.load_all()
    answers = [ask(engine, "m", way) for way in range(5)]
    messages = [answer.message for answer in answers if isinstance(answer, Internal)]
    assert messages == [
        "Failed to process the request(s) for model 'm': execute raised ValueError: \\ud800",
        "\\ud800",
        "model 'm': a response's error: expected a TritonError, got a int",
        "model 'm': response parameters: expected numbers, text and booleans",
        "model 'm': numpy dtype complex64 has no Triton datatype",
    ]


def test_a_part_of_a_batch_travels_as_its_own_rows() -> None:
    """Another's answer, made in one batch with others', comes by itself to who has asked for it."""
    columns = Columns([Tensor.of("y", np.arange(6, dtype=np.float32).reshape(3, 2))])
    answers = rows.parts("m", "1", columns, [1, 2])
    for sent in ([answers[0]], [answers[1]], answers, answers[::-1]):
        got = isolated_wire.unpack_answers(isolated_wire.pack_answers(sent))
        for a, b in zip(sent, got, strict=True):
            assert isinstance(b, InferResponse)
            assert b.tensor("y").array().tolist() == a.tensor("y").array().tolist()


def test_messages_are_put_together_as_their_bytes_come() -> None:
    chosen = random.Random(7)
    sent = [chosen.randbytes(chosen.choice([0, 1, 5, 300, 20_000, 70_000])) for _ in range(60)]
    frames = [
        struct.pack("!iQ", -1, len(each)) + each if chosen.random() < 0.2 else struct.pack("!i", len(each)) + each
        for each in sent
    ]
    stream, ours, theirs = b"".join(frames), *socket.socketpair()
    with ours, theirs:
        incoming, got = isolated_wire.Incoming(ours), []
        assert incoming.read() == []
        while stream:
            size = chosen.choice([1, 3, 4, 13, 5000, 50_000])
            theirs.sendall(stream[:size])
            stream = stream[size:]
            got += incoming.read()
        while len(got) < len(sent):
            got += incoming.read()
        assert got == sent
        theirs.sendall(struct.pack("!i", 10) + b"half")
        assert incoming.read() == [], "who stops in the midst of a message has not gone"
        theirs.close()
        with pytest.raises(EOFError):
            incoming.read()
