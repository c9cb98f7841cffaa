"""The rate limiter in a server: instances wait in their threads for what they share."""

import random
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.models import IN_PROCESS, Repository, onnx_add_one
from tests.serving import Gather, engine_over, infer, timer, wait_until
from tutti import ensembles
from tutti.app.cli import main
from tutti.app.restarts import UNUSABLE
from tutti.core.errors import ConfigError
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.repository import config
from tutti.repository.policies import NO_LIMIT, RateLimit, Resource
from tutti.scheduling.rate_limit_threads import RateLimits
from tutti.scheduling.rate_limiting import parse_supply
from tutti.serving import local

TENSORS = 'input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" data_type: TYPE_FP32 dims: 1 }'
WAIT_S = 30


def limited(resources: str, more: str = "", count: int = 1) -> str:
    return f"instance_group {{ count: {count} rate_limiter {{ {resources} {more} }} }}"


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("", NO_LIMIT),
        ("rate_limiter { }", NO_LIMIT),
        ("rate_limiter { priority: 0 }", NO_LIMIT),
        ("rate_limiter { priority: 3 }", RateLimit((), 3)),
        (
            'rate_limiter { resources [ { name: "R" count: 4 }, { name: "G" count: 2 global: true } ] priority: 2 }',
            RateLimit((Resource("R", 4), Resource("G", 2, is_global=True)), 2),
        ),
    ],
)
def test_the_configuration_is_parsed(text: str, limit: RateLimit) -> None:
    parsed = config.parse(f'backend: "python" {TENSORS} instance_group {{ {text} }}', "m")
    assert parsed.instance_groups[0].rate_limit == limit


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ('{ name: "R" }', "resources[0].count: expected 1 or more, got 0"),
        ("{ count: 1 }", "resources[0].name: expected names, each once, got ['']"),
        (
            '{ name: "R" count: 1 }, { name: "R" count: 2 }',
            "resources[0].name: expected names, each once, got ['R', 'R']",
        ),
    ],
)
def test_a_configuration_that_is_wrong_is_refused(resources: str, says: str) -> None:
    groups = f"instance_group {{ }} instance_group {{ rate_limiter {{ resources [ {resources} ] }} }}"
    with pytest.raises(ConfigError) as refusal:
        config.parse(f'backend: "python" {TENSORS} {groups}', "m")
    assert str(refusal.value) == f"model 'm': instance_group[1].rate_limiter.{says}"


def test_without_the_flag_a_limited_model_is_refused(repository: Repository) -> None:
    groups = "instance_group { }" + limited("priority: 2")
    repository.add("m", f'backend: "python" {TENSORS} {groups}', {"model.py": "raise SystemError('it was imported')"})
    with engine_over(repository.root) as engine:
        needs = "needs a server with --rate-limit=execution_count, in one process"
        assert engine.failures() == [f"model 'm': instance_group[1].rate_limiter: {needs}"]


def test_a_need_beyond_the_supply_is_refused_and_leaves_nothing(repository: Repository) -> None:
    groups = limited('resources { name: "R" count: 1 }') + limited('resources { name: "R" count: 3 }')
    files: dict[str, str | bytes] = {"model.onnx": onnx_add_one(1)}
    repository.add("m", f'backend: "onnxruntime" max_batch_size: 1 {TENSORS} {groups}', files)
    limits = RateLimits(parse_supply(["R:2"]))
    engine = local.make_engine(repository.root, timer, ensembles.load, limits=limits)
    engine.load_all()
    (reason,) = engine.failures()
    assert reason == (
        "model 'm': instance_group.rate_limiter: resource 'R': an execution needs 3 on device 0, "
        "and --rate-limit-resource gives 2"
    )
    assert limits._limiter.supply() == {}
    engine.close()


MODEL = """
import board, numpy as np, triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.name = args["model_name"]

    def execute(self, requests):
        board.begin(self.name)
        y = pb_utils.Tensor("y", np.zeros((1,), np.float32))
        return [pb_utils.InferenceResponse([y]) for _ in requests]
"""


