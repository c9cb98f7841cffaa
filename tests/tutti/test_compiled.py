"""Compiled models: asked for by parameters, made once, compared with the model, and done without where that fails."""

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import engine_over, infer
from tests.tutti.test_pytorch_backend import scripted
from tutti.backends.completion import open_model
from tutti.core.errors import ConfigError
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.repository import config

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")

from tutti.backends import (
    aot_packages,
    artefacts,
    compile_options,
    compiled,
    compiler,
    compiler_process,
    largest_batch,
    pytorch,
    verification,
)
from tutti.backends.compiler import AOT, JIT, Job, Uncompilable
from tutti.backends.cuda_graphs import ModelGraphs
from tutti.devices import cuda

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIZES = [(1, 1), (2, 3), (8, 64), (5, 17), (1, 300)]
CONFIG = """
backend: "pytorch" max_batch_size: 8 dynamic_batching { }
input [ { name: "ids" data_type: TYPE_INT64 dims: -1 }, { name: "mask" data_type: TYPE_INT64 dims: -1 } ]
output [ { name: "pooled" data_type: TYPE_FP32 dims: 4 }, { name: "each" data_type: TYPE_FP32 dims: [ -1, 4 ] } ]
"""


class Encoder(torch.nn.Module):
    """Needs ids below 50, and masks that are not all zeros."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = torch.nn.Embedding(50, 8)
        self.first = torch.nn.Linear(8, 16)
        self.second = torch.nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        each = self.second(torch.nn.functional.gelu(self.first(self.table(ids))))
        weights = mask.unsqueeze(-1).to(each.dtype)
        return {"pooled": (each * weights).sum(1) / weights.sum(1), "each": each}


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Any) -> Any:
        self.calls.add_(1)
        return x + self.calls


def export(module: Any, *examples: Any, dims: Any = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module.eval(), examples, dynamic_shapes=dims)


def export_encoder(seed: int = 0) -> Any:
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    examples = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    return export(Encoder(seed), *examples, dims=(dims, dims))


def save(program: Any, path: Path) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, str(path))
    return path.read_bytes()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save(export_encoder(), tmp_path_factory.mktemp("encoder") / "model.pt2")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of compiled models."""
    monkeypatch.setenv(artefacts.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "compiled"


class FakeCompiler:
    """What it makes of a model is a model, by default the same."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.opened: list[tuple[str, str, int]] = []
        self.executed = 0
        self.meanwhile: Callable[[], None] = lambda: None
        self.program: Any = None

    def compile_apart(self, job: Job, folder: Path) -> None:
        self.jobs.append(job)
        self.meanwhile()
        if self.program is None:
            shutil.copy(job.path, folder / "fake.pt2")
        else:
            save(self.program, folder / "fake.pt2")

    def open(self, folder: Path, how: str, program: Any, device: str, runners: int) -> Callable[..., Any]:
        self.opened.append((how, device, runners))
        module = torch.export.load(str(folder / "fake.pt2")).module(check_guards=False)

        def forward(*tensors: Any) -> Any:
            self.executed += 1
            return module(*tensors)

        return forward


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, cache: Path) -> FakeCompiler:
    there = FakeCompiler()
    monkeypatch.setattr(compiler, "compile_apart", there.compile_apart)
    monkeypatch.setattr(compiled, "opened", there.open)
    return there


def text_of(**parameters: str) -> str:
    bounds = {"tutti.bounds": json.dumps({"ids": [0, 49]})}
    given = bounds | {f"tutti.{name.replace('__', '.')}": value for name, value in parameters.items()}
    return CONFIG + "".join(
        f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}\n"
        for key, value in given.items()
    )


def request(batch: int, length: int) -> InferRequest:
    rng = np.random.default_rng(batch * length)
    ids = rng.integers(0, 50, (batch, length))
    return InferRequest("m", {"ids": Tensor.of("ids", ids), "mask": Tensor.of("mask", np.ones_like(ids))})


def check_answers(root: Path, tolerance: float = 1e-5) -> None:
    """Served answers of several sizes are the module's."""
    requests = [request(*size) for size in SIZES]
    with engine_over(root) as engine:
        assert not engine.failures()
        answers = infer(engine, requests)
    module = Encoder().eval()
    for asked, answer in zip(requests, answers, strict=True):
        assert isinstance(answer, InferResponse), answer
        with torch.no_grad():
            right = module(*(torch.from_numpy(asked.inputs[name].array().copy()) for name in ("ids", "mask")))
        for name in ("pooled", "each"):
            np.testing.assert_allclose(answer.tensor(name).array(), right[name].numpy(), atol=tolerance)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """But that a model takes long: that depends on the machine."""
    told = [record for record in caplog.records if record.name != "tutti.core.operations"]
    return [record.getMessage() for record in told if record.levelno >= logging.WARNING]


# Parameters


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"compile": "fast"}, "tutti.compile: expected 'aot_inductor' or 'torch_compile', got 'fast'"),
        ({"compile": AOT, "compile__mode": "quick"}, "expected default or max-autotune-no-cudagraphs, got 'quick'"),
        ({"compile": AOT, "compile__mode": "reduce-overhead"}, "'reduce-overhead': it records CUDA graphs of its own"),
        ({"compile": AOT, "compile__tolerance": "-1"}, "tolerance: expected a number of at least 0, got '-1'"),
        ({"compile": AOT, "compile__timeout_s": "soon"}, "timeout_s: expected a number of at least 0, got 'soon'"),
        ({"compile": AOT, "compile__timeout_s": "nan"}, "timeout_s: expected a number of at least 0, got 'nan'"),
        ({"compile": AOT, "compile__mod": "default"}, "compile.mod: there are mode, tolerance and timeout_s"),
        ({"compile__mode": "default"}, "tutti.compile.mode: needs tutti.compile"),
        ({"compile": JIT}, "expected a torch.export package (.pt2), got model.pt: TorchScript is none"),
    ],
)
def test_a_wrong_parameter_is_told_at_load(
    repository: Repository, fake: FakeCompiler, encoder: bytes, parameters: dict[str, str], why: str
) -> None:
    file = "model.pt" if "TorchScript" in why else "model.pt2"
    repository.add("m", text_of(**parameters), {file: encoder})
    with engine_over(repository.root) as engine:
        (failure,) = engine.failures()
    assert failure.startswith("model 'm': parameters.tutti.compile")
    assert why in failure
    assert not fake.jobs


