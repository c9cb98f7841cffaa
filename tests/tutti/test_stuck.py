"""What hangs holds up itself: calls of control end, polls go on, callers are answered, and the index tells."""

import json
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict

from tests.models import Repository
from tests.serving import Gather, infer, timer, wait_until
from tutti import ensembles
from tutti.backends import registry
from tutti.core import operations
from tutti.core.errors import Internal, Unavailable
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.frontends.v2.api import Api
from tutti.frontends.v2.metrics_page import Metrics
from tutti.repository import config, folders
from tutti.scheduling import instances, scheduler, thread_instance
from tutti.scheduling.interface import Answers
from tutti.serving import engine as engines
from tutti.serving import local, model
from tutti.serving.engine import Engine
from tutti.serving.interface import Override

CONFIG = 'backend: "python" max_batch_size: 0 input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" '
CONFIG += "data_type: TYPE_FP32 dims: 1 }"
LIMIT_S = 0.3
ENSEMBLE = 'platform: "ensemble" input {{ name: "x" data_type: TYPE_FP32 dims: 1 }} output {{ name: "y" data_type: '
ENSEMBLE += "TYPE_FP32 dims: 1 }} ensemble_scheduling {{ {} }}"


def step(model: str) -> str:
    maps = 'input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }'
    return f'step {{ model_name: "{model}" model_version: -1 {maps} }}'


class Gate:
    """What "stuck" models wait for as they execute, and "hanging" ones as they are loaded; "late" ones fail before."""

    opened = threading.Event()
    entered = threading.Event()
    # The names of models that have been loaded, and of those that have been closed.
    loads: ClassVar[list[str]] = []
    closed: ClassVar[list[str]] = []

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
        Gate.loads.append(name)
        if name.startswith("hanging"):
            Gate.wait()
        if name.startswith("late") and not Gate.opened.is_set():
            raise RuntimeError("not yet")

    def execute(self, calls: Sequence[Call]) -> Answers:
        if self._name == "stuck_answered":  # as a response sender does
            calls[0].finish(self._answer())
        if self._name.startswith("stuck"):
            Gate.wait()
        return [self._answer() for _ in calls]

    def _answer(self) -> InferResponse:
        return InferResponse(self._name, "1", [Tensor.of("y", np.ones(1, np.float32))])

    def close(self) -> None:
        Gate.closed.append(self._name)


@pytest.fixture(autouse=True)
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Gate]]:
    for module in (model, instances, thread_instance):
        monkeypatch.setattr(module, "HANG_S", LIMIT_S)
    for module, name in ((scheduler, "_MOMENT_S"), (thread_instance, "_MOMENT_S"), (engines, "DRAIN_S")):
        monkeypatch.setattr(module, name, LIMIT_S)
    monkeypatch.setattr(operations, "PATIENCE_S", LIMIT_S)
    monkeypatch.setattr(registry, "load", lambda folder, *_: [Waits(folder.config.name)])
    Gate.opened, Gate.entered = threading.Event(), threading.Event()
    Gate.loads, Gate.closed = [], []
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


def test_what_is_answered_before_its_execution_hangs_is_answered_once(repository: Repository) -> None:
    add(repository, "stuck_answered")
    engine = serve(repository, "stuck_answered")
    gather = Gather(1)
    call = Call(ask("stuck_answered"), gather)
    engine([call])
    gather.wait()
    answer = call.answer
    assert Gate.entered.wait(20)
    assert isinstance(answer, InferResponse)
    wait_until(lambda: engine.model("stuck_answered").is_stuck())
    engine.load("stuck_answered")
    wait_until(lambda: not engine.unfinished())  # the old one has been abandoned
    gather.wait()
    assert call.answer is answer
    Gate.opened.set()
    engine.close()


def test_an_instance_that_ends_just_as_it_is_abandoned_is_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unused: Any = None
    for _ in range(200):
        instance = thread_instance.ThreadInstance("good_0", Waits("good"), unused, unused)
        monkeypatch.setattr(instance._thread, "join", lambda _: None)  # as if it had taken all the time
        instance.close()
    wait_until(lambda: len(Gate.closed) == 200)