class Board:
    """Where models say that they execute, and wait for leave to go on."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.leave = threading.Semaphore(0)

    def begin(self, name: str) -> None:
        self.begun.append(name)
        assert self.leave.acquire(timeout=WAIT_S)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    board = Board()
    monkeypatch.setitem(sys.modules, "board", SimpleNamespace(begin=board.begin))
    return board


def request(name: str) -> InferRequest:
    return InferRequest(name, {"x": Tensor.of("x", np.zeros((1,), np.float32))})


def waiting(limits: RateLimits) -> int:
    return sum(instance.order is not None for instance in limits._limiter._instances.values())


def test_models_that_share_a_resource_execute_one_after_the_other(repository: Repository, board: Board) -> None:
    for name in ("a", "b"):
        groups = limited('resources { name: "R" count: 2 global: true }')
        repository.add(name, f'backend: "python" {TENSORS} {groups} {IN_PROCESS}', {"model.py": MODEL})
    repository.add("free", f'backend: "python" {TENSORS} {IN_PROCESS}', {"model.py": MODEL})
    limits = RateLimits()
    engine = local.make_engine(repository.root, timer, ensembles.load, limits=limits)
    engine.load_all()
    assert not engine.failures()
    gather = Gather(3)
    calls = [Call(request(name), gather) for name in ("a", "b", "free")]
    engine(calls[:1])
    wait_until(lambda: board.begun == ["a"])
    engine(calls[1:])
    wait_until(lambda: len(board.begun) == 2)  # free needs nothing
    wait_until(lambda: waiting(limits) == 1)
    assert board.begun == ["a", "free"] and limits._limiter.in_use() == {("R", -1): 2}
    board.leave.release(3)
    gather.wait()
    assert board.begun[2] == "b" and all(isinstance(call.answer, InferResponse) for call in calls)
    engine.close()
    assert limits._limiter.supply() == {} and not limits._turns


def test_priorities_hold_between_models_that_always_have_work(repository: Repository, board: Board) -> None:
    for name, priority in (("often", 1), ("seldom", 2)):
        groups = limited('resources { name: "R" count: 1 }', f"priority: {priority}")
        repository.add(name, f'backend: "python" {TENSORS} {groups} {IN_PROCESS}', {"model.py": MODEL})
    limits = RateLimits()
    engine = local.make_engine(repository.root, timer, ensembles.load, limits=limits)
    engine.load_all()
    gather = Gather(90)
    engine([Call(request("often"), gather) for _ in range(60)])
    wait_until(lambda: board.begun)
    engine([Call(request("seldom"), gather) for _ in range(30)])
    wait_until(lambda: waiting(limits) == 1)
    board.leave.release(90)
    gather.wait()
    assert 28 <= Counter(board.begun[:45])["often"] <= 32
    assert Counter(board.begun) == {"often": 60, "seldom": 30}
    engine.close()


def test_limited_instances_answer_right_and_are_reloaded(repository: Repository) -> None:
    groups = limited('resources { name: "R" count: 1 }', count=3)
    files: dict[str, str | bytes] = {"model.onnx": onnx_add_one()}
    tensors = TENSORS.replace("dims: 1", "dims: 4")
    repository.add("m", f'backend: "onnxruntime" max_batch_size: 4 dynamic_batching {{ }} {tensors} {groups}', files)
    limits = RateLimits()
    engine = local.make_engine(repository.root, timer, ensembles.load, is_controllable=True, limits=limits)
    engine.load_all()
    for _ in range(2):
        rows = [np.full((1, 4), number, np.float32) for number in range(200)]
        answers = infer(engine, [InferRequest("m", {"x": Tensor.of("x", row)}) for row in rows])
        for row, answer in zip(rows, answers, strict=True):
            assert isinstance(answer, InferResponse)
            np.testing.assert_array_equal(answer.outputs[0].array(), row + 1)
        engine.load("m")
    assert len(limits._turns) == 3 and limits._limiter.in_use() == {}
    engine.close()


@pytest.mark.parametrize("seed", range(5))
def test_threads_never_hold_more_than_there_is(seed: int) -> None:
    rng = random.Random(seed)
    limits = RateLimits(parse_supply(["R:4"]))
    held, peak, lock = 0, 0, threading.Lock()

    def work(count: int, priority: int, again: list[bool]) -> None:
        nonlocal held, peak
        turn = limits.turn(RateLimit((Resource("R", count),), priority), 0)
        for goes_on in again:
            turn.begin()
            with lock:
                held += count
                peak = max(peak, held)
            with lock:
                held -= count
            turn.end(goes_on)
        turn.close()

    threads = []
    for _ in range(8):
        again = [rng.random() < 0.7 for _ in range(199)] + [False]
        threads.append(threading.Thread(target=work, args=(rng.randint(1, 4), rng.randint(1, 3), again)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert held == 0 and 0 < peak <= 4 and limits._limiter.in_use() == {}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rate-limit", "sometimes"], "'sometimes' is none of off, execution_count"),
        (["--rate-limit-resource", "R:1"], "--rate-limit-resource needs --rate-limit execution_count"),
        (["--rate-limit", "execution_count", "--ray"], "--rate-limit does not go with --ray"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", str(tmp_path), *flags])
    assert says in capsys.readouterr().err


def test_a_resource_that_does_not_parse_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--rate-limit", "EXECUTION_COUNT", "--rate-limit-resource", "R"]
    assert main(["serve", str(tmp_path), *flags]) == UNUSABLE
    assert "--rate-limit-resource: expected NAME:COUNT or NAME:COUNT:DEVICE, got 'R'" in capsys.readouterr().err
