"""CUDA graphs through the whole server, on a simulated GPU: a graph runs the same work on the same memory again."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import engine_over, infer, timer
from tests.tutti.test_device_backend import CHAIN, IDS, ON_GPU, SAME, Embed, Hungry, Identity, ids_request
from tests.tutti.test_pytorch_backend import CONFIG, Subtract, exported, load_error, scripted
from tutti import ensembles
from tutti.backends import capturing, cuda_graphs, cuda_graphs_trial, cuda_graphs_trial_process, graph_buckets, pytorch
from tutti.backends.capturing import SimulatedCapturing
from tutti.backends.cuda_graphs_trial import Result
from tutti.backends.cuda_graphs_trial_process import unequal
from tutti.core.dtypes import Array
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.devices import process_engines
from tutti.repository import config
from tutti.repository.folders import ModelFolder
from tutti.serving import local
from tutti.serving.engine import Engine

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.usefixtures("simulated_gpu"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

GRAPHS = " optimization { cuda { graphs: true } }"


def parameter(name: str, text: str) -> str:
    quoted = text.replace('"', '\\"')
    return f' parameters {{ key: "{name}" value {{ string_value: "{quoted}" }} }}'


LENGTHS = parameter("tutti.buckets.ids", "4, 8") + parameter("tutti.unpad.vectors", "ids")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The powers of two: more sizes show nothing else, and take longer."""
    monkeypatch.setattr(graph_buckets, "_STEPS", (1,))


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of its own: that takes seconds."""
    monkeypatch.setattr(cuda_graphs_trial, "run", lambda *_: Result())


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that have been replayed, each time."""
    seen: list[Any] = []
    replay = capturing._SimulatedGraph.replay
    monkeypatch.setattr(capturing._SimulatedGraph, "replay", lambda self: (seen.append(self), replay(self))[1])
    return seen


def x_request(array: Array, **options: Any) -> InferRequest:
    return InferRequest("m", {"x": Tensor.of("x", array)}, **options)


def values(answers: Sequence[Any], name: str) -> list[Array]:
    for answer in answers:
        assert isinstance(answer, InferResponse), answer
    return [np.array(answer.tensor(name).array()) for answer in answers]


def answered(root: Path, requests: Sequence[InferRequest], name: str) -> list[Array]:
    with engine_over(root) as engine:
        return values(infer(engine, requests), name)


# The same as without.


class Polynomial(torch.nn.Module):
    """Each element by itself, whatever is beside it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x * 0.5 - x * 3.0 + 1.0


X = (
    """backend: "pytorch" max_batch_size: 16 dynamic_batching { }
