"""What hangs holds up itself: calls of control end, polls go on, callers are answered, and the index tells."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import ensembles
from tests.models import Repository
from tests.serving import Gather, infer, timer, wait_until
from tutti import backends, local, model, operations, scheduler
from tutti import engine as engines
from tutti import repository as folders
from tutti.engine import Engine
from tutti.errors import Internal, Unavailable
from tutti.frontends.api import Api
from tutti.metrics import Metrics
from tutti.scheduler import Answers
from tutti.types import Call, InferRequest, InferResponse, Tensor

CONFIG = 'backend: "python" max_batch_size: 0 input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" '
CONFIG += "data_type: TYPE_FP32 dims: 1 }"
LIMIT_S = 0.3


class Gate:
    """What "stuck" models wait for as they execute, and "hanging" ones as they are loaded; "late" ones fail before."""

    opened = threading.Event()
    entered = threading.Event()

    @classmethod
    def wait(cls) -> None:
        cls.entered.set()
        cls.opened.wait(60)


class Waits:
    """A backend."""

    runs_inline = False
    kind = "cpu"

    def __init__(self, name: str) -> None:
        self._name = name
        if name.startswith("hanging"):
            Gate.wait()
        if name.startswith("late") and not Gate.opened.is_set():
            raise RuntimeError("not yet")

    def execute(self, calls: Sequence[Call]) -> Answers:
        if self._name.startswith("stuck"):
            Gate.wait()
        return [InferResponse(self._name, "1", [Tensor.of("y", np.ones(1, np.float32))]) for _ in calls]

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Gate]]:
    for module, name in ((model, "HANG_S"), (scheduler, "HANG_S"), (scheduler, "_MOMENT_S"), (engines, "DRAIN_S")):
        monkeypatch.setattr(module, name, LIMIT_S)
    monkeypatch.setattr(operations, "PATIENCE_S", LIMIT_S)
    monkeypatch.setattr(backends, "load", lambda folder, *_: [Waits(folder.config.name)])
    Gate.opened, Gate.entered = threading.Event(), threading.Event()
    yield Gate
    Gate.opened.set()


def add(repository: Repository, name: str) -> None:
    repository.add(name, CONFIG, {"model.py": ""})


def serve(repository: Repository, *loaded: str, timeout_s: float = 20.0) -> Engine:
    engine = local.make_engine(repository.root, timer, ensembles.load, is_controllable=True)
    engine.control_timeout_s = engine._operations._timeout_s = timeout_s
    engine.load_all(list(loaded), timeout_s=LIMIT_S)
    return engine


def ask(name: str) -> InferRequest:
    return InferRequest(name, {"x": Tensor.of("x", np.zeros(1, np.float32))})


def is_served(engine: Engine, name: str) -> bool:
    return isinstance(infer(engine, [ask(name)])[0], InferResponse)


def test_a_stuck_execution_is_told_of_and_abandoned_with_its_model(repository: Repository) -> None:
    add(repository, "stuck")
    add(repository, "good")
    engine = serve(repository, "stuck", "good")
    gather = Gather(1)
    call = Call(ask("stuck"), gather)
    engine([call])
    assert Gate.entered.wait(20)
    wait_until(lambda: "instance 'stuck_0' has been executing" in {e.name: e.reason for e in engine.index()}["stuck"])
    assert {e.name: e.state for e in engine.index()} == {"stuck": "UNAVAILABLE", "good": "READY"}
    assert not Api(engine).is_model_ready("stuck", "")
    assert 'tutti_stuck_instances{model="stuck",version="1"} 1.0' in Metrics(engine).render()[0].decode()
    engine.load("stuck")  # another in its place, which does not wait for the old one's end
    gather.wait()
    assert isinstance(call.answer, Internal)
    assert "abandoned" in call.answer.message
    Gate.opened.set()
    assert is_served(engine, "stuck")
    assert is_served(engine, "good")
    engine.close()


def test_an_unload_says_what_it_waits_for(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    add(repository, "stuck")
    engine = serve(repository, "stuck")
    monkeypatch.setattr(scheduler, "HANG_S", 60.0)  # it may be slow only
    gather = Gather(1)
    call = Call(ask("stuck"), gather)
    engine([call])
    assert Gate.entered.wait(20)
    with pytest.raises(Unavailable, match=r"'stuck' is served no longer.*instance 'stuck_0' has been executing"):
        engine.unload("stuck")
    assert {e.name: e.state for e in engine.index()} == {"stuck": "UNLOADING"}
    Gate.opened.set()
    gather.wait()
    assert isinstance(call.answer, InferResponse), "what is slow is answered"
    wait_until(lambda: {e.name: e.state for e in engine.index()} == {"stuck": "UNAVAILABLE"})
    engine.close()


def test_a_load_that_hangs_is_left_to_itself(repository: Repository) -> None:
    add(repository, "hanging")
    add(repository, "good")
    engine = serve(repository, timeout_s=LIMIT_S)
    for _ in range(2):
        with pytest.raises(Unavailable, match="model 'hanging' has been loading for"):
            engine.load("hanging")
    assert {e.name: e.state for e in engine.index()}["hanging"] == "LOADING"
    engine._operations._timeout_s = 20
    engine.load("good")
    assert is_served(engine, "good")
    Gate.opened.set()
    wait_until(lambda: {e.name: e.state for e in engine.index()}["hanging"] == "READY")
    engine.close()


def test_models_that_hang_at_the_start_are_not_waited_for(repository: Repository) -> None:
    for number in range(6):
        add(repository, f"hanging{number}")
    add(repository, "ready")
    engine = serve(repository, *(f"hanging{number}" for number in range(6)), "ready", timeout_s=20)
    wait_until(lambda: engine.versions("ready"))
    assert is_served(engine, "ready")
    assert not engine.is_ready()
    assert any("hanging0' is still being loaded" in why for why in engine.failures())
    Gate.opened.set()
    wait_until(engine.is_ready)
    assert engine.failures() == []
    engine.close()


def test_a_poll_is_not_held_up_by_what_hangs(repository: Repository) -> None:
    add(repository, "hanging")
    engine = serve(repository)
    engine.control_timeout_s = LIMIT_S
    engine.poll()
    assert Gate.entered.is_set()
    add(repository, "good")
    engine.poll()
    assert is_served(engine, "good")
    engine.close()


def test_a_poll_tries_again_what_has_failed(repository: Repository) -> None:
    """Though its folder is as it was: what it lacked may be there now."""
    add(repository, "late")
    engine = serve(repository)
    engine.remember()
    for _ in range(3):
        engine._seen.pop("late", None)
        engine.poll()
        assert engine.versions("late") == []
    Gate.opened.set()
    polls = 0
    while not engine.versions("late"):
        engine.poll()
        polls += 1
        assert polls < 20
    assert polls > 1, "less often as it goes on failing"
    engine.close()


def test_one_folder_does_not_lose_the_other_changes_of_a_poll(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        add(repository, name)
    engine = serve(repository)
    fingerprint = folders.fingerprint
    broken = [True]

    def looked_at(root: Path, name: str) -> object:
        if name == "b" and broken[0]:
            raise OSError("stale handle")
        return fingerprint(root, name)

    monkeypatch.setattr(folders, "fingerprint", looked_at)
    engine.poll()
    assert is_served(engine, "a")
    assert is_served(engine, "c")
    broken[0] = False
    engine.poll()
    assert is_served(engine, "b")
    engine.close()


def test_a_folder_that_changes_while_it_is_loaded_is_loaded_again(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(repository, "other")
    engine = serve(repository)
    load = engine._loader

    def changes(folder: object, *more: object) -> object:
        served = load(folder, *more)  # type: ignore[arg-type]
        (repository.root / "other" / "1" / "more").write_text("x")
        return served

    monkeypatch.setattr(engine, "_loader", changes)
    engine.poll()
    first = engine.model("other")
    monkeypatch.setattr(engine, "_loader", load)
    engine.poll()
    assert engine.model("other") is not first
    second = engine.model("other")
    engine.poll()
    assert engine.model("other") is second, "once"
    engine.close()
