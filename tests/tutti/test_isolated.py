"""Python models in processes of their own: answers as in process, a death that hurts one batch, and no process left."""

import contextlib
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.models import Repository
from tests.serving import Gather, engine_over, infer, wait_until
from tests.tutti.test_pytorch_backend import load_error
from tutti.core.errors import DeviceLost, Internal, InvalidArgument, Unavailable
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.devices.health import health
from tutti.serving.engine import Engine

CONFIG = """
backend: "python" max_batch_size: 4
input { name: "x" data_type: TYPE_STRING dims: 1 }
output { name: "y" data_type: TYPE_STRING dims: 1 }
output { name: "pid" data_type: TYPE_INT64 dims: 1 }
instance_group { count: 1 kind: KIND_CPU }
parameters { key: "tutti.isolate" value { string_value: "process" } }
"""
MODEL = """
import ctypes, os, threading
x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
if x[0, 0] == b"die":
    os.kill(os.getpid(), 9)
if x[0, 0].startswith(b"hang"):
    print("hangs", flush=True)
if x[0, 0] == b"hang":
    threading.Event().wait()
if x[0, 0] == b"hang with the lock":
    ctypes.PyDLL(None).pause()
if x[0, 0] == b"assert":
    raise RuntimeError("CUDA error: device-side assert triggered")
if x[0, 0] == b"refuse":
    return pb_utils.InferenceResponse(error=pb_utils.TritonError("no", pb_utils.TritonError.INVALID_ARG))
if x[0, 0] == b"raise":
    raise ValueError("broken")
if x[0, 0] == b"log":
    pb_utils.Logger.log_verbose("one of many words")
pid = pb_utils.Tensor("pid", np.full((len(x), 1), os.getpid()))
return pb_utils.InferenceResponse([pb_utils.Tensor("y", x + b"!"), pid], parameters={"p": 1})
"""


@pytest.fixture
def engine(repository: Repository) -> Iterator[Engine]:
    repository.add_python("m", CONFIG, MODEL)
    before = set(psutil.Process().children(recursive=True))
    with engine_over(repository.root) as engine:
        yield engine
    wait_until(lambda: set(psutil.Process().children(recursive=True)) <= before)


def request(text: bytes) -> InferRequest:
    return InferRequest("m", {"x": Tensor.of("x", np.array([[text]], dtype=object))})


def ask(engine: Engine, text: bytes) -> object:
    (answer,) = infer(engine, [request(text)])
    return answer


def pid_of(answer: object) -> int:
    assert isinstance(answer, InferResponse), answer
    return int(answer.tensor("pid").array()[0, 0])


def limited(seconds: str) -> str:
    """The configuration with a limit for hangs."""
    return CONFIG + f'parameters {{ key: "tutti.hang_timeout_s" value {{ string_value: "{seconds}" }} }}\n'


def test_it_answers_from_another_process(engine: Engine) -> None:
    answer = ask(engine, "grüße".encode())
    assert isinstance(answer, InferResponse), answer
    assert answer.tensor("y").array().tolist() == [["grüße!".encode()]]
    assert answer.tensor("pid").array()[0, 0] != os.getpid()
    assert answer.parameters == {"p": 1}


def test_errors_come_back_as_what_they_are(engine: Engine) -> None:
    refused = ask(engine, b"refuse")
    assert isinstance(refused, InvalidArgument) and refused.message == "no"
    raised = ask(engine, b"raise")
    assert isinstance(raised, Internal) and "ValueError: broken" in raised.message