input { name: "x" data_type: TYPE_FP32 dims: [ 3 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 3 ] }"""
    + ON_GPU
)


@pytest.mark.usefixtures("no_trial")
@pytest.mark.parametrize("more", ["", parameter("tutti.graphs.batch_sizes", "3, 7")])
def test_random_batches_are_answered_as_without_graphs(repository: Repository, replays: list[Any], more: str) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((rng.integers(1, 17), 3), np.float32) for _ in range(300)]
    repository.add("m", X, {"model.pt": scripted(Polynomial())})
    expected = answered(repository.root, [x_request(array) for array in arrays], "y")
    assert not replays
    (repository.root / "m" / "config.pbtxt").write_text(X + GRAPHS + more)
    with engine_over(repository.root) as engine:
        replays.clear()
        answers = [answer for array in arrays for answer in infer(engine, [x_request(array)])]
        counted = len(replays)
        joined = infer(engine, [x_request(array) for array in arrays])
    assert counted == sum(len(array) <= (7 if more else 16) for array in arrays)
    for got in (values(answers, "y"), values(joined, "y")):
        assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.usefixtures("no_trial")
def test_batches_know_the_captured_sizes_and_learn_what_they_take(repository: Repository) -> None:
    repository.add("m", X + GRAPHS, {"model.pt": scripted(Polynomial())})
    with engine_over(repository.root) as engine:
        (pipeline,) = process_engines.engine_of("cuda:0").pipelines()
        (captured,) = pipeline.captured.values()
        assert list(pipeline.captured) == [(("x", (3,)),)]
        assert captured.sizes == [1, 2, 4, 8, 16]
        recorded: list[int] = []
        captured.record = lambda rows, ns: recorded.append(rows)  # type: ignore[method-assign]
        infer(engine, [x_request(np.zeros((3, 3), np.float32))])
    assert recorded == [3]


@pytest.mark.usefixtures("no_trial")
def test_lengths_have_graphs_of_their_own(repository: Repository, replays: list[Any]) -> None:
    rng = np.random.default_rng(1)
    lists = [rng.integers(0, 100, rng.integers(1, 9)).tolist() for _ in range(200)]
    long = list(range(9))
    repository.add("m", IDS + LENGTHS + GRAPHS, {"model.pt": scripted(Embed())})
    with engine_over(repository.root) as engine:
        replays.clear()
        answers = values(infer(engine, [ids_request(*ids) for ids in lists]), "vectors")
        assert len(replays) == engine.model("m", "").statistics.counts.executions < 150
        count = len(replays)
        answers += values(infer(engine, [ids_request(*long)]), "vectors")  # beyond all buckets
        assert len(replays) == count
    for ids, answer in zip([*lists, long], answers, strict=True):
        assert np.array_equal(answer, np.array([ids])[..., np.newaxis] * 4.0 + np.arange(4.0))


@pytest.mark.usefixtures("no_trial")
@pytest.mark.parametrize(
    "datatype", ["BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "FP16", "FP32", "FP64", "BF16"]
)
def test_every_datatype(repository: Repository, replays: list[Any], datatype: str) -> None:
    text = X.replace("FP32", datatype) + GRAPHS
    repository.add("m", text, {"model.pt": scripted(Identity())})
    size = {"BOOL": 1, "INT8": 1, "UINT8": 1, "INT32": 4, "FP32": 4, "INT64": 8, "FP64": 8}.get(datatype, 2)
    raws = [bytes([n % 2 for n in range(rows * 3 * size)]) for rows in (1, 3, 16, 5)]
    requests = [InferRequest("m", {"x": Tensor("x", datatype, (len(raw) // 3 // size, 3), raw)}) for raw in raws]
    with engine_over(repository.root) as engine:
        replays.clear()
        answers = [answer for request in requests for answer in infer(engine, [request])]
    assert len(replays) == 4
    for raw, answer in zip(raws, answers, strict=True):
        assert isinstance(answer, InferResponse), answer
        assert bytes(answer.tensor("y").raw()) == raw


@pytest.mark.usefixtures("no_trial")
def test_a_model_without_batches_has_one_graph(repository: Repository, replays: list[Any]) -> None:
    text = X.replace("max_batch_size: 16 dynamic_batching { }", "max_batch_size: 0").replace("[ 3 ]", "[ 2, 3 ]")
    repository.add("m", text + GRAPHS, {"model.pt": scripted(Polynomial())})
    arrays = [np.random.default_rng(n).standard_normal((2, 3), np.float32) for n in range(5)]
    with engine_over(repository.root) as engine:
        replays.clear()
        got = values(infer(engine, [x_request(array) for array in arrays]), "y")
    assert len(replays) == 5 and len(set(map(id, replays))) == 1
    assert all(np.allclose(y, x * x * 0.5 - x * 3.0 + 1.0) for x, y in zip(arrays, got, strict=True))


@pytest.mark.usefixtures("no_trial")
def test_each_request_gets_the_outputs_that_it_asks_for(repository: Repository, replays: list[Any]) -> None:
    text = CONFIG.format(backend='backend: "pytorch"', a="left", b="right", y="difference", z="total")
    repository.add("m", text + ON_GPU + GRAPHS, {"model.pt2": exported(Subtract())})
    asked: list[tuple[str, ...]] = [(), ("total",), ("difference",), ("total", "difference")]
    requests = [
        InferRequest(
            "m",
            {name: Tensor.of(name, np.full((2, 3), value, np.float32)) for name, value in (("left", 9), ("right", n))},
            outputs=names,
        )
        for n, names in enumerate(asked)
    ]
    with engine_over(repository.root) as engine:
        replays.clear()
        answers = [answer for request in requests for answer in infer(engine, [request])]
        answers += infer(engine, requests)
        assert len(replays) >= 5
    for n, answer in enumerate(answers):
        assert isinstance(answer, InferResponse), answer
        names = asked[n % 4] or ("difference", "total")
        assert sorted(tensor.name for tensor in answer.outputs) == sorted(names)
        if "total" in names:
            assert answer.tensor("total").array().tolist() == [[3.0 * (9 - n % 4)]] * 2
        if "difference" in names:
            assert answer.tensor("difference").array().tolist() == [[9.0 - n % 4] * 3] * 2


class Greedy(torch.nn.Module):
    """Changes its input, which is then no id any more."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(100, 4)
        with torch.no_grad():
            self.table.weight.copy_(torch.arange(400.0).reshape(100, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        vectors = self.table(ids)
        ids.add_(99)
        return vectors


@pytest.mark.usefixtures("no_trial")
def test_a_model_that_writes_to_its_inputs_finds_valid_rows_again(repository: Repository, replays: list[Any]) -> None:
    """The rows behind a batch would be out of range in the next execution, which ends the device."""
    repository.add("m", IDS + LENGTHS + GRAPHS, {"model.pt": scripted(Greedy())})
    with engine_over(repository.root) as engine:
        replays.clear()
        for rows in (5, 5, 8, 5, 6, 7, 5, 5):
            answers = values(infer(engine, [ids_request(n, n) for n in range(rows)]), "vectors")
            assert [answer[0, 0, 0] for answer in answers] == [n * 4.0 for n in range(rows)]
        assert len(replays) >= 8


@pytest.mark.usefixtures("no_trial")
def test_what_stays_on_the_device_is_not_overwritten(repository: Repository, replays: list[Any]) -> None:
    """Nor is what is used there, by a model that has graphs, too, and whose inputs come from there."""
    repository.add("embed", IDS.replace("dims: -1", "dims: 4") + GRAPHS, {"model.pt": scripted(Embed())})
    same = SAME.replace("dims: [ -1, 4 ]", "dims: [ 4, 4 ]") + ON_GPU + GRAPHS
    repository.add("same", same, {"model.pt": scripted(Identity())})
    repository.add("chain", CHAIN, {})
    with engine_over(repository.root) as engine:
        replays.clear()
        kept = []
        for n in range(10):
            request = ids_request(n, n + 1, n + 2, n + 3, model="embed")
            request.device_outputs = frozenset({"vectors"})
            kept += infer(engine, [request])
        for n in range(10):
            request = InferRequest("chain", {"IDS": Tensor.of("IDS", np.array([[n, n + 1, n + 2, n + 3]], np.int64))})
            (last,) = values(infer(engine, [request]), "LAST")
            assert last[0, :, 0].tolist() == [4.0 * (n + i) for i in range(4)]
        assert len(replays) == 40
        for n, vectors in enumerate(values(kept, "vectors")):
            assert vectors[0, :, 0].tolist() == [4.0 * (n + i) for i in range(4)]


@pytest.mark.usefixtures("no_trial")
def test_instances_share_nothing(repository: Repository, replays: list[Any]) -> None:
    repository.add("m", X.replace("KIND_GPU", "KIND_GPU count: 3") + GRAPHS, {"model.pt": scripted(Polynomial())})
    arrays = [np.random.default_rng(n).standard_normal((1 + n % 4, 3), np.float32) for n in range(200)]
    with engine_over(repository.root) as engine:
        count = len(set(map(id, replays)))
        got = values(infer(engine, [x_request(array) for array in arrays]), "y")
    assert count == 3 * 5
    assert all(np.allclose(y, x * x * 0.5 - x * 3.0 + 1.0) for x, y in zip(arrays, got, strict=True))


# What has no graph.


@pytest.mark.usefixtures("no_trial")
def test_a_shape_without_a_graph_is_told_once(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_graphs, "_OFTEN", 3)
    more = GRAPHS + parameter("tutti.graphs.batch_sizes", "2")
    repository.add("m", X + more, {"model.pt": scripted(Polynomial())})
    with engine_over(repository.root) as engine, caplog.at_level(logging.INFO, "tutti.backends.cuda_graphs"):
        for _ in range(9):
            infer(engine, [x_request(np.ones((5, 3), np.float32))])
    told = [record.getMessage() for record in caplog.records if "has been executed" in record.getMessage()]
    assert told == ["model 'm': 'x' [5, 3] has been executed 3 times, and there is no CUDA graph for it"]


@pytest.mark.usefixtures("no_trial")
def test_what_the_model_cannot_execute_is_left_out(
    repository: Repository, replays: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    repository.add(
        "m",
        IDS.replace("max_batch_size: 64", "max_batch_size: 8") + LENGTHS + GRAPHS,
        {"model.pt": scripted(Hungry(3))},
    )
    with engine_over(repository.root) as engine:
        replays.clear()
        (answer,) = values(infer(engine, [ids_request(1, 2)]), "vectors")
        assert len(replays) == 1
    assert answer[0, :, 0].tolist() == [1.0, 2.0]
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == [
        f"model 'm': no CUDA graph on cuda:0 for 'ids' [{rows}, {length}]: RuntimeError: CUDA error: out of memory"
        for rows, length in ((8, 8), (8, 4), (4, 8), (4, 4))
    ]


@pytest.mark.usefixtures("no_trial")
def test_outputs_that_are_no_rows_have_no_graphs(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    class Whole(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(dim=0)

    repository.add("m", X + GRAPHS + parameter("tutti.graphs.batch_sizes", "4"), {"model.pt": scripted(Whole())})
    with engine_over(repository.root):
        pass
    assert "no CUDA graph on cuda:0 for 'x' [4, 3]: ValueError: output 'y' has shape [3] for 4 rows" in caplog.text


@pytest.mark.usefixtures("no_trial")
def test_a_capture_that_fails_leaves_a_model_without_graphs(
    repository: Repository, replays: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capture = SimulatedCapturing.capture
    left = [2]

    def failing(self: Any, run: Callable[[], Any]) -> Any:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return capture(self, run)

    monkeypatch.setattr(SimulatedCapturing, "capture", failing)
    repository.add("m", X + GRAPHS, {"model.pt": scripted(Polynomial())})
    with engine_over(repository.root) as engine:
        replays.clear()
        (answer,) = values(infer(engine, [x_request(np.zeros((2, 3), np.float32))]), "y")
    assert answer.tolist() == [[1.0] * 3] * 2 and not replays
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    why = "'x' [8, 3]: RuntimeError: operation not permitted when stream is capturing"
    assert told.startswith("model 'm': it runs on cuda:0 without CUDA graphs") and told.endswith(why)


def test_without_buckets_it_is_told_why_and_nothing_is_tried(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_graphs_trial, "run", lambda *_: pytest.fail("nothing is to be tried"))
    repository.add("m", IDS + GRAPHS, {"model.pt": scripted(Embed())})
    with engine_over(repository.root) as engine:
        (answer,) = values(infer(engine, [ids_request(1, 2)]), "vectors")
    assert answer[0, :, 0].tolist() == [4.0, 8.0]
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1 and "it has no CUDA graphs: input 'ids' has variable dims [-1]" in told[0]


def test_a_graph_that_cannot_be_is_refused(repository: Repository) -> None:
    text = X + GRAPHS.replace("true", "true graph_spec { batch_size: 17 }")
    repository.add("m", text, {"model.pt": scripted(Polynomial())})
    assert "graph_spec[0].batch_size: expected 1 to max_batch_size 16, got 17" in load_error(repository)


# Its life.


@pytest.mark.usefixtures("no_trial")
def test_graphs_go_before_the_weights(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    graph_close, close = capturing._SimulatedGraph.close, pytorch.TorchProgram.close
    monkeypatch.setattr(capturing._SimulatedGraph, "close", lambda self: (order.append("graph"), graph_close(self))[1])
    monkeypatch.setattr(pytorch.TorchProgram, "close", lambda self: (order.append("weights"), close(self))[1])
    repository.add("m", X + GRAPHS, {"model.pt": scripted(Polynomial())})
    with engine_over(repository.root):
        assert not order
    process_engines.engine_of("cuda:0").device.call(lambda: None)
    assert order == ["graph"] * 5 + ["weights"]


@pytest.mark.usefixtures("no_trial")
def test_loaded_and_unloaded_again_and_again(repository: Repository, replays: list[Any]) -> None:
    repository.add("m", X + GRAPHS, {"model.pt": scripted(Polynomial())})
    repository.add("other", X, {"model.pt": scripted(Identity())})
    engine: Engine = local.make_engine(repository.root, timer, ensembles.load, is_controllable=True)
    engine.load("other")
    for n in range(10):
        engine.load("m")
        replays.clear()
        (answer,) = values(infer(engine, [x_request(np.full((3, 3), n, np.float32))]), "y")
        assert answer.tolist() == [[n * n * 0.5 - n * 3.0 + 1.0] * 3] * 3 and len(replays) == 1
        engine.unload("m")
    engine.close()
    assert not process_engines.engine_of("cuda:0").pipelines()


# The process that tries first.


def folder_of(repository: Repository, text: str, module: Any) -> ModelFolder:
    repository.add("m", text, {"model.pt": scripted(module)})
    return ModelFolder(repository.root / "m", config.load(repository.root / "m" / "config.pbtxt"), (1,))


def test_a_trial_in_a_process_passes_and_is_remembered(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(repository, IDS + LENGTHS + GRAPHS, Embed())
    assert cuda_graphs_trial.run(folder, 1, "cuda:0") == Result()
    monkeypatch.setattr(cuda_graphs_trial, "_execute", lambda *_: pytest.fail("it has passed"))
    assert cuda_graphs_trial.run(folder, 1, "cuda:0") == Result()
    os.utime(folder.version_path(1) / "model.pt", ns=(1, 1))
    with pytest.raises(pytest.fail.Exception, match="it has passed"):
        cuda_graphs_trial.run(folder, 1, "cuda:0")


class Centred(torch.nn.Module):
    """A row's output depends on the others'."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=0, keepdim=True)


@pytest.mark.parametrize("command", [["-m", "tutti.backends.cuda_graphs_trial_process"], []])
def test_rows_that_depend_on_each_other_are_found_out(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, command: list[str]
) -> None:
    """Rows that a batch is filled up with would be seen in what is made of its own."""
    if not command:
        monkeypatch.setattr(cuda_graphs_trial, "run", cuda_graphs_trial_process.attempt)
    sizes = parameter("tutti.graphs.batch_sizes", "1, 2, 4, 8, 16")  # the process has its own defaults
    repository.add("m", X + GRAPHS + sizes, {"model.pt": scripted(Centred())})
    with engine_over(repository.root) as engine:
        (answer,) = values(infer(engine, [x_request(np.arange(9, dtype=np.float32).reshape(3, 3))]), "y")
    assert answer.tolist() == [[-3.0] * 3, [0.0] * 3, [3.0] * 3]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    (told,) = [record.getMessage() for record in warnings if record.name == cuda_graphs.__name__]
    expected = (
        "model 'm': it runs on cuda:0 without CUDA graphs: the graph for 'x' [4, 3] makes another output 'y' than"
    )
    assert told.startswith(f"{expected} the model with 3 rows: it is off by ")


def test_what_a_trial_leaves_out_is_not_captured(repository: Repository, replays: list[Any]) -> None:
    folder = folder_of(repository, IDS.replace("max_batch_size: 64", "max_batch_size: 8") + LENGTHS + GRAPHS, Hungry(3))
    result = cuda_graphs_trial_process.attempt(folder, 1, "cuda:0")
    buckets = graph_buckets.plan(folder.config).buckets
    assert not result.failure
    assert {buckets[index].rows for index in result.left_out} == {4, 8} and len(result.left_out) == 4


def test_a_model_that_can_do_nothing_has_no_graphs(repository: Repository) -> None:
    folder = folder_of(repository, IDS + LENGTHS + GRAPHS, Hungry(0))
    assert cuda_graphs_trial_process.attempt(folder, 1, "cuda:0").failure == "RuntimeError: CUDA error: out of memory"


def test_a_device_that_fails_is_told_with_the_shape(repository: Repository) -> None:
    """As lengths for which a model has no positions: there is no other way to find out."""
    bounds = parameter("tutti.bounds", '{"ids": [100, 200]}') + parameter("tutti.pad_value.ids", "100")
    folder = folder_of(repository, IDS + LENGTHS + bounds + GRAPHS, Embed())
    failure = cuda_graphs_trial_process.attempt(folder, 1, "cuda:0").failure
    assert failure.startswith("'ids' [64, 8]: ") and "index out of range" in failure


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("import os; os.abort()", f"has died (status {-signal.SIGABRT}): it said nothing"),
        ("import sys; print('one\\ntwo', file=sys.stderr); sys.exit(3)", "has died (status 3): two"),
        ("import time; time.sleep(100)", "did not end within 0.1 s"),
        ("import signal; signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()", "did not end within 0.1 s"),
    ],
)
def test_a_process_that_dies_or_hangs_is_told(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport sys; sys.stdin.buffer.read()\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(cuda_graphs_trial, "_GRACE_S", 0.3)
    folder = folder_of(repository, X + GRAPHS, Polynomial())
    deadline_s = 0.1 if "did not end" in why else 60.0  # one that dies may take its time for it
    result = cuda_graphs_trial.run(folder, 1, "cuda:0", deadline_s=deadline_s)
    assert result == Result(f"a process that tried to capture them {why}")


def test_a_process_that_takes_too_long_ends_itself(repository: Repository) -> None:
    folder = folder_of(repository, X + GRAPHS, Polynomial())
    result = cuda_graphs_trial.run(folder, 1, "cuda:0", deadline_s=0.01)
    assert result.failure == "a process that tried to capture them did not end within 0.01 s"


@pytest.mark.parametrize(
    ("expected", "actual", "why"),
    [
        ([1.0, 100.0], [1.5, 100.5], ""),
        ([1.0, 100.0], [1.0, 103.0], "it is off by 3, its largest value is 100"),
        ([np.nan, 1.0], [np.nan, 1.0], ""),
        ([np.nan, 1.0], [1.0, 1.0], "values are finite in one of them only"),
        ([], [], ""),
        ([1.0], [1.0, 2.0], "shape [2] instead of [1]"),
        ([1, 2, 3], [1, 2, 4], "33% of its values are others"),
        (list(range(1000)), [*range(999), 0], ""),
    ],
)
def test_outputs_are_compared_by_their_scale(expected: list[Any], actual: list[Any], why: str) -> None:
    assert unequal(np.array(expected), np.array(actual)) == why


def test_outputs_in_bfloat_are_compared_as_numbers() -> None:
    bits = [(np.array([value], np.float32).view(np.uint32) >> 16).astype(np.uint16) for value in (1.0, 1.01, 2.0)]
    assert unequal(bits[0], bits[1], is_bfloat=True) == ""
    assert unequal(bits[0], bits[2], is_bfloat=True) == "it is off by 1, its largest value is 1"
