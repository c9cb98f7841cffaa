"""CUDA graphs of PyTorch's: on a GPU, and, as far as PyTorch's tensors and rules go, on the processor."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import engine_over, infer, timer
from tests.tutti.test_cuda_graphs import GRAPHS, LENGTHS, Greedy, Polynomial, X, few, values, x_request  # noqa: F401
from tests.tutti.test_device_backend import IDS, Embed, Identity, ids_request
from tests.tutti.test_pytorch_backend import scripted
from tutti import ensembles
from tutti.backends import graph_buckets, pytorch, torch_modules
from tutti.backends.capturing import CudaCapturing, Run, no_collections
from tutti.backends.cuda_graphs import GraphedProgram
from tutti.devices import cuda, process_engines
from tutti.devices.simulated import Costs, SimulatedDevice
from tutti.devices.simulated_timeline import Timeline
from tutti.repository import config
from tutti.serving import local

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class OnProcessor(CudaCapturing):
    """PyTorch's tensors, and graphs that run the same again."""

    def __init__(self) -> None:
        self._device = "cpu"

    def capture(self, run: Run) -> Any:
        outputs = run()

        def replay() -> None:
            with torch.inference_mode():
                for output, again in zip(outputs, run(), strict=True):
                    output.copy_(again)

        return SimpleNamespace(outputs=outputs, replay=replay, close=lambda: None)


def graphed(text: str, module: Any, argument: str) -> tuple[GraphedProgram, pytorch.TorchProgram]:
    parsed = config.parse(text, "m")
    program = pytorch.TorchProgram(parsed, torch_modules.Module(parsed, module, [argument]))
    with_graphs = GraphedProgram(parsed, program)
    device = SimulatedDevice(Timeline(), Costs())
    assert not with_graphs.capture(graph_buckets.plan(parsed).buckets, OnProcessor(), device)
    return with_graphs, program


@pytest.mark.parametrize("mode", ["true", "false"])
def test_replays_of_tensors_are_executions(mode: str) -> None:
    text = X + GRAPHS + f'parameters {{ key: "INFERENCE_MODE" value {{ string_value: "{mode}" }} }}'
    with_graphs, program = graphed(text, torch.jit.script(Polynomial()), "x")
    assert len(with_graphs.graphs) == 5
    kept = []
    for rows in (16, 1, 5, 3, 7, 5, 16):
        x = torch.randn(rows, 3)
        kept.append((with_graphs.execute({"x": x}, ["y"])[0], program.execute({"x": x.clone()}, ["y"])[0]))
        # What one model has made may be another one's input.
        assert torch.equal(with_graphs.execute({"x": kept[-1][0]}, ["y"])[0], Polynomial()(kept[-1][1]))
    assert all(torch.equal(replayed, expected) for replayed, expected in kept)


def test_an_output_that_is_an_input_is_copied() -> None:
    with_graphs, _ = graphed(X + GRAPHS, Identity(), "x")
    first, second = torch.zeros(2, 3), torch.ones(2, 3)
    (output,) = with_graphs.execute({"x": first}, ["y"])
    with_graphs.execute({"x": second}, ["y"])
    assert not output.any()


@pytest.mark.parametrize("wrap", [lambda module: module, torch.jit.script])
def test_tensors_that_are_written_to_are_noticed(wrap: Any) -> None:
    with_graphs, _ = graphed(IDS + LENGTHS + GRAPHS, wrap(Greedy()), "ids")
    for rows in (5, 5, 8, 5, 6, 7, 5, 5):
        (vectors,) = with_graphs.execute({"ids": torch.full((rows, 4), rows)}, ["vectors"])
        assert (vectors[:, :, 0] == rows * 4.0).all()