def test_its_log_follows_the_servers(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    for level, count in ((logging.INFO, 0), (logging.DEBUG, 1), (logging.INFO, 1), (logging.DEBUG, 2)):
        with caplog.at_level(level):
            ask(engine, b"log")
            wait_until(lambda count=count: caplog.text.count("one of many words") >= count)  # type: ignore[misc]
    assert caplog.text.count("one of many words") == 2


def test_its_death_fails_its_batch_only_and_it_comes_back(engine: Engine) -> None:
    dead = ask(engine, b"die")
    assert isinstance(dead, Unavailable)
    assert "model 'm': its process ended while it executed (status -9) and is started anew" in dead.message
    assert isinstance(ask(engine, b"on"), InferResponse)


def test_one_that_is_killed_between_batches_is_noticed(engine: Engine) -> None:
    os.kill(pid_of(ask(engine, b"a")), signal.SIGKILL)
    ask(engine, b"b")
    assert isinstance(ask(engine, b"c"), InferResponse)


def test_what_cannot_start_is_told(repository: Repository) -> None:
    repository.add_python("m", CONFIG, MODEL, initialize="raise RuntimeError('no licence')")
    assert "model 'm': model.py failed to load: RuntimeError: no licence" in load_error(repository)


@pytest.mark.parametrize("text", [b"hang", b"hang with the lock"])
def test_one_that_hangs_is_ended_and_comes_back(repository: Repository, text: bytes) -> None:
    repository.add_python("m", limited("0.5"), MODEL)
    with engine_over(repository.root) as engine:
        before = pid_of(ask(engine, b"a"))
        hung = ask(engine, text)
        assert isinstance(hung, Internal)
        says = "model 'm': its process did not answer for 0.5 s (parameters.tutti.hang_timeout_s) and is started anew"
        assert hung.message == says
        assert pid_of(ask(engine, b"b")) != before
        assert not psutil.pid_exists(before)


def test_one_that_stops_reading_is_ended_too(repository: Repository) -> None:
    repository.add_python("m", limited("0.5"), MODEL)
    with engine_over(repository.root) as engine:
        os.kill(pid_of(ask(engine, b"a")), signal.SIGSTOP)
        assert isinstance(ask(engine, b"more than a socket holds" * 100_000), Internal)
        assert isinstance(ask(engine, b"b"), InferResponse)


def test_without_a_limit_it_may_take_any_time(repository: Repository, tmp_path: Path) -> None:
    head, tail = MODEL.split("pid =")
    waits = (
        head + f"while not os.path.exists({str(tmp_path / 'go')!r}):\n    threading.Event().wait(0.01)\npid =" + tail
    )
    repository.add_python("m", limited("0"), waits)
    with engine_over(repository.root) as engine:
        gather = Gather(1)
        call = Call(request(b"a"), gather)
        engine([call])
        (tmp_path / "go").touch()
        gather.wait()
        assert isinstance(call.answer, InferResponse)


@pytest.mark.parametrize("seconds", ["soon", "-1", "inf", "nan"])
def test_a_wrong_limit_is_refused(repository: Repository, seconds: str) -> None:
    repository.add_python("m", limited(seconds), MODEL)
    says = f"model 'm': parameters.tutti.hang_timeout_s: expected seconds, 0 for no limit, got '{seconds}'"
    assert says in load_error(repository)


def test_a_limit_for_what_cannot_be_ended_is_refused(repository: Repository) -> None:
    repository.add_python("m", limited("1").replace('"process"', '"no"'), MODEL)
    error = load_error(repository)
    assert "model 'm': parameters.tutti.hang_timeout_s: is for models in processes of their own" in error
    assert "parameters.tutti.isolate" in error


def test_one_that_loses_its_device_is_replaced(engine: Engine) -> None:
    before = pid_of(ask(engine, b"a"))
    lost = ask(engine, b"assert")
    assert isinstance(lost, DeviceLost)
    assert "model 'm': device cuda:0 has failed: RuntimeError: CUDA error: device-side assert" in lost.message
    assert pid_of(ask(engine, b"b")) != before
    assert health.failures() == {}  # its context was its own


@pytest.mark.gpu
def test_one_that_loses_a_real_device_is_replaced(repository: Repository) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    body = MODEL.replace(
        'raise RuntimeError("CUDA error: device-side assert triggered")',
        "import torch; torch.zeros(4, 4, device='cuda')[torch.tensor([2**40], device='cuda')].cpu()",
    )
    repository.add_python("m", CONFIG, body)
    with engine_over(repository.root) as engine:
        before = pid_of(ask(engine, b"a"))
        lost = ask(engine, b"assert")
        assert isinstance(lost, DeviceLost), lost
        assert pid_of(ask(engine, b"b")) != before
        assert torch.ones(1, device="cuda").item() == 1.0  # this process has a context of its own


def gated(tmp_path: Path) -> str:
    """An initialize that the second time waits for a file."""
    return (
        f"import os, threading\nif os.path.exists({str(tmp_path / 'begun')!r}):\n"
        f"    while not os.path.exists({str(tmp_path / 'go')!r}):\n        threading.Event().wait(0.01)\n"
        f"open({str(tmp_path / 'begun')!r}, 'w').close()"
    )


def test_callers_do_not_wait_for_the_new_process(repository: Repository, tmp_path: Path) -> None:
    repository.add_python("m", CONFIG, MODEL, gated(tmp_path))
    with engine_over(repository.root) as engine:
        assert isinstance(ask(engine, b"die"), Unavailable)  # while the new one cannot start
        (tmp_path / "go").touch()
        assert isinstance(ask(engine, b"a"), InferResponse)


def test_one_that_hangs_while_it_starts_again_is_tried_again(repository: Repository, tmp_path: Path) -> None:
    repository.add_python("m", limited("0.1"), MODEL, gated(tmp_path))
    with engine_over(repository.root) as engine:
        assert isinstance(ask(engine, b"die"), Unavailable)
        late = ask(engine, b"a")
        assert isinstance(late, Unavailable)
        assert "model 'm': its process did not start within" in late.message
        assert "it is tried again with the next request" in late.message
        (tmp_path / "go").touch()
        wait_until(lambda: isinstance(ask(engine, b"b"), InferResponse))


SERVER = """
import sys
from pathlib import Path
from tests.serving import engine_over, infer
from tests.tutti.test_isolated import ask, pid_of
with engine_over(Path(sys.argv[1])) as engine:
    print(pid_of(ask(engine, b"a")), flush=True)
    ask(engine, sys.argv[2].encode())
"""


def has_ended(pid: int) -> bool:
    """Its entry may stay for as long as nobody asks for its status."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("text", ["hang", "hang with the lock"])
def test_when_the_server_dies_its_processes_do_whatever_they_do(repository: Repository, text: str) -> None:
    repository.add_python("m", limited("0"), MODEL)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SERVER, str(repository.root), text]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert server.stdout.readline() == b"hangs\n"
        assert not has_ended(pid)
        server.kill()
    try:
        wait_until(lambda: has_ended(pid))
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        raise


def test_a_server_with_many_files_open_starts_processes(repository: Repository) -> None:
    """Numbers from 1,024 on are none that `select` takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    repository.add_python("m", CONFIG, "return pb_utils.InferenceResponse([])")
    with contextlib.ExitStack() as opened:
        if soft < 2048:
            resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
            opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            opened.enter_context(open(os.devnull))
        with engine_over(repository.root) as engine:
            assert engine.failures() == []