def test_torchscript_without_the_parameter_is_served(repository: Repository, fake: FakeCompiler) -> None:
    repository.add("m", text_of(), {"model.pt": scripted(Encoder())})
    check_answers(repository.root)
    assert not fake.jobs


# Making, keeping and comparing


def test_it_is_compiled_once_and_served(
    repository: Repository, fake: FakeCompiler, encoder: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    text = text_of(compile=AOT) + "instance_group { kind: KIND_CPU count: 3 }"
    repository.add("m", text, {"model.pt2": encoder})
    for _ in range(2):
        check_answers(repository.root)
    (job,) = fake.jobs
    assert (job.model, job.how, job.mode, job.device) == ("m", AOT, "default", "cpu")
    assert fake.opened == [(AOT, "cpu", 3)] * 2
    assert fake.executed >= 2 * (3 + len(SIZES) - 1)
    assert not warnings_in(caplog)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "compiling model 'm' for cpu with aot_inductor: takes minutes the first time" in said
    assert re.search(r"compiled model 'm' for cpu in \d+ s: \d+\.\d MB", said)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"compile": JIT}, id="how"),
        pytest.param({"compile": AOT, "compile__mode": "max-autotune-no-cudagraphs"}, id="mode"),
        pytest.param({"compile": AOT, "seed": "1"}, id="file"),
        pytest.param({"compile": AOT, "env": "TORCHINDUCTOR_MAX_AUTOTUNE"}, id="settings"),
        pytest.param({"compile": AOT, "torch": "2.99.0+cu999"}, id="torch"),
    ],
)
def test_what_decides_the_code_makes_it_another(
    repository: Repository,
    fake: FakeCompiler,
    cache: Path,
    encoder: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: dict[str, str],
) -> None:
    repository.add("m", text_of(compile=AOT), {"model.pt2": encoder})
    check_answers(repository.root)
    if other.pop("seed", None):
        (repository.root / "m" / "1" / "model.pt2").write_bytes(save(export_encoder(1), tmp_path / "other.pt2"))
    if name := other.pop("env", None):
        monkeypatch.setenv(name, "1")
    if version := other.pop("torch", None):
        monkeypatch.setattr(torch, "__version__", version)
    (repository.root / "m" / "config.pbtxt").write_text('name: "m"' + text_of(**other))
    for _ in range(2):
        with engine_over(repository.root) as engine:
            assert not engine.failures()
    assert len(fake.jobs) == 2
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_an_entry_that_is_corrupt_is_made_anew(
    repository: Repository, fake: FakeCompiler, cache: Path, encoder: bytes
) -> None:
    repository.add("m", text_of(compile=AOT), {"model.pt2": encoder})
    check_answers(repository.root)
    (file,) = cache.glob("*/fake.pt2")
    content = file.read_bytes()
    file.write_bytes(content[:-100] + bytes(100))
    check_answers(repository.root)
    assert len(fake.jobs) == 2
    assert next(cache.glob("*/fake.pt2")).read_bytes() == content