def test_an_unload_says_what_it_waits_for(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    add(repository, "stuck")
    engine = serve(repository, "stuck")
    for module in (instances, thread_instance):
        monkeypatch.setattr(module, "HANG_S", 60.0)  # it may be slow only
    gather = Gather(1)
    call = Call(ask("stuck"), gather)
    engine([call])
    assert Gate.entered.wait(20)
    with pytest.raises(Unavailable, match=r"'stuck' is served no longer.*instance 'stuck_0' has been executing"):
        engine.unload("stuck", drain_s=LIMIT_S)
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
    wait_until(lambda: engine.started() == (1, 7))
    Gate.opened.set()
    wait_until(engine.is_ready)
    assert engine.failures() == []
    wait_until(lambda: engine.started() == (7, 7))
    engine.close()


def test_a_load_that_hangs_at_the_start_is_told_of_and_not_begun_again(repository: Repository) -> None:
    add(repository, "hanging")
    engine = serve(repository, "hanging", timeout_s=LIMIT_S)
    assert Gate.entered.wait(20)
    entries = {entry.name: entry for entry in engine.index()}
    assert entries["hanging"].state == "LOADING"
    assert "model 'hanging' has been loading for" in entries["hanging"].reason
    assert "model 'hanging' has been loading for" in "; ".join(engine.unfinished())
    with pytest.raises(Unavailable, match="model 'hanging' has been loading for"):
        engine.load("hanging")
    with pytest.raises(Unavailable, match="model 'hanging' has been loading for"):
        engine.unload("hanging")
    engine.poll()
    assert Gate.loads == ["hanging"]
    Gate.opened.set()
    wait_until(lambda: is_served(engine, "hanging"))
    engine.close()


def test_a_start_does_not_replace_what_others_have_loaded_meanwhile(repository: Repository) -> None:
    """An ensemble waits at the start for a model that hangs; a client loads it with another configuration."""
    add(repository, "hanging")
    add(repository, "good")
    repository.add("both", ENSEMBLE.format(step("hanging")), {})
    engine = serve(repository, "both", timeout_s=20)
    assert {entry.name: entry.reason for entry in engine.index()}["both"] == "model 'both' waits to be loaded"
    other = json.dumps(MessageToDict(config.parse(f'name: "both" {ENSEMBLE.format(step("good"))}', "both").proto))
    engine.load("both", Override(other))
    first = engine.model("both")
    Gate.opened.set()
    wait_until(engine.is_ready)
    assert engine.model("both") is first
    engine.close()


def test_what_ends_loading_when_the_engine_has_closed_is_closed(repository: Repository) -> None:
    add(repository, "hanging")
    engine = serve(repository, "hanging", timeout_s=20)
    assert Gate.entered.wait(20)
    engine.close()
    Gate.opened.set()
    wait_until(lambda: Gate.closed == ["hanging"])
    assert engine.versions("hanging") == []


def test_a_start_is_over_in_time_however_many_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "PATIENCE_S", 60.0)
    done: list[int] = []

    def hang(number: int) -> None:
        Gate.wait()
        done.append(number)

    works = [(f"work {number}", partial(hang, number)) for number in range(20)]
    unfinished = operations.side_by_side(works, 2, LIMIT_S)
    assert len(unfinished) == 20
    assert sum("others are before it" in what for what in unfinished) >= 18
    Gate.opened.set()
    wait_until(lambda: sorted(done) == list(range(20)))


class Crowded(dict[tuple[str, str], str]):
    """In the midst of each look at it, another thread records a failure."""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        before = list(super().keys())
        self["other", ""] = "broken"
        return iter(before)

    def keys(self) -> list[tuple[str, str]]:  # type: ignore[override]
        return list(iter(self))


def test_no_failure_is_lost_that_is_recorded_while_another_is_forgotten(repository: Repository) -> None:
    add(repository, "good")
    engine = serve(repository)
    engine._failures = Crowded({("good", "1"): "was broken"})
    engine.load("good")
    assert dict(engine._failures.items()) == {("other", ""): "broken"}
    engine.close()


def test_polls_do_not_pile_up_on_what_hangs(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a folder on a disk that is lost."""
    for name in ("lost", "good"):
        add(repository, name)
    engine = serve(repository)
    engine.control_timeout_s = LIMIT_S
    fingerprint = folders.fingerprint
    looks: list[str] = []

    def looked_at(root: Path, name: str) -> object:
        looks.append(name)
        if name == "lost":
            Gate.wait()
        return fingerprint(root, name)

    monkeypatch.setattr(folders, "fingerprint", looked_at)
    for _ in range(3):
        engine.poll()
    wait_until(lambda: is_served(engine, "good"))
    assert looks.count("lost") == 1
    Gate.opened.set()
    wait_until(lambda: is_served(engine, "lost"))
    engine.close()


def test_a_repository_that_hangs_holds_up_nobody_for_long(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(repository, "good")
    engine = serve(repository, "good")
    engine.control_timeout_s = LIMIT_S
    monkeypatch.setattr(engines, "_LOOK_S", 0.0)
    looks: list[Path] = []

    def names(root: Path) -> list[str]:
        looks.append(root)
        Gate.wait()
        return ["good"]

    monkeypatch.setattr(folders, "model_names", names)
    for ask_for in (engine.index, engine.poll, engine.index):
        with pytest.raises(Unavailable, match=r"the model repository '.*' has been looked at for"):
            ask_for()
    assert len(looks) == 1
    assert is_served(engine, "good")
    Gate.opened.set()
    assert [entry.name for entry in engine.index()] == ["good"]
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
