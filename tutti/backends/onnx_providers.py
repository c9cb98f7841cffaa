"""ONNX Runtime's execution providers for a model on a device, by `optimization.execution_accelerators`.

Pure: knows how options are called in Triton's configuration and in ONNX Runtime, and does not import it. Options are
checked here, since ONNX Runtime answers one that it does not know by executing elsewhere.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tutti.core.errors import ConfigError
from tutti.repository.model_config import ModelConfig

_WHERE = "optimization.execution_accelerators"
CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"

Provider = tuple[str, dict[str, str]]

# ONNX Runtime's own defaults cost a serving process dear: an exhaustive search for each new shape of a convolution, and
# an arena that doubles.
_CUDA_DEFAULTS = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
# Parameters of the model that mean the same, from before Triton knew the accelerator; they win, as in Triton.
_CUDA_MODEL_PARAMETERS = (
    "cudnn_conv_algo_search", "gpu_mem_limit", "arena_extend_strategy", "do_copy_in_default_stream"
)  # fmt: skip
# The server decides on these itself.
_CUDA_RESERVED = frozenset(
    {
        "device_id", "has_user_compute_stream", "user_compute_stream", "gpu_external_alloc", "gpu_external_free",
        "gpu_external_empty_cache",
    }
)  # fmt: skip
_PRECISIONS = {"FP32": "", "FP16": "trt_fp16_enable", "BF16": "trt_bf16_enable", "INT8": "trt_int8_enable"}
_TENSORRT_NAMES = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}


def providers(config: ModelConfig, device: str) -> list[str | Provider]:
    """In order of preference, with their options; `device` is "cpu" or as "cuda:0".

    Raises ConfigError naming the accelerator, or its parameter, that is not known or has a wrong value.
    """
    if device == "cpu":
        return [CPU]
    number = device.partition(":")[2]
    chosen: list[str | Provider] = []
    cuda = dict(_CUDA_DEFAULTS)
    for accelerator in config.proto.optimization.execution_accelerators.gpu_execution_accelerator:
        if accelerator.name == "cuda":
            cuda |= _cuda_options(config, dict(accelerator.parameters), _WHERE)
        elif accelerator.name == "tensorrt":
            chosen.append((TENSORRT, {"device_id": number, **_tensorrt_options(config, dict(accelerator.parameters))}))
        else:
            raise _fail(config, _WHERE, f"expected 'tensorrt' or 'cuda', got '{accelerator.name}'")
    parameters = {key: config.parameters[key] for key in _CUDA_MODEL_PARAMETERS if key in config.parameters}
    cuda |= _cuda_options(config, parameters, "parameters")
    return [*chosen, (CUDA, {"device_id": number, **cuda}), CPU]


def _cuda_options(config: ModelConfig, parameters: Mapping[str, str], where: str) -> dict[str, str]:
    options = {}
    for key, value in parameters.items():
        if key in _CUDA_RESERVED:
            raise _fail(config, f"{where}: parameter '{key}'", "the server sets it itself, by the instance's device")
        if key not in _CUDA_OPTIONS:
            expected = f"expected one of {', '.join(sorted(_CUDA_OPTIONS))}"
            raise _fail(config, f"{where}: parameter '{key}'", f"is not known for 'cuda': {expected}")
        try:
            options[key] = _CUDA_OPTIONS[key](value)
        except ValueError as error:
            raise _fail(config, f"{where}: parameter '{key}'", f"expected {error}, got '{value}'") from None
    return options


def _tensorrt_options(config: ModelConfig, parameters: dict[str, str]) -> dict[str, str]:
    options = {"trt_engine_cache_enable": "0"}
    precision = parameters.pop("precision_mode", "FP32")
    if precision not in _PRECISIONS:
        expected = f"expected one of {', '.join(_PRECISIONS)}, got '{precision}'"
        raise _fail(config, f"{_WHERE}: parameter 'precision_mode'", expected)
    if _PRECISIONS[precision]:
        options[_PRECISIONS[precision]] = "1"
    for key, value in parameters.items():
        name = _TENSORRT_NAMES.get(key, key)
        if not name.startswith("trt_"):
            raise _fail(config, _WHERE, f"parameter '{key}' is not known")
        options[name] = value
    return options


def _fail(config: ModelConfig, where: str, why: str) -> ConfigError:
    return ConfigError(f"model '{config.name}': {where}: {why}")


def _one_of(*names: str) -> Callable[[str], str]:
    """One of the names, which older configurations give by its position."""

    def check(value: str) -> str:
        by_number = {str(index): name for index, name in enumerate(names)}
        name = by_number.get(value, value)
        if name not in names:
            raise ValueError(f"one of {', '.join(names)} (0 to {len(names) - 1})")
        return name

    return check


def _boolean(value: str) -> str:
    by_text = {"0": "0", "false": "0", "1": "1", "true": "1"}
    if value.lower() not in by_text:
        raise ValueError("0, 1, true or false")
    return by_text[value.lower()]


def _whole_number(value: str) -> str:
    if not (value.isascii() and value.isdecimal()):
        raise ValueError("a whole number")
    return value


def _off(value: str) -> str:
    """A graph reads and writes the memory that it was captured with, and each batch has its own."""
    if _boolean(value) == "1":
        raise ValueError("0: each batch is bound to memory of its own, which a captured graph cannot use")
    return "0"


# Of the CUDA provider of ONNX Runtime 1.23 and later.
_CUDA_OPTIONS: dict[str, Callable[[str], str]] = {
    "arena_extend_strategy": _one_of("kNextPowerOfTwo", "kSameAsRequested"),
    "cudnn_conv_algo_search": _one_of("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "gpu_mem_limit": _whole_number,
    "enable_cuda_graph": _off,
    "sdpa_kernel": _whole_number,
    "tunable_op_max_tuning_duration_ms": _whole_number,
    **dict.fromkeys(
        (
            "cudnn_conv1d_pad_to_nc1d", "cudnn_conv_use_max_workspace", "do_copy_in_default_stream",
            "enable_skip_layer_norm_strict_mode", "fuse_conv_bias", "prefer_nhwc", "tunable_op_enable",
            "tunable_op_tuning_enable", "use_ep_level_unified_stream", "use_tf32",
        ),
        _boolean,
    ),
}  # fmt: skip


def names(chosen: list[Any]) -> list[str]:
    """The providers' names alone."""
    return [provider if isinstance(provider, str) else provider[0] for provider in chosen]