def test_other_models_are_loaded_while_it_compiles(repository: Repository, fake: FakeCompiler, encoder: bytes) -> None:
    repository.add("m", text_of(compile=AOT), {"model.pt2": encoder})
    held: list[bool] = []

    def meanwhile() -> None:
        held.append(cuda.loading.locked())

    fake.meanwhile = meanwhile
    check_answers(repository.root)
    assert held == [False]


@pytest.mark.parametrize(
    ("parameters", "is_compiled"),
    [({}, False), ({"compile__tolerance": "0.9999"}, False), ({"compile__tolerance": "100"}, True)],
)
def test_what_does_something_else_is_not_served(
    repository: Repository,
    fake: FakeCompiler,
    encoder: bytes,
    caplog: pytest.LogCaptureFixture,
    parameters: dict[str, str],
    is_compiled: bool,
) -> None:
    fake.program = export_encoder(seed=7)
    repository.add("m", text_of(compile=AOT, **parameters), {"model.pt2": encoder})
    if is_compiled:
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            check_answers(repository.root)
        assert not warnings_in(caplog)
        return
    check_answers(repository.root)
    (warning,) = warnings_in(caplog)
    assert re.search(
        r"model 'm': is served uncompiled on cpu: output \['\w+'\] of \[.*\] differs by \d+\.\d\d% of its range, "
        r"allowed are (0\.20|99\.99)%",
        warning,
    )


