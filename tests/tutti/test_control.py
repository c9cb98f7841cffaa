"""Load and unload while serving: what is allowed, what the index says, and that no request is lost."""

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from tests.models import Repository, onnx_add_one
from tests.serving import infer, timer
from tutti import ensembles
from tutti.core.errors import InferError, Internal, NotFound, Unavailable
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.serving import local
from tutti.serving.engine import Engine
from tutti.serving.interface import Override


def controllable(root: Path, names: list[str] | None = None) -> Engine:
    engine = local.make_engine(root, timer, ensembles.load, is_controllable=True)
    engine.load_all(names)
    return engine


def ask(value: float = 1.0) -> InferRequest:
    return InferRequest("add_one", {"x": Tensor.of("x", np.full((1, 4), value, np.float32))})


def states(engine: Engine) -> dict[str, tuple[str, str]]:
    return {entry.name: (entry.state, entry.reason) for entry in engine.index()}


def test_control_is_off_by_default(repository: Repository) -> None:
    repository.add_onnx()
    engine = local.make_engine(repository.root, timer, ensembles.load)
    for change in (engine.load, engine.unload):
        with pytest.raises(Unavailable, match="not allowed"):
            change("add_one")


def test_a_model_comes_and_goes(repository: Repository) -> None:
    repository.add_onnx()
    engine = controllable(repository.root, [])
    assert states(engine) == {"add_one": ("", "")}
    assert engine.is_ready()  # nothing has been asked for
    assert isinstance(infer(engine, [ask()])[0], NotFound)
    engine.load("add_one")
    assert engine.is_ready()
    assert isinstance(infer(engine, [ask()])[0], InferResponse)
    engine.unload("add_one")
    assert engine.is_ready()
    assert states(engine) == {"add_one": ("UNAVAILABLE", "unloaded")}
    (answer,) = infer(engine, [ask()])
    assert isinstance(answer, NotFound)
    assert "no available versions" in answer.message
    engine.unload("add_one")
    engine.load("add_one")
    assert states(engine) == {"add_one": ("READY", "")}
    engine.close()


