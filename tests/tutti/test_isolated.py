"""Python models in processes of their own: answers as in process, a death that hurts one batch, and no process left."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from tests.models import Repository
from tests.serving import engine_over, infer, wait_until
from tests.tutti.test_pytorch_backend import load_error
from tutti.engine import Engine
from tutti.errors import Internal, InvalidArgument, Unavailable
from tutti.types import InferRequest, InferResponse, Tensor

CONFIG = """
backend: "python" max_batch_size: 4
input { name: "x" data_type: TYPE_STRING dims: 1 }
output { name: "y" data_type: TYPE_STRING dims: 1 }
output { name: "pid" data_type: TYPE_INT64 dims: 1 }
instance_group { count: 1 kind: KIND_CPU }
parameters { key: "tutti.isolate" value { string_value: "process" } }
"""
MODEL = """
import os
x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
if x[0, 0] == b"die":
    os.kill(os.getpid(), 9)
if x[0, 0] == b"refuse":
    return pb_utils.InferenceResponse(error=pb_utils.TritonError("no", pb_utils.TritonError.INVALID_ARG))
if x[0, 0] == b"raise":
    raise ValueError("broken")
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


def ask(engine: Engine, text: bytes) -> object:
    (answer,) = infer(engine, [InferRequest("m", {"x": Tensor.of("x", np.array([[text]], dtype=object))})])
    return answer


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


def test_its_death_fails_its_batch_only_and_it_comes_back(engine: Engine) -> None:
    dead = ask(engine, b"die")
    assert isinstance(dead, Unavailable)
    assert "model 'm': its process ended while it executed (status -9) and has been started anew" in dead.message
    assert isinstance(ask(engine, b"on"), InferResponse)


def test_one_that_is_killed_between_batches_is_noticed(engine: Engine) -> None:
    first = ask(engine, b"a")
    assert isinstance(first, InferResponse)
    os.kill(int(first.tensor("pid").array()[0, 0]), signal.SIGKILL)
    ask(engine, b"b")
    assert isinstance(ask(engine, b"c"), InferResponse)


def test_what_cannot_start_is_told(repository: Repository) -> None:
    repository.add_python("m", CONFIG, MODEL, initialize="raise RuntimeError('no licence')")
    assert "model 'm': model.py failed to load: RuntimeError: no licence" in load_error(repository)
