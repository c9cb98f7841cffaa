"""ONNX Runtime: requests of a batch are joined, executed once and split again.

Honours the parameters of Triton's onnxruntime backend: `intra_op_thread_count`, `inter_op_thread_count`,
`execution_mode`, `enable_mem_arena`, `enable_mem_pattern`, `session.*`, and those of its CUDA provider
(onnx_providers.py). And, for
machines without a GPU, `tutti.cpu_model_filename`: a variant of the model for CPUs, as one with 8-bit integers, whose
outputs differ by no more than `tutti.cpu_tolerance` (0.05) of their range. That is checked at load. And for GPUs
`tutti.gpu_model_filename`, as one with 16 bits.
"""

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tutti.backends import joined, model_files, onnx_graph, onnx_providers, parameters, placement
from tutti.backends.joined import JoinedBackend
from tutti.core import dtypes, extras, locales
from tutti.core.dtypes import NUMPY, Array
from tutti.core.errors import ConfigError, InvalidArgument, OutOfMemory
from tutti.core.types import Infer
from tutti.devices.nvml import nvml
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import InstanceGroup, ModelConfig
from tutti.scheduling.interface import Backend, undone

_log = logging.getLogger(__name__)

_CPU_TOLERANCE = 0.05
_NO_LOCALE = re.compile(r"Failed to construct locale with name:([\w.@-]+)")
# Of ONNX Runtime's log levels.
_FATAL = 4
# The size of variable dimensions where a variant is compared.
_VARIABLE = 8