def test_what_cannot_be_opened_is_not_served(
    repository: Repository,
    fake: FakeCompiler,
    encoder: bytes,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("libstdc++ is too old\nand more")

    monkeypatch.setattr(compiled, "opened", fail)
    repository.add("m", text_of(compile=JIT), {"model.pt2": encoder})
    check_answers(repository.root)
    (warning,) = warnings_in(caplog)
    assert "served uncompiled on cpu: RuntimeError: libstdc++ is too old (compiled in " in warning


def test_a_cache_that_cannot_be_written_is_told(
    repository: Repository,
    fake: FakeCompiler,
    encoder: bytes,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(artefacts.VARIABLE, str(tmp_path / "file"))
    repository.add("m", text_of(compile=AOT), {"model.pt2": encoder})
    check_answers(repository.root)
    (warning,) = warnings_in(caplog)
    assert f"model 'm': is served uncompiled on cpu: cannot write to {tmp_path}/file/compiled: " in warning
    assert not fake.jobs


@pytest.mark.usefixtures("simulated_gpu")
def test_it_is_served_through_a_device(repository: Repository, fake: FakeCompiler, encoder: bytes) -> None:
    repository.add("m", text_of(compile=AOT) + "instance_group { kind: KIND_GPU }", {"model.pt2": encoder})
    check_answers(repository.root)
    assert len(fake.jobs) == 1
    assert fake.executed > 3


@pytest.mark.usefixtures("simulated_gpu")
def test_what_tries_graphs_takes_what_has_been_compiled(
    repository: Repository, fake: FakeCompiler, encoder: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial has no time to compile: the model is compiled before, and once, even where that fails."""
    repository.add("m", text_of(compile=AOT) + "instance_group { kind: KIND_GPU }", {"model.pt2": encoder})
    folder = open_model(repository.root, "m")
    inputs = {name: tensor.array() for name, tensor in request(2, 3).inputs.items()}
    executed: list[int] = []

    def attempt(*_: Any) -> None:
        before = fake.executed
        pytorch.program(folder, 1, "cuda:0").execute(inputs, ["pooled"])
        executed.append(fake.executed - before)

    attempt()
    assert executed.pop() == 0
    monkeypatch.setattr(ModelGraphs, "try_on", attempt)
    with engine_over(repository.root) as engine:
        assert not engine.failures()
    assert executed.pop(0) > 1
    assert len(fake.jobs) == 1


def test_what_fails_on_one_gpu_is_not_tried_on_the_next(
    repository: Repository, fake: FakeCompiler, cache: Path, encoder: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise Uncompilable("no")

    fake.meanwhile = fail
    monkeypatch.setattr(compiled, "_kind", lambda device: "Some GPU sm_90")
    repository.add("m", text_of(compile=JIT), {"model.pt2": encoder})
    path = repository.root / "m" / "1" / "model.pt2"
    parsed = open_model(repository.root, "m").config
    compilation = compile_options.wanted(parsed, path)
    assert compilation is not None
    assert [compiled.entry(parsed, compilation, path, f"cuda:{number % 3}") for number in range(6)] == [None] * 6
    assert len(fake.jobs) == 1


# What is missing


def test_without_a_compiler_it_is_served_uncompiled(
    repository: Repository,
    cache: Path,
    encoder: bytes,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    repository.add("m", text_of(compile=AOT), {"model.pt2": encoder})
    check_answers(repository.root)
    (warning,) = warnings_in(caplog)
    why = "there is no C++ compiler: 'g++' is not on PATH (install g++, or set CXX)"
    assert warning == f"model 'm': is served uncompiled on cpu: {why}"
    assert not [path for path in cache.iterdir() if path.is_dir()]


def tool(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path / "cuda")}
    assert "no C compiler: neither gcc nor clang" in compiler.missing_for(JIT, "cuda:0", environment)
    assert "'clang++' is not on PATH" in compiler.missing_for(AOT, "cpu", {**environment, "CXX": "clang++"})
    tool(tmp_path, "g++")
    tool(tmp_path, "gcc")
    assert not compiler.missing_for(AOT, "cpu", environment)
    assert "cuda.h was not found (install the CUDA toolkit" in compiler.missing_for(AOT, "cuda:0", environment)
    (tmp_path / "cuda" / "include").mkdir(parents=True)
    (tmp_path / "cuda" / "include" / "cuda.h").write_text("")
    assert not compiler.missing_for(AOT, "cuda:0", environment)
    tool(tmp_path, "nvcc")
    nvccs = {"PATH": str(tmp_path)}
    assert "cuda.h" in compiler.missing_for(AOT, "cuda:0", nvccs)
    assert not compiler.missing_for(AOT, "cuda:0", {**nvccs, "CUDA_INC_PATH": str(tmp_path / "cuda" / "include")})
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    for device in ("cpu", "cuda:0"):
        assert "(install python3-dev)" in compiler.missing_for(JIT, device, environment)
    assert not compiler.missing_for(AOT, "cpu", environment)


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [("cuda:1", "", "1"), ("cuda:1", "3, 5", "5"), ("cuda:0", "GPU-ab,GPU-cd", "GPU-ab")],
)
def test_the_compiling_process_sees_one_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, visible: str, expected: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    environment = compiler._environment(job(how=AOT, device=device), tmp_path)
    assert environment["CUDA_VISIBLE_DEVICES"] == expected
    assert "TRITON_CACHE_DIR" not in environment
    assert compiler._environment(job(how=JIT, device=device), tmp_path)["CUDA_VISIBLE_DEVICES"] == visible


def job(path: str = "model.pt2", how: str = AOT, device: str = "cpu", timeout_s: float = 600) -> Job:
    return Job("m", CONFIG, path, how, "default", device, -1, timeout_s)


# The process that compiles


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    with pytest.raises(Uncompilable, match=r"took more than 0.01 s \(parameters.tutti.compile.timeout_s\)"):
        compiler.compile_apart(job(timeout_s=0.01), tmp_path)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_a_process_ends_with_the_server(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    command = [sys.executable, "-m", "tutti.backends.compiler_process", str(tmp_path), str(ours)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(ours,), start_new_session=True) as process:
        os.close(ours)
        os.close(theirs)
        assert process.wait(timeout=120) in (1, -signal.SIGKILL)  # it may see that at once


def test_why_it_could_not_compile_is_one_line(tmp_path: Path) -> None:
    assert compiler._failure(tmp_path, -11, "a\n\nSegmentation fault\n") == (
        "the compiling process ended with status -11: Segmentation fault"
    )
    crash = (
        "warnings.warn(\nFatal Python error: Segmentation fault\n\nCurrent thread 0x01 (most recent call first):\n"
        '  File "a.py", line 3 in run\n  File "b.py", line 5 in main\n\nExtension modules: numpy (total: 1)\n'
    )
    assert compiler._failure(tmp_path, -11, crash).endswith(
        'status -11: Fatal Python error: Segmentation fault File "a.py", line 3 in run'
    )
    output = (
        "C++ compile error\n\nOutput:\nx.cpp:1:10: fatal error: cuda.h: No such file or directory\ncompilation ended"
    )
    assert compiler.one_line(RuntimeError(output)) == (
        "RuntimeError: x.cpp:1:10: fatal error: cuda.h: No such file or directory"
    )
    assert compiler.one_line(RuntimeError()) == "RuntimeError"


class Overwriting(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.view(-1)[:1].zero_()
        return x + 1


class OverwritingItsOwn(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.relu(x + 1, inplace=True).mul_(2).view(-1).reshape(x.shape)


@pytest.mark.parametrize("is_functional", [False, True])
@pytest.mark.parametrize(("module", "is_told"), [(Counting, True), (Overwriting, True), (OverwritingItsOwn, False)])
def test_a_model_with_a_state_is_not_compiled(module: Any, is_told: bool, is_functional: bool) -> None:
    program = export(module(), torch.zeros(2))
    if is_functional:
        program = program.run_decompositions({})
    if not is_told:
        compiled.check_is_stateless(program)
        return
    with pytest.raises(Uncompilable, match=r"forward writes to its buffers or inputs \(\w+"):
        compiled.check_is_stateless(program)


@pytest.mark.parametrize(("seed", "tolerance", "is_same"), [(0, -1, True), (7, -1, False), (7, 100, True)])
def test_the_process_compares_before_anything_is_kept(
    tmp_path: Path, encoder: bytes, monkeypatch: pytest.MonkeyPatch, seed: int, tolerance: float, is_same: bool
) -> None:
    import torch._inductor

    options: list[dict[str, Any]] = []

    def package(program: Any, package_path: str, inductor_configs: dict[str, Any]) -> None:
        options.append(inductor_configs)
        save(export_encoder(seed), Path(package_path))

    def opened(folder: Path, *_: Any) -> Any:
        return torch.export.load(str(folder / "model.pt2")).module(check_guards=False)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
    monkeypatch.setattr(compiled, "opened", opened)
    (tmp_path / "given.pt2").write_bytes(encoder)
    (tmp_path / "folder").mkdir()
    mode = "max-autotune-no-cudagraphs"
    given = Job("m", text_of(), str(tmp_path / "given.pt2"), AOT, mode, "cpu", tolerance, 60)
    failure = compiler_process._compile(given, tmp_path / "folder")
    assert bool(re.search(r"differs by \d+.\d\d% of its range", failure)) != is_same
    assert options == [{**torch._inductor.list_mode_options(mode), "cpp.dynamic_threads": True}]
    assert options[0]["max_autotune"] and "triton.cudagraphs" not in options[0]


# Comparing


def test_samples_are_of_several_sizes_and_within_bounds() -> None:
    program = export_encoder()
    samples = list(verification.samples(program, [(3, 9), (1, 1)], "cpu"))
    assert [ids.shape for ids, _ in samples] == [(2, 3), (1, 1), (5, 7)]
    for ids, mask in samples:
        assert ids.dtype == mask.dtype == torch.int64
        assert int(ids.min()) >= 3 and int(ids.max()) <= 9
        assert bool((mask == 1).all())
    again = list(verification.samples(program, [(3, 9), (1, 1)], "cpu"))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(samples, again, strict=True))
    assert not any(bool(ids.any()) for ids, _ in verification.samples(program, [], "cpu"))


def test_samples_have_the_shapes_that_the_program_takes() -> None:
    length = torch.export.Dim("half", min=2, max=6)
    program = export(torch.nn.ReLU(), torch.zeros(2, 8, 3, dtype=torch.float64), dims=({1: 2 * length},))
    shapes = [inputs[0].shape for inputs in verification.samples(program, [], "cpu")]
    assert all(shape[0] == 2 and shape[1] % 2 == 0 and 4 <= shape[1] <= 12 and shape[2] == 3 for shape in shapes)
    assert len(set(shapes)) > 1
    (inputs, *_) = verification.samples(program, [], "cpu")
    assert inputs[0].dtype == torch.float64
    assert inputs[0].std() > 0.5


def test_fills_follow_the_configuration() -> None:
    parsed = config.parse(text_of(), "m")
    assert verification.fills(parsed, ["mask", "ids", "other"]) == [(1, 1), (0, 49), None]
    assert pytorch.fills(parsed, export_encoder()) == [(0, 49), (1, 1)]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("expected", "made", "says"),
    [
        ([1.0, 2.0], [1.0, 2.001], ""),
        ([1.0, 2.0], [1.0, 2.1], r"its output of \[2\] differs by 5.00% of its range, allowed are 1.00%"),
        ([1.0, 2.0], [1.0, NAN], "differs by inf%"),
        ([1.0, NAN], [1.0, 2.0], "differs by inf%"),
        ([1.0, NAN, -INF], [1.0, NAN, -INF], ""),
        ([1.0, INF], [1.0, -INF], "differs by inf%"),
        ([NAN], [NAN], ""),
        ([0.0, 0.0], [0.0, 0.0], ""),
        ([], [], ""),
        ([1.0], [1.0, 1.0], r"its output is torch.float32\[2\], not torch.float32\[1\]"),
        ([1.0], [1], "its output is torch.int64"),
        ([1, 2, 3, 4], [1, 2, 3, 5], "differs by 25.00%"),
        ([1, 2], [1, 2], ""),
        ({"a": [1.0], "b": [1.0]}, {"a": [1.0], "b": [3.0]}, r"output \['b'\] of"),
        ({"a": [1.0]}, [1.0], "its outputs are"),
    ],
)
def test_differences_are_told(expected: Any, made: Any, says: str) -> None:
    def tensors(value: Any) -> Any:
        return {k: torch.tensor(v) for k, v in value.items()} if isinstance(value, dict) else torch.tensor(value)

    found = verification.difference(tensors(expected), tensors(made), 0.01)
    assert bool(found) == bool(says)
    assert re.search(says, found), found


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float64", 1e-6), ("float32", 2e-3), ("float16", 2e-2), ("bfloat16", 5e-2), ("int64", 0)]
)
def test_the_coarsest_datatype_decides(dtype: str, expected: float) -> None:
    example = torch.ones(2, 2, dtype=getattr(torch, dtype))
    assert verification.tolerance(export(torch.nn.ReLU(), example)) == expected
    if dtype == "bfloat16":  # computes in 16 bits, answers in 32

        class Mixed(torch.nn.Module):
            def forward(self, x: Any) -> Any:
                return self.inner(x.to(torch.bfloat16)).float()

        mixed = Mixed()
        mixed.inner = torch.nn.Linear(2, 2).to(torch.bfloat16)
        assert verification.tolerance(export(mixed, torch.ones(2, 2))) == expected


# Packages that users make


def archive(files: dict[str, str]) -> Callable[[Path], bytes]:
    def write(path: Path) -> bytes:
        with zipfile.ZipFile(path, "w") as target:
            for name, content in files.items():
                target.writestr(name, content)
        return path.read_bytes()

    return write


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (
            {"model/data/aotinductor/model/w_metadata.json": '{"AOTI_DEVICE_KEY": "cuda"}'},
            "model 'm': model.pt2 is an AOTInductor package for cuda, not for cpu",
        ),
        (
            {"model/data/aotinductor/model/w_metadata.json": '{"AOTI_DEVICE_KEY": "cpu"}'},
            "PyTorch cannot load the AOTInductor package model.pt2: ",
        ),
        ({"model/other": ""}, "PyTorch cannot load model.pt2: "),
    ],
)
def test_a_package_that_cannot_be_loaded_is_told(
    repository: Repository, fake: FakeCompiler, tmp_path: Path, files: dict[str, str], why: str
) -> None:
    content = archive(files)(tmp_path / "x.pt2")
    repository.add("m", text_of() + "instance_group { kind: KIND_CPU }", {"model.pt2": content})
    with engine_over(repository.root) as engine:
        (failure,) = engine.failures()
    assert why in failure
    assert not fake.jobs


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"AOTI_DEVICE_KEY": "cpu", "AOTI_COMPUTE_CAPABILITY": ""}, "for cpu, not for cuda 90"),
        ({"AOTI_DEVICE_KEY": "cuda", "AOTI_COMPUTE_CAPABILITY": "89"}, "for cuda 89, not for cuda 90"),
        ({"AOTI_DEVICE_KEY": "cuda", "AOTI_COMPUTE_CAPABILITY": "90"}, ""),
        ({"AOTI_DEVICE_KEY": "cuda"}, ""),
        ({}, ""),
    ],
)
def test_a_package_is_for_one_kind_of_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, str], why: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    archive({"m/data/aotinductor/model/a_metadata.json": json.dumps(told)})(tmp_path / "model.pt2")
    parsed = config.parse(text_of(), "m")
    if not why:
        aot_packages._check_target(parsed, tmp_path / "model.pt2", "cuda:1")
        return
    with pytest.raises(ConfigError, match=f"model 'm': model.pt2 is an AOTInductor package {why}$"):
        aot_packages.package(parsed, tmp_path / "model.pt2", "cuda:1", 1)


def test_an_exported_program_is_no_package(tmp_path: Path, encoder: bytes) -> None:
    (tmp_path / "exported.pt2").write_bytes(encoder)
    (tmp_path / "junk.pt2").write_bytes(b"junk")
    archive({"m/models/model.json": "", "m/data/aotinductor/model/a.so": ""})(tmp_path / "both.pt2")
    archive({"m/data/aotinductor/model/a.so": ""})(tmp_path / "package.pt2")
    packages = [path.stem for path in sorted(tmp_path.glob("*.pt2")) if compile_options.is_package(path)]
    assert packages == ["package"]
    assert not compile_options.is_package(tmp_path / "none.pt2")


def test_arguments_of_a_package_have_names() -> None:
    def leaf() -> dict[str, Any]:
        return {"type": None, "context": None, "children_spec": []}

    def node(kind: str, context: str, *children: Any) -> dict[str, Any]:
        return {"type": f"builtins.{kind}", "context": context, "children_spec": list(children)}

    named = node("dict", '["mask", "pair"]', leaf(), node("list", "null", leaf(), leaf()))
    spec = node("tuple", "null", node("tuple", "null", leaf(), node("list", "null", leaf())), named)
    assert aot_packages._arguments(spec) == ["0", "1", "mask", "pair.0", "pair.1"]


# For real


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_aot_inductor_compiles_and_its_package_is_a_model_too(
    repository: Repository, cache: Path, encoder: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    if compiler.missing_for(AOT, "cpu", os.environ):
        pytest.skip("no compiler")
    text = text_of(compile=AOT) + "instance_group { kind: KIND_CPU count: 2 }"
    repository.add("m", text, {"model.pt2": encoder})
    check_answers(repository.root)
    assert not warnings_in(caplog)
    (package,) = cache.glob("*/model.pt2")
    assert sorted(path.name for path in package.parent.iterdir()) == ["manifest.json", "model.pt2"]
    (repository.root / "m" / "1" / "model.pt2").write_bytes(package.read_bytes())
    shutil.rmtree(cache)
    check_answers(repository.root)
    (warning,) = warnings_in(caplog)
    assert warning.endswith("model.pt2 is an AOTInductor package already: parameters.tutti.compile changes nothing")
    loaded = aot_packages.Package(package_at := repository.root / "m" / "1" / "model.pt2", "cpu", 1)
    with pytest.raises(TypeError, match="takes 2 tensors, got 1"):
        loaded(torch.zeros(1, 1))
    assert compile_options.is_package(package_at)
    assert not cache.exists()


def sizes(program: Any) -> list[list[int]]:
    """Of what a program was exported with; dynamic ones below 0."""
    values = [node.meta["val"] for node in program.graph_module.graph.nodes if node.name in ("ids", "mask")]
    return [[-size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape] for value in values]


def test_kernels_are_made_for_batches_as_they_come(encoder: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(encoder)
    program = compiled.exported(tmp_path / "model.pt2", "cpu")
    typical = compiler_process.with_rows(program, 64, "cpu")
    assert sizes(program) == [[-2, -3]] * 2 and sizes(typical) == [[-64, -3]] * 2
    assert compiler_process.with_rows(program, 0, "cpu") is program, "there is no batch axis"
    for rows, length in SIZES:
        inputs = torch.ones(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)
        expected, made = (p.module(check_guards=False)(*inputs) for p in (program, typical))
        assert all(torch.equal(expected[name], made[name]) for name in expected)


def test_kernels_are_made_for_the_largest_batch_only(encoder: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(encoder)
    program = compiled.exported(tmp_path / "model.pt2", "cpu")
    assert sizes(compiler_process.with_rows(program, 64, "cpu", is_fixed=True)) == [[64, -3]] * 2
    for inputs, expected in compiled.expectations(program, (), "cpu", rows=7):
        assert [len(tensor) for tensor in inputs] == [7, 7]
        again = program.module(check_guards=False)(*inputs)
        assert all(torch.allclose(expected[name], again[name], equal_nan=True) for name in expected)


def squares(config_text: str = "") -> tuple[str, bytes]:
    """Of a model whose rows alone vary."""
    text = f"""backend: "pytorch" max_batch_size: 8 dynamic_batching {{ }}
    input {{ name: "x" data_type: TYPE_FP32 dims: 3 }} output {{ name: "y" data_type: TYPE_FP32 dims: 3 }}
    parameters {{ key: "tutti.compile" value {{ string_value: "{JIT}" }} }} {config_text}"""
    program = export(Squares(), torch.zeros(2, 3), dims=({0: torch.export.Dim("batch", min=1, max=8)},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return text, buffer.getvalue()


class Squares(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return x * x


def check_squares(root: Path) -> None:
    with engine_over(root) as engine:
        for rows in (3, 8, 1):
            x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
            (answer,) = infer(engine, [InferRequest("m", {"x": Tensor.of("x", x)})])
            assert isinstance(answer, InferResponse), answer
            assert np.array_equal(answer.tensor("y").array(), x * x)


@pytest.mark.parametrize("failure", ["", "compiling", "values"])
def test_the_largest_batch_is_compiled_apart(
    repository: Repository,
    cache: Path,
    fake: FakeCompiler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: str,
) -> None:
    monkeypatch.setattr(largest_batch, "rows_of", lambda config, how, device: config.max_batch_size)
    executed: list[tuple[str, int]] = []
    opened, compile_apart = fake.open, compiler.compile_apart

    def open_one(folder: Path, *others: Any) -> Callable[..., Any]:
        forward = opened(folder, *others)

        def execute(x: Any) -> Any:
            executed.append((folder.name, len(x)))
            return forward(x) + (failure == "values" and folder.name == "largest")

        return execute

    def compile_one(job: Job, folder: Path) -> None:
        if job.rows and failure == "compiling":
            raise Uncompilable("no memory")
        compile_apart(job, folder)

    monkeypatch.setattr(compiled, "opened", open_one)
    monkeypatch.setattr(compiler, "compile_apart", compile_one)
    caplog.set_level(logging.INFO)
    text, program = squares()
    repository.add("m", text, {"model.pt2": program})
    check_squares(repository.root)
    assert [job.rows for job in fake.jobs] == ([0] if failure == "compiling" else [0, 8])
    served = executed[-3:]
    assert [rows for _, rows in served] == [3, 8, 1]
    assert [name == "largest" for name, _ in served] == [False, not failure, False]
    said = "\n".join([record.getMessage() for record in caplog.records])
    assert ("batches of 8 execute what was compiled for any size" in said) is (failure == "values")
    assert ("is not compiled for batches of 8 apart: no memory" in said) is (failure == "compiling")
    check_squares(repository.root)
    assert len(fake.jobs) == (1 if failure == "compiling" else 2), "it is kept"


@pytest.mark.parametrize(
    ("device", "how", "dims", "most", "rows"),
    [
        ("cuda:0", JIT, 3, 8, 8),
        ("cpu", JIT, 3, 8, 0),
        ("cuda:0", AOT, 3, 8, 0),
        ("cuda:0", JIT, -1, 8, 0),
        ("cuda:0", JIT, 3, 1, 0),
    ],
)
def test_for_which_batches_is_compiled_apart(device: str, how: str, dims: int, most: int, rows: int) -> None:
    text = squares()[0].replace("dims: 3", f"dims: {dims}").replace("max_batch_size: 8", f"max_batch_size: {most}")
    assert largest_batch.rows_of(config.parse(text, "m"), how, device) == rows


def test_a_program_of_one_size_is_compiled_as_it_is() -> None:
    fixed = export(Encoder(), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))
    assert compiler_process.with_rows(fixed, 64, "cpu") is fixed


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_torch_compile_compiles_and_keeps_it(
    repository: Repository, cache: Path, encoder: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    if compiler.missing_for(JIT, "cpu", os.environ):
        pytest.skip("no compiler")
    caplog.set_level(logging.INFO, "tutti.backends.compiled")
    repository.add("m", text_of(compile=JIT) + "instance_group { kind: KIND_CPU }", {"model.pt2": encoder})
    for _ in range(2):
        check_answers(repository.root)
    assert not warnings_in(caplog)
    said = [record.getMessage().split()[0] for record in caplog.records if record.name == "tutti.backends.compiled"]
    assert said == ["compiling", "compiled", "model", "model"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_that_cannot_be_compiled_is_told(tmp_path: Path) -> None:
    if compiler.missing_for(JIT, "cpu", os.environ):
        pytest.skip("no compiler")
    text = """backend: "pytorch"
    input { name: "x" data_type: TYPE_FP32 dims: 2 } output { name: "y" data_type: TYPE_FP32 dims: 2 }"""
    save(export(Counting(), torch.zeros(2)), tmp_path / "model.pt2")
    (tmp_path / "folder").mkdir()
    with pytest.raises(Uncompilable, match=r"^forward writes to its buffers or inputs \(aten.add_.Tensor\)$"):
        compiler.compile_apart(
            Job("m", text, str(tmp_path / "model.pt2"), JIT, "default", "cpu", -1, 200), tmp_path / "folder"
        )


@pytest.mark.gpu
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", [AOT, JIT])
def test_on_a_gpu_it_is_compiled_and_answers_the_same(
    repository: Repository, cache: Path, encoder: bytes, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    repository.add("m", text_of(compile=how) + "instance_group { kind: KIND_GPU count: 2 }", {"model.pt2": encoder})
    for _ in range(2):
        check_answers(repository.root, tolerance=1e-3)
    assert not warnings_in(caplog)


@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_on_a_gpu_the_largest_batch_is_compiled_apart(
    repository: Repository, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    text, program = squares("instance_group { kind: KIND_GPU }")
    repository.add("m", text, {"model.pt2": program})
    for _ in range(2):
        check_squares(repository.root)
    assert not warnings_in(caplog)
    assert list(cache.glob("*/largest"))