def test_a_load_that_fails_leaves_the_old_version_serving(repository: Repository) -> None:
    repository.add_onnx()
    engine = controllable(repository.root)
    (repository.root / "add_one" / "1" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(Internal, match=r"failed to load 'add_one', load failed for.*onnxruntime cannot load"):
        engine.load("add_one")
    assert isinstance(infer(engine, [ask()])[0], InferResponse)
    for name in ("nowhere", "../outside", ""):
        with pytest.raises(Internal, match="failed to load"):
            engine.load(name)
    engine.close()


def test_reloading_under_load_loses_nothing(repository: Repository) -> None:
    """Callers keep asking, an ensemble among them, while the model is loaded anew fifty times."""
    repository.add_onnx()
    repository.add(
        "through",
        """
        platform: "ensemble" max_batch_size: 8
        input { name: "X" data_type: TYPE_FP32 dims: 4 } output { name: "Y" data_type: TYPE_FP32 dims: 4 }
        ensemble_scheduling { step {
          model_name: "add_one" model_version: -1
          input_map { key: "x" value: "X" } output_map { key: "y" value: "Y" }
        } }
        """,
        {".keep": ""},
    )
    engine = controllable(repository.root)
    stop = threading.Event()
    answers: list[object] = []

    def work(name: str, tensor: str) -> None:
        while not stop.is_set():
            x = Tensor.of(tensor, np.zeros((1, 4), np.float32))
            answers.extend(infer(engine, [InferRequest(name, {tensor: x})] * 3))

    threads = [threading.Thread(target=work, args=pair) for pair in (("add_one", "x"), ("through", "X")) * 2]
    for thread in threads:
        thread.start()
    for _ in range(50):
        engine.load("add_one")
    stop.set()
    for thread in threads:
        thread.join(30)
    assert len(answers) > 100
    assert [answer for answer in answers if isinstance(answer, InferError)] == []
    engine.close()


CONFIG = """{
  "backend": "onnxruntime", "max_batch_size": %d,
  "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}],
  "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [4]}]
}"""


def test_a_load_may_bring_its_configuration(repository: Repository) -> None:
    repository.add_onnx(max_batch_size=8)
    engine = controllable(repository.root)
    engine.load("add_one", Override(CONFIG % 2))
    assert engine.model("add_one").config.max_batch_size == 2
    engine.load("add_one")
    assert engine.model("add_one").config.max_batch_size == 8, "an override is for one load"
    engine.close()


def test_a_load_may_bring_its_files(repository: Repository) -> None:
    repository.add_onnx()
    engine = controllable(repository.root)
    engine.load("sent", Override(CONFIG % 8, {"3/model.onnx": onnx_add_one()}))
    assert engine.versions("sent") == ["3"]
    sent = ask()
    sent.model_name = "sent"
    assert isinstance(infer(engine, [sent])[0], InferResponse)
    engine.unload("sent")
    engine.close()


@pytest.mark.parametrize(
    "path",
    [
        "../1/model.onnx", "1/../../model.onnx", "/1/model.onnx", "1/..", "1", "model.onnx", "0/model.onnx", "1//m",
        "1/.hidden", "01/model.onnx", "1/a\x00b", "1/a\nb", "99999999999999999999/m",
    ],
)  # fmt: skip
def test_files_that_are_no_versions_files_are_refused(repository: Repository, tmp_path: Path, path: str) -> None:
    engine = controllable(repository.root, [])
    with pytest.raises(Internal, match="expected VERSION/FILE"):
        engine.load("sent", Override(CONFIG % 8, {path: b"x"}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models"]
    assert list(repository.root.iterdir()) == []
    engine.close()


@pytest.mark.parametrize("name", ["../models/add_one", "a/b", "..", ".", "", "a" * 300, "x\ny", "add_one/"])
def test_names_that_are_no_folders_are_refused(repository: Repository, name: str) -> None:
    repository.add_onnx()
    engine = controllable(repository.root)
    for override in (None, Override(CONFIG % 8), Override(CONFIG % 8, {"1/model.onnx": onnx_add_one()})):
        with pytest.raises(Internal, match="not a valid model name"):
            engine.load(name, override)
    engine.close()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (Override("{"), "does not parse"),
        (Override('{"max_batch_size": "many"}'), "does not parse"),
        (Override('{"nope": 1}'), "does not parse"),
        (Override('{"name": "other", "backend": "onnxruntime"}'), "expected the folder's name"),
        (Override(None, {"1/model.onnx": b"x"}), "without the parameter 'config'"),
        (Override(CONFIG % 8, {"1/model.onnx": b"no graph"}), "cannot load"),
    ],
)
def test_overrides_that_do_not_fit_leave_what_is_served(repository: Repository, override: Override, says: str) -> None:
    repository.add_onnx()
    engine = controllable(repository.root)
    with pytest.raises(Internal, match=says):
        engine.load("add_one", override)
    assert isinstance(infer(engine, [ask()])[0], InferResponse)
    engine.close()


def add_ensembles(repository: Repository, *names: str) -> None:
    repository.add_onnx()
    for name in names:
        repository.add(
            name,
            """
            platform: "ensemble" max_batch_size: 8
            input { name: "x" data_type: TYPE_FP32 dims: 4 }
            output { name: "y" data_type: TYPE_FP32 dims: 4 }
            ensemble_scheduling { step {
              model_name: "add_one" input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }
            } }
            """,
            {},
        )


def test_an_ensemble_is_loaded_with_its_models_and_unloaded_with_those_no_other_uses(repository: Repository) -> None:
    add_ensembles(repository, "one", "two")
    engine = controllable(repository.root, [])
    engine.load("one")
    engine.load("two")
    assert {name: state for name, (state, _) in states(engine).items()} == dict.fromkeys(
        ("add_one", "one", "two"), "READY"
    )
    engine.unload("one", with_dependents=True)
    assert states(engine)["add_one"][0] == "READY"
    engine.unload("two", with_dependents=True)
    assert states(engine)["add_one"] == ("UNAVAILABLE", "unloaded")
    engine.close()


def test_an_ensemble_is_not_ready_without_its_models(repository: Repository) -> None:
    add_ensembles(repository, "one")
    engine = controllable(repository.root)
    engine.unload("add_one")
    assert not engine.model("one").is_ready()
    assert states(engine)["one"][0] == "UNAVAILABLE"
    assert "'add_one' has no available versions" in states(engine)["one"][1]
    engine.close()


def test_poll_follows_the_repository(repository: Repository) -> None:
    repository.add_onnx()
    engine = local.make_engine(repository.root, timer, ensembles.load)
    engine.load_all()
    engine.remember()
    engine.poll()
    before = engine.model("add_one")
    engine.poll()
    assert engine.model("add_one") is before, "nothing has changed"
    repository.add_onnx("second")
    config = repository.root / "add_one" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 8", "max_batch_size: 5"))
    engine.poll()
    assert engine.model("add_one").config.max_batch_size == 5
    assert states(engine)["second"] == ("READY", "")
    config.write_text("not a configuration")
    engine.poll()
    assert engine.model("add_one").config.max_batch_size == 5, "a broken change leaves what is served"
    for name in ("add_one", "second"):
        (repository.root / name).rename(repository.root.parent / name)
    engine.poll()
    assert engine.models() == []
    assert states(engine) == {}
    engine.close()


def test_an_ensemble_named_at_the_start_brings_its_models(repository: Repository) -> None:
    add_ensembles(repository, "one", "two")
    engine = controllable(repository.root, ["one"])
    assert {name: state for name, (state, _) in states(engine).items()} == {
        "add_one": "READY",
        "one": "READY",
        "two": "",
    }
    assert engine.failures() == []
    engine.close()


def test_what_was_unloaded_is_freed_without_the_garbage_collector(repository: Repository) -> None:
    repository.add_onnx()
    ends = 'input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }'
    repository.add_python("plain", f'backend: "python" {ends}', "return pb_utils.InferenceResponse([])")
    engine = controllable(repository.root)
    infer(engine, [ask()])
    gc.disable()
    try:
        for name in ("add_one", "plain"):
            backend = weakref.ref(engine.model(name)._served.infer._instances.all[0]._backend)  # type: ignore[attr-defined]
            assert backend() is not None
            engine.load(name)
            assert backend() is None
    finally:
        gc.enable()
    engine.close()
