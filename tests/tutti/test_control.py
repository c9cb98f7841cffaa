"""Load and unload while serving: what is allowed, what the index says, and that no request is lost."""

import threading
from pathlib import Path

import numpy as np
import pytest

import ensembles
from tests.models import Repository
from tests.serving import infer, timer
from tutti import local
from tutti.engine import Engine
from tutti.errors import InferError, InvalidArgument, NotFound, Unavailable
from tutti.types import InferRequest, InferResponse, Tensor


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
    assert not engine.is_ready()
    assert isinstance(infer(engine, [ask()])[0], NotFound)
    engine.load("add_one")
    assert engine.is_ready()
    assert isinstance(infer(engine, [ask()])[0], InferResponse)
    engine.unload("add_one")
    assert states(engine) == {"add_one": ("UNAVAILABLE", "unloaded")}
    assert isinstance(infer(engine, [ask()])[0], InvalidArgument)
    with pytest.raises(NotFound, match="not loaded"):
        engine.unload("add_one")
    engine.load("add_one")
    assert states(engine) == {"add_one": ("READY", "")}
    engine.close()


def test_a_load_that_fails_leaves_the_old_version_serving(repository: Repository) -> None:
    repository.add_onnx()
    engine = controllable(repository.root)
    (repository.root / "add_one" / "1" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(InvalidArgument, match=r"failed to load 'add_one'.*onnxruntime cannot load"):
        engine.load("add_one")
    assert isinstance(infer(engine, [ask()])[0], InferResponse)
    for name in ("nowhere", "../outside", ""):
        with pytest.raises(InvalidArgument, match="failed to load"):
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
