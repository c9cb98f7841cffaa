"""How ONNX Runtime is told to execute on a GPU. Nothing here has one: sessions are fakes, options are data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models import Repository, onnx_add_one, onnx_text
from tests.serving import engine_over, infer
from tutti.backends import onnx_providers, onnxruntime
from tutti.core.errors import ConfigError, InvalidArgument
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.repository import config
from tutti.repository.model_config import ModelConfig

CPU = "CPUExecutionProvider"
DEFAULTS = {"device_id": "1", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}


def parsed(more: str = "", x: str = "TYPE_FP32", y: str = "TYPE_FP32") -> ModelConfig:
    text = f'backend: "onnxruntime" input {{ name: "x" data_type: {x} dims: 4 }}'
    return config.parse(f'{text} output {{ name: "y" data_type: {y} dims: 4 }} {more}', "m")


def accelerators(*named: tuple[str, dict[str, str]], more: str = "") -> ModelConfig:
    made = []
    for name, parameters in named:
        pairs = " ".join(f'parameters {{ key: "{key}" value: "{value}" }}' for key, value in parameters.items())
        made.append(f'gpu_execution_accelerator {{ name: "{name}" {pairs} }}')
    return parsed(f"optimization {{ execution_accelerators {{ {' '.join(made)} }} }} {more}")


def parameters(**given: str) -> str:
    return " ".join(f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}' for k, v in given.items())


def cuda_options(model: ModelConfig) -> dict[str, str]:
    *_, (name, options), last = onnx_providers.providers(model, "cuda:1")
    assert name == "CUDAExecutionProvider" and last == CPU
    return dict(options)


def test_on_the_processor_nothing_else_is_asked_for() -> None:
    model = accelerators(("tensorrt", {}), ("cuda", {"use_tf32": "0"}))
    assert onnx_providers.providers(model, "cpu") == [CPU]


def test_cuda_has_defaults_that_suit_a_server() -> None:
    assert cuda_options(parsed()) == DEFAULTS
    assert cuda_options(accelerators(("cuda", {}))) == DEFAULTS


@pytest.mark.parametrize(
    ("key", "value", "option"),
    [
        ("cudnn_conv_algo_search", "0", "EXHAUSTIVE"),
        ("cudnn_conv_algo_search", "1", "HEURISTIC"),
        ("cudnn_conv_algo_search", "2", "DEFAULT"),
        ("cudnn_conv_algo_search", "EXHAUSTIVE", "EXHAUSTIVE"),
        ("arena_extend_strategy", "0", "kNextPowerOfTwo"),
        ("arena_extend_strategy", "1", "kSameAsRequested"),
        ("arena_extend_strategy", "kNextPowerOfTwo", "kNextPowerOfTwo"),
        ("gpu_mem_limit", "4294967200", "4294967200"),
        ("cudnn_conv_use_max_workspace", "0", "0"),
        ("cudnn_conv1d_pad_to_nc1d", "true", "1"),
        ("do_copy_in_default_stream", "False", "0"),
        ("use_ep_level_unified_stream", "1", "1"),
        ("use_tf32", "0", "0"),
        ("enable_cuda_graph", "0", "0"),
    ],
)
def test_parameters_of_cuda(key: str, value: str, option: str) -> None:
    assert cuda_options(accelerators(("cuda", {key: value}))) == DEFAULTS | {key: option}


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("cudnn_conv_algo_search", "3", "expected one of EXHAUSTIVE, HEURISTIC, DEFAULT (0 to 2), got '3'"),
        ("arena_extend_strategy", "x", "expected one of kNextPowerOfTwo, kSameAsRequested (0 to 1), got 'x'"),
        ("gpu_mem_limit", "-1", "expected a whole number, got '-1'"),
        ("use_tf32", "2", "expected 0, 1, true or false, got '2'"),
        ("enable_cuda_graph", "1", "expected 0: each batch is bound to memory of its own"),
        ("device_id", "0", "the server sets it itself"),
        ("user_compute_stream", "1", "the server sets it itself"),
        ("cudnn_conv_algo", "1", "is not known for 'cuda': expected one of arena_extend_strategy, "),
    ],
)
def test_parameters_that_are_wrong_are_refused(key: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        onnx_providers.providers(accelerators(("cuda", {key: value})), "cuda:0")
    where = f"model 'm': optimization.execution_accelerators: parameter '{key}': "
    assert str(refusal.value).startswith(where) and says in str(refusal.value)


def test_parameters_of_the_model_mean_the_same_and_win() -> None:
    more = parameters(cudnn_conv_algo_search="0", arena_extend_strategy="0", gpu_mem_limit="5")
    made = cuda_options(accelerators(("cuda", {"cudnn_conv_algo_search": "2", "use_tf32": "0"}), more=more))
    assert made == {
        "device_id": "1", "cudnn_conv_algo_search": "EXHAUSTIVE", "arena_extend_strategy": "kNextPowerOfTwo",
        "gpu_mem_limit": "5", "use_tf32": "0",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="parameters: parameter 'gpu_mem_limit': expected a whole number, got 'all'"):
        onnx_providers.providers(parsed(parameters(gpu_mem_limit="all")), "cuda:0")


def test_tensorrt_comes_first_and_cuda_takes_what_it_leaves() -> None:
    model = accelerators(
        ("cuda", {"use_tf32": "0"}),
        ("tensorrt", {"precision_mode": "FP16", "max_workspace_size_bytes": "5", "trt_engine_cache_enable": "1"}),
    )
    (name, options), (cuda, _), last = onnx_providers.providers(model, "cuda:3")
    assert (name, cuda, last) == ("TensorrtExecutionProvider", "CUDAExecutionProvider", CPU)
    assert options == {
        "device_id": "3", "trt_fp16_enable": "1", "trt_max_workspace_size": "5", "trt_engine_cache_enable": "1"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("FP32", {}),
        ("FP16", {"trt_fp16_enable": "1"}),
        ("BF16", {"trt_bf16_enable": "1"}),
        ("INT8", {"trt_int8_enable": "1"}),
    ],
)
def test_precisions_of_tensorrt(precision: str, options: dict[str, str]) -> None:
    made = onnx_providers.providers(accelerators(("tensorrt", {"precision_mode": precision})), "cuda:0")
    assert made[0][1] == {"device_id": "0", "trt_engine_cache_enable": "0"} | options


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("tensorrt", {"precision_mode": "FP8"}, "'precision_mode': expected one of FP32, FP16, BF16, INT8, got 'FP8'"),
        ("tensorrt", {"workspace": "1"}, "parameter 'workspace' is not known"),
        ("openvino", {}, "expected 'tensorrt' or 'cuda', got 'openvino'"),
    ],
)
def test_other_accelerators_are_refused(name: str, given: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=r"model 'm': optimization.execution_accelerators: ") as refusal:
        onnx_providers.providers(accelerators((name, given)), "cuda:0")
    assert says in str(refusal.value)


def test_a_provider_that_did_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where cuDNN is missing: ONNX Runtime logs that, and would execute on the processor."""
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_add_one())
    session = onnxruntime.ort.InferenceSession
    monkeypatch.setattr(
        onnxruntime.ort, "InferenceSession", lambda path, options, **given: session(path, options, providers=[CPU])
    )
    with pytest.raises(ConfigError, match="'m': onnxruntime could not start CUDAExecutionProvider on cuda:0: its log"):
        onnxruntime._session(parsed("max_batch_size: 2"), path, "cuda:0")