def test_a_capture_is_guarded_and_tells_its_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a capture that has failed fails, too: it says less."""
    given: list[Any] = []

    @contextmanager
    def graph(graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        given.append((pool, stream, capture_error_mode))
        try:
            yield
        except Exception:
            raise RuntimeError("capture_end has failed") from None

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None, reset=None))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    capturing = CudaCapturing("cuda:0", "stream")

    def run() -> Sequence[Any]:
        assert cuda.caches.locked()
        return ["output"]

    def fail() -> Sequence[Any]:
        raise ValueError("the first")

    assert capturing.capture(run).outputs == ["output"]
    with pytest.raises(ValueError, match="the first"):
        capturing.capture(fail)
    assert given == [("pool", "stream", "thread_local")] * 2
    assert not cuda.caches.locked()


def test_nothing_is_collected_during_captures() -> None:
    with no_collections():
        assert not gc.isenabled()
    assert gc.isenabled()


# On a GPU.


@pytest.fixture
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.GELU(),
                                                                torch.nn.Linear(64, 3)) for _ in range(8)])  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_gpus_graphs_answer_as_the_model_does(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    module = Layers().eval()
    repository.add("m", X + GRAPHS, {"model.pt": scripted(module)})
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((rows, 3), np.float32) for rows in [*range(1, 17)] * 5]
    with engine_over(repository.root) as engine:
        assert "model 'm': 5 CUDA graphs on cuda:0" in caplog.text
        answers = values([a for array in arrays for a in infer(engine, [x_request(array)])], "y")
        joined = values(infer(engine, [x_request(array) for array in arrays]), "y")
    with torch.no_grad():
        expected = [module(torch.from_numpy(array)).numpy() for array in arrays]
    for got in (answers, joined):
        assert all(np.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_gpus_graphs_of_lengths(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bounds = ' parameters { key: "tutti.bounds" value { string_value: "{\\"ids\\": [0, 99]}" } }'
    repository.add("m", IDS.replace("KIND_GPU", "KIND_GPU count: 2") + LENGTHS + bounds + GRAPHS,
                   {"model.pt": scripted(Embed())})  # fmt: skip
    rng = np.random.default_rng(1)
    lists = [rng.integers(0, 100, rng.integers(1, 9)).tolist() for _ in range(500)]
    with engine_over(repository.root) as engine:
        assert caplog.text.count("model 'm': 14 CUDA graphs on cuda:0") == 2
        answers = values(infer(engine, [ids_request(*ids) for ids in lists]), "vectors")
    for ids, answer in zip(lists, answers, strict=True):
        assert np.array_equal(answer, np.array([ids])[..., np.newaxis] * 4.0 + np.arange(4.0))


class Asking(torch.nn.Module):
    """The processor must know a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum().item() > 0.0:
            return x * 2.0
        return x * 3.0


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_what_cannot_be_captured_is_served_without(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    repository.add("m", X + GRAPHS, {"model.pt": scripted(Asking())})
    with engine_over(repository.root) as engine:
        answers = values(infer(engine, [x_request(np.full((1, 3), n, np.float32)) for n in (1, 1, 1)]), "y")
        # PyTorch's allocator is as it was: nothing has failed in this process.
        cuda.empty_caches()
    assert all(answer.tolist() == [[2.0] * 3] for answer in answers)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1 and "model 'm': it runs on cuda:0 without CUDA graphs: 'x' [16, 3]: " in told[0]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_gpus_memory_comes_back(repository: Repository) -> None:
    repository.add("m", X.replace("dims: [ 3 ]", "dims: [ 100000 ]") + GRAPHS, {"model.pt": scripted(Polynomial())})
    repository.add("other", X, {"model.pt": scripted(Identity())})
    engine = local.make_engine(repository.root, timer, ensembles.load, is_controllable=True)
    engine.load("other")
    device = process_engines.engine_of("cuda:0").device
    allocated = []
    for n in range(10):
        engine.load("m")
        (answer,) = values(infer(engine, [x_request(np.full((3, 100000), n, np.float32))]), "y")
        assert (answer == n * n * 0.5 - n * 3.0 + 1.0).all()
        del answer
        engine.unload("m")
        device.call(cuda.empty_caches)
        allocated.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    engine.close()
    assert len(set(allocated[1:])) == 1
