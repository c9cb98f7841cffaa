"""The pytorch backend with real modules: exported packages and TorchScript, names, several outputs, errors."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import engine_over, infer
from tutti.backends.completion import open_model
from tutti.core import dtypes
from tutti.core.errors import ConfigError, InferError, Internal
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.devices import process_engines
from tutti.repository import config
from tutti.serving import local

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")

from tutti.backends import pytorch, torch_modules

CONFIG = """
{backend} max_batch_size: 8
input [ {{ name: "{a}" data_type: TYPE_FP32 dims: 3 }}, {{ name: "{b}" data_type: TYPE_FP32 dims: 3 }} ]
output [ {{ name: "{y}" data_type: TYPE_FP32 dims: 3 }}, {{ name: "{z}" data_type: TYPE_FP32 dims: 1 }} ]
dynamic_batching {{ max_queue_delay_microseconds: 20000 }}
"""


class Subtract(torch.nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        difference = left - right
        return difference, difference.sum(dim=1, keepdim=True)


class Named(torch.nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"total": (left - right).sum(dim=1, keepdim=True), "difference": left - right}


def exported(module: torch.nn.Module) -> bytes:
    example = (torch.zeros(2, 3), torch.zeros(2, 3))
    batch = torch.export.Dim("batch")
    package = torch.export.export(module, example, dynamic_shapes=({0: batch}, {0: batch}))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(package, buffer)
    return buffer.getvalue()


def scripted(module: torch.nn.Module) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


def ask(root: Path, a: str, b: str, count: int = 3) -> list[InferResponse]:
    requests = []
    for n in range(count):
        left, right = np.full((n + 1, 3), 10, np.float32), np.full((n + 1, 3), n, np.float32)
        requests.append(InferRequest("m", {b: Tensor.of(b, right), a: Tensor.of(a, left)}))
    with engine_over(root) as engine:
        answers = infer(engine, requests)
        assert engine.model("m", "").statistics.counts.executions == 1
    for answer in answers:
        assert not isinstance(answer, InferError), answer
    return answers  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("filename", "save", "module", "names"),
    [
        ("model.pt2", exported, Subtract, ("left", "right", "difference", "total")),
        ("model.pt2", exported, Named, ("left", "right", "difference", "total")),
        ("model.pt2", exported, Subtract, ("INPUT__0", "INPUT__1", "OUTPUT__0", "OUTPUT__1")),
        ("model.pt", scripted, Subtract, ("left", "right", "difference", "total")),
        ("model.pt", scripted, Subtract, ("INPUT__0", "INPUT__1", "OUTPUT__0", "OUTPUT__1")),
    ],
)
def test_a_batch_runs_once_and_names_find_their_tensors(  # type: ignore[no-untyped-def]
    repository: Repository, filename: str, save, module, names: tuple[str, ...]
) -> None:
    a, b, y, z = names
    text = CONFIG.format(backend='platform: "pytorch_libtorch"', a=a, b=b, y=y, z=z)
    repository.add("m", text, {filename: save(module())})
    for n, answer in enumerate(ask(repository.root, a, b)):
        assert answer.tensor(y).array().tolist() == [[10.0 - n] * 3] * (n + 1)
        assert answer.tensor(z).array().tolist() == [[3 * (10.0 - n)]] * (n + 1)


class Weighted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((3,), 2.0))
        self.register_buffer("shift", torch.ones(3))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return left * self.scale, right + self.shift


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("filename", "save"), [("model.pt2", exported), ("model.pt", scripted)])
@pytest.mark.parametrize("kind", ["KIND_CPU", "KIND_GPU"])
@pytest.mark.usefixtures("simulated_gpu")
def test_weights_go_with_the_last_instance(
    repository: Repository, filename: str, save: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, although some reference to the module may be left."""
    modules: list[torch_modules.Module] = []
    begin_use = torch_modules.Module.begin_use
    monkeypatch.setattr(torch_modules.Module, "begin_use", lambda module: (modules.append(module), begin_use(module)))
    text = CONFIG.format(backend='backend: "pytorch"', a="left", b="right", y="y", z="z").replace("dims: 1", "dims: 3")
    repository.add("m", f"{text} instance_group {{ kind: {kind} count: 2 }}", {filename: save(Weighted())})
    threes = np.full((1, 3), 3, np.float32)
    with engine_over(repository.root) as served:
        (answer,) = infer(served, [InferRequest("m", {n: Tensor.of(n, threes) for n in ("left", "right")})])
        assert isinstance(answer, InferResponse)
        assert answer.tensor("y").array().tolist() == [[6.0] * 3] and answer.tensor("z").array().tolist() == [[4.0] * 3]
        first, last = modules
        assert first is last and torch_modules._held_bytes(first._forward) == 24
    for engine in process_engines.engines():  # on a device they go once nothing is under way there
        engine.device.call(lambda: None)
    assert torch_modules._held_bytes(first._forward) == 0


def test_weights_stay_while_an_instance_uses_them() -> None:
    text = CONFIG.format(backend='backend: "pytorch"', a="left", b="right", y="y", z="z")
    module = torch_modules.Module(config.parse(text, "m"), Weighted(), ["left", "right"])
    module.begin_use()
    module.begin_use()
    shift = module._forward.shift
    module.end_use()
    assert shift.tolist() == [1.0] * 3
    module.end_use()
    assert not shift.numel()