def load(folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
    """One session for each device, shared by the instances there: Run is thread-safe and weights are kept once."""
    config = folder.config
    path = model_files.model_file(folder, version, "model.onnx")
    sessions: dict[str, Any] = {}
    loaded: list[OnnxBackend] = []
    has_cuda = _has_cuda()
    _warn_of_two()
    with undone(loaded):
        for group, number in placement.instances(config, has_cuda):
            device = f"cuda:{number}" if _is_gpu(config, group, has_cuda) else "cpu"
            if device not in sessions:
                variant = config.cpu_filename if device == "cpu" else config.gpu_filename
                file = model_files.version_file(folder, version, variant) if variant else path
                sessions[device] = _session(config, file, device)
                if variant and device == "cpu":
                    _check_variant(config, _session(config, path, device), sessions[device])
            loaded.append(OnnxBackend(config, str(version), sessions[device], device))
        _try_rows(config, loaded)
    return list(loaded)


def _try_rows(config: ModelConfig, loaded: Sequence["OnnxBackend"]) -> None:
    """Let requests be executed one by one where a batch's outputs may not have a row for each of its rows.

    An axis can have any name: what the graph does with zeros counts for more.
    """
    if not joined.may_join(config):
        return
    first = loaded[0]
    makes = joined.makes_rows(config, first.run)
    if makes is False or (makes is None and not first.names_rows):
        finding = "makes other rows than the batch's" if makes is False else "could not be tried with zeros"
        _log.warning("model '%s': its graph %s: its requests are executed one by one", config.name, finding)
        for backend in loaded:
            backend.joins = False


def _session(config: ModelConfig, path: Path, device: str) -> Any:
    providers = onnx_providers.providers(config, device)
    try:
        # Without the fallback: it would execute elsewhere, when it starts and after any failure later, and say nothing.
        session = ort.InferenceSession(path, _options(config), providers=providers, enable_fallback=0)
    except Exception as error:
        raise ConfigError(f"model '{config.name}': onnxruntime cannot load {path.name}: {_reason(error)}") from None
    _check_providers(config, session, device, onnx_providers.names(providers))
    tensors = (session.get_inputs(), session.get_overridable_initializers(), session.get_outputs())
    onnx_graph.check(config, *map(onnx_graph.nodes, tensors))
    return session


def _check_providers(config: ModelConfig, session: Any, device: str, wanted: Sequence[str]) -> None:
    """A provider whose libraries are not to be found is only logged of, and left out."""
    missing = [name for name in wanted if name not in session.get_providers()]
    if missing:
        failure = f"onnxruntime could not start {', '.join(missing)} on {device}: its log says which library it lacks"
        raise ConfigError(f"model '{config.name}': {failure} (instance_group.kind: KIND_CPU does without)")


def _check_variant(config: ModelConfig, original: Any, variant: Any) -> None:
    """Raises ConfigError where the variant's outputs are not the model's, nearly."""
    try:
        tolerance = float(config.parameters.get("tutti.cpu_tolerance", _CPU_TOLERANCE))
    except ValueError:
        raise ConfigError(f"model '{config.name}': parameters.tutti.cpu_tolerance: expected a number") from None
    rng = np.random.default_rng(0)
    feed: dict[str, Array] = {}
    for spec in config.inputs:
        shape = tuple(dim if dim > 0 else _VARIABLE for dim in spec.model_dims)
        shape = (min(2, config.max_batch_size), *shape) if config.is_batched else shape
        if spec.datatype == "BYTES":
            feed[spec.name] = np.full(shape, "")
        elif spec.datatype in ("FP16", "FP32", "FP64"):
            feed[spec.name] = rng.normal(size=shape).astype(NUMPY[spec.datatype])
        else:  # ids, masks: what is not zero may be out of range
            feed[spec.name] = np.zeros(shape, NUMPY[spec.datatype])
    try:
        expected = original.run([spec.name for spec in config.outputs], feed)
    except Exception as error:
        _log.warning("model '%s': its variant for CPUs cannot be compared with it: %s", config.name, error)
        return
    for spec, right, output in zip(
        config.outputs, expected, variant.run([o.name for o in config.outputs], feed), strict=True
    ):
        if not np.issubdtype(right.dtype, np.number) or not right.size:
            continue
        span = max(float(np.abs(right.astype(np.float64)).max()), 1e-6)
        off = float(np.abs(right.astype(np.float64) - output.astype(np.float64)).max()) / span
        if not off <= tolerance:
            raise ConfigError(
                f"model '{config.name}': '{config.cpu_filename}' differs in output '{spec.name}' by {off:.1%} of its "
                f"range, more than tutti.cpu_tolerance allows ({tolerance:.1%})"
            )


def complete(proto: Any, path: Path) -> None:
    """Fill in inputs, outputs and batching of a ModelConfig message from the graph. Raises ConfigError."""
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL  # what is wrong is raised
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ConfigError(f"model '{proto.name}': onnxruntime cannot load {path.name}: {_reason(error)}") from None
    inputs, outputs = onnx_graph.nodes(session.get_inputs()), onnx_graph.nodes(session.get_outputs())
    onnx_graph.complete(proto, list(inputs.values()), list(outputs.values()))


def _reason(error: Exception) -> str:
    """What ONNX Runtime says of a graph that it does not load, and what to do where that is known."""
    match = _NO_LOCALE.search(str(error))
    if match is None:
        return str(error)
    return (
        f"a StringNormalizer in it needs the locale '{match[1]}', which this machine lacks: install it (on Debian: "
        f"{locales.install(match[1])}), or set the node's attribute 'locale' to C.UTF-8"
    )


def _quiet() -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return options


def _options(config: ModelConfig) -> Any:
    options = _quiet()
    level = config.proto.optimization.graph.level
    if level:  # -1 is basic optimizations, 1 and more are extended ones, as in Triton's backend
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_BASIC if level < 0 else levels.ORT_ENABLE_EXTENDED
    # Threads that spin between runs take the cores that the other models and the front-ends need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key in ("intra_op_thread_count", "inter_op_thread_count"):
        setattr(options, key.replace("thread_count", "num_threads"), joined.whole_number(config, key))
    mode = config.parameters.get("execution_mode", "0")
    if mode not in ("0", "1"):
        raise ConfigError(f"model '{config.name}': parameters.execution_mode: expected '0' or '1', got '{mode}'")
    options.execution_mode = ort.ExecutionMode.ORT_PARALLEL if mode == "1" else ort.ExecutionMode.ORT_SEQUENTIAL
    for key, attribute in (("enable_mem_arena", "enable_cpu_mem_arena"), ("enable_mem_pattern", "enable_mem_pattern")):
        is_on = parameters.flag(config, key)
        if is_on is not None:
            setattr(options, attribute, is_on)
    for key, text in config.parameters.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, text)
    return options