class FakeSession:
    """A session on a GPU that notes how it is run; it answers with its input."""

    def __init__(self) -> None:
        self.ways: list[str] = []

    def get_inputs(self) -> list[Any]:
        return []

    def get_outputs(self) -> list[Any]:
        return []

    def run(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        self.ways.append("unbound")
        return [feed["x"]]

    def io_binding(self) -> "FakeBinding":
        return FakeBinding()

    def run_with_iobinding(self, binding: "FakeBinding") -> None:
        self.ways.append("bound")


class FakeBinding:
    def bind_cpu_input(self, name: str, array: Any) -> None:
        self.array = array

    def bind_output(self, name: str, device: str) -> None: ...
    def synchronize_inputs(self) -> None: ...
    def synchronize_outputs(self) -> None: ...

    def copy_outputs_to_cpu(self) -> list[Any]:
        return [self.array]


@pytest.mark.usefixtures("simulated_gpu")
@pytest.mark.parametrize(
    ("x", "y", "device", "way"),
    [
        ("TYPE_FP32", "TYPE_FP32", "cuda:0", "bound"),
        ("TYPE_FP32", "TYPE_FP32", "cpu", "unbound"),
        ("TYPE_STRING", "TYPE_FP32", "cuda:0", "unbound"),
        ("TYPE_FP32", "TYPE_STRING", "cuda:0", "unbound"),
    ],
)
def test_text_cannot_be_bound(x: str, y: str, device: str, way: str) -> None:
    session = FakeSession()
    backend = onnxruntime.OnnxBackend(parsed(x=x, y=y), "1", session, device)
    is_text = x == "TYPE_STRING"
    given = np.array([b"a", "ü".encode()], object) if is_text else np.ones(2, np.float32)
    # The string tensors of ONNX Runtime are text, those of everybody else are bytes.
    (answer,) = backend.run(["y"], {"x": given})
    assert session.ways == [way]
    assert answer.tolist() == (["a", "ü"] if is_text else [b"1.0"] * 2 if y == "TYPE_STRING" else [1.0, 1.0])


def test_text_is_utf8(repository: Repository) -> None:
    tensors = 'input { name: "x" data_type: TYPE_STRING dims: -1 } output { name: "y" data_type: TYPE_STRING dims: -1 }'
    repository.add("m", f'backend: "onnxruntime" {tensors}', {"model.onnx": onnx_text()})

    def asked(*texts: bytes) -> InferRequest:
        return InferRequest("m", {"x": Tensor.of("x", np.array(texts, object))})

    with engine_over(repository.root) as engine:
        good, bad = infer(engine, [asked("grün 日本 ".encode(), b"a\0b\0", b""), asked(b"\xff")])
        assert isinstance(good, InferResponse)
        assert good.outputs[0].array().tolist() == ["grün 日本 ".encode(), b"a\0b\0", b""]
        assert isinstance(bad, InvalidArgument)
        assert bad.message.startswith("model 'm': input 'x': onnxruntime takes text in UTF-8 only")


@pytest.mark.gpu
def test_text_goes_through_a_session_on_a_gpu() -> None:
    ort = onnxruntime.ort
    if not onnxruntime._has_cuda():
        pytest.skip("needs a GPU and onnxruntime-gpu")
    providers = onnx_providers.providers(parsed(), "cuda:0")
    session = ort.InferenceSession(onnx_text(), providers=providers, enable_fallback=0)
    assert "CUDAExecutionProvider" in session.get_providers()
    backend = onnxruntime.OnnxBackend(parsed(x="TYPE_STRING", y="TYPE_STRING"), "1", session, "cuda:0")
    (answer,) = backend.run(["y"], {"x": np.array([b"a", b"b", b"c", b"d"], object)})
    assert answer.tolist() == ["a", "b", "c", "d"]