class Picky(torch.nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if bool((right < 0).any()):
            raise ValueError("right is negative")
        return left, right


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_only_the_request_that_fails_fails(repository: Repository) -> None:
    text = CONFIG.format(backend='backend: "pytorch"', a="left", b="right", y="y", z="z").replace("dims: 1", "dims: 3")
    repository.add("m", text, {"model.pt": scripted(Picky())})
    requests = [
        InferRequest("m", {n: Tensor.of(n, np.full((1, 3), v, np.float32)) for n in ("left", "right")})
        for v in (1, -1, 2)
    ]
    with engine_over(repository.root) as engine:
        one, bad, two = infer(engine, requests)
    assert isinstance(bad, Internal)
    assert "model 'm': PyTorch failed on input 'left' FP32[1, 3]" in bad.message
    for answer, value in ((one, 1.0), (two, 2.0)):
        assert isinstance(answer, InferResponse)
        assert answer.tensor("y").array().tolist() == [[value] * 3]


class Same(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "datatype", ["BOOL", "UINT8", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32", "FP64"]
)
def test_datatypes(repository: Repository, datatype: str) -> None:
    name = dtypes.to_config(datatype)
    repository.add(
        "m",
        f"""
        backend: "pytorch" max_batch_size: 4
        input {{ name: "x" data_type: {name} dims: 2 }}
        output {{ name: "y" data_type: {name} dims: 2 }}
        """,
        {"model.pt": scripted(Same())},
    )
    data = np.arange(2 * dtypes.NUMPY[datatype].itemsize, dtype=np.uint8).tobytes()
    data = bytes(byte % 2 for byte in data) if datatype == "BOOL" else data
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [InferRequest("m", {"x": Tensor("x", datatype, (1, 2), data)})])
    assert isinstance(answer, InferResponse), answer
    assert (answer.outputs[0].datatype, bytes(answer.outputs[0].raw())) == (datatype, data)


def load_error(repository: Repository) -> str:
    from tests.serving import timer
    from tutti import ensembles

    engine = local.make_engine(repository.root, timer, ensembles.load)
    engine.load_all()
    (failure,) = engine.failures()
    engine.close()
    return failure


PLAIN = CONFIG.format(backend='backend: "pytorch"', a="a", b="b", y="y", z="z")


@pytest.mark.parametrize(
    ("text", "content", "why"),
    [
        (
            CONFIG.format(backend='backend: "pytorch"', a="a", b="b", y="y", z="z"),
            b"junk",
            "1/model.pt is a text: expected what torch.export.save or torch.jit.save made",
        ),
        (
            CONFIG.format(backend='backend: "pytorch"', a="I__0", b="I__2", y="y", z="z"),
            scripted(Subtract()),
            "expected __0 to __1, got ['I__0', 'I__2']",
        ),
        (
            PLAIN.replace("FP32", "STRING"),
            scripted(Subtract()),
            "the pytorch backend has no BYTES tensors",
        ),
        (
            CONFIG.format(backend='backend: "pytorch"', a="a", b="b", y="y", z="z")
            + "instance_group { kind: KIND_GPU }",
            scripted(Subtract()),
            "KIND_GPU, but PyTorch finds no CUDA",
        ),
    ],
)
def test_what_cannot_be_served_is_told_at_load(repository: Repository, text: str, content: bytes, why: str) -> None:
    if "KIND_GPU" in text and torch.cuda.is_available():
        pytest.skip("here it can be served")
    repository.add("m", text, {"model.pt": content})
    assert why in load_error(repository)


def test_the_file_for_gpus_is_that_of_the_configuration(repository: Repository) -> None:
    text = CONFIG.format(backend='backend: "pytorch"', a="left", b="right", y="difference", z="total")
    other = 'parameters { key: "tutti.gpu_model_filename" value { string_value: "model.fp16.pt2" } }'
    repository.add("plain", text, {"model.pt2": exported(Subtract())})
    repository.add("m", text + other, {"model.pt2": exported(Subtract()), "model.fp16.pt2": exported(Named())})
    repository.add("lost", text + other, {"model.pt2": exported(Subtract())})
    folders = {name: open_model(repository.root, name) for name in ("plain", "m", "lost")}
    chosen = {name: pytorch._file(folder, 1, "cpu").name for name, folder in folders.items()}
    assert chosen == dict.fromkeys(folders, "model.pt2")
    assert [pytorch._file(folders[name], 1, "cuda:0").name for name in ("plain", "m")] == [
        "model.pt2",
        "model.fp16.pt2",
    ]
    with pytest.raises(ConfigError, match=r"version 1 has no file 'model\.fp16\.pt2'"):
        pytorch._file(folders["lost"], 1, "cuda:0")


@pytest.mark.gpu
def test_on_a_gpu_it_answers_the_same(repository: Repository) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    text = CONFIG.format(backend='backend: "pytorch"', a="left", b="right", y="difference", z="total")
    repository.add("m", text + "instance_group { kind: KIND_GPU }", {"model.pt2": exported(Subtract())})
    for n, answer in enumerate(ask(repository.root, "left", "right")):
        assert answer.tensor("difference").array().tolist() == [[10.0 - n] * 3] * (n + 1)