@functools.cache
def _warn_of_two() -> None:
    """Once a process."""
    if extras.has_two_onnxruntimes():
        _log.warning(extras.TWO_ONNXRUNTIMES)


def _has_cuda() -> bool:
    """The build for GPUs lists its provider on every machine, and falls back to the processor without an error."""
    has_cuda = "CUDAExecutionProvider" in ort.get_available_providers() and nvml.may_have_gpus()
    if has_cuda and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's libraries may be in Python packages, where the linker does not look
    return has_cuda


def _is_gpu(config: ModelConfig, group: InstanceGroup, has_cuda: bool) -> bool:
    if group.kind == "gpu" and not has_cuda and not config.cpu_filename:
        raise ConfigError(
            f"model '{config.name}': instance_group.kind: KIND_GPU, but onnxruntime finds no CUDA; on a machine with a "
            f"GPU, its own wheel replaces that for processors: {extras.SWAP_ONNXRUNTIME}"
        )
    return group.kind != "cpu" and has_cuda


class OnnxBackend(JoinedBackend):
    """One instance over a session."""

    library = "onnxruntime"

    def __init__(self, config: ModelConfig, version: str, session: Any, device: str = "cpu") -> None:
        super().__init__(config, version, device)
        self._session = session
        self._text_inputs = frozenset(spec.name for spec in config.inputs if spec.datatype == "BYTES")
        # Text can be bound to no memory: such a model's tensors are passed as they are.
        self._text_outputs = frozenset(name for name, datatype in self._datatypes.items() if datatype == "BYTES")
        self._is_bound = device != "cpu" and not self._text_inputs and not self._text_outputs
        inputs, outputs = (onnx_graph.nodes(tensors) for tensors in (session.get_inputs(), session.get_outputs()))
        self.names_rows = onnx_graph.names_rows(config, inputs, outputs)
        self._scalar_inputs = onnx_graph.scalars(inputs.values(), config.inputs)
        self._scalar_outputs = onnx_graph.scalars(outputs.values(), config.outputs)

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> Sequence[Array]:
        if self._text_inputs:  # the string tensors of ONNX Runtime are text
            feed = {name: _as_text(name, x) if name in self._text_inputs else x for name, x in feed.items()}
        if self._scalar_inputs:
            feed = {name: x.reshape(()) if name in self._scalar_inputs else x for name, x in feed.items()}
        try:
            arrays: Sequence[Array] = self._run_bound(names, feed) if self._is_bound else self._session.run(names, feed)
        except Exception as error:
            if _is_out_of_memory(error):
                raise OutOfMemory(f"onnxruntime has no memory left on {self.device}: {error}") from None
            raise
        if self._text_outputs:
            arrays = [
                dtypes.as_bytes(np.asarray(array)) if name in self._text_outputs else array
                for name, array in zip(names, arrays, strict=True)
            ]
        if self._scalar_outputs:
            shapes = self._scalar_outputs
            return [
                np.asarray(array).reshape(shapes.get(name, np.shape(array)))
                for name, array in zip(names, arrays, strict=True)
            ]
        return arrays

    def _run_bound(self, names: Sequence[str], feed: Mapping[str, Array]) -> Sequence[Array]:
        """With inputs and outputs bound: what a device makes is copied once, when all of it is there."""
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for name in names:
            binding.bind_output(name, "cpu")
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        arrays: Sequence[Array] = binding.copy_outputs_to_cpu()
        return arrays


def _as_text(name: str, array: Array) -> Array:
    """Raises InvalidArgument for elements that are not UTF-8."""
    try:
        texts = [element if isinstance(element, str) else element.decode() for element in array.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"input '{name}': onnxruntime takes text in UTF-8 only: {error}") from None
    return np.array(texts, dtype=object).reshape(array.shape)


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return "Failed to allocate memory" in text or "out of memory" in text.lower() or "bad_alloc" in text
