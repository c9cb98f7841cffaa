"""ONNX Runtime: requests of a batch are joined, executed once and split again.

Honours the parameters of Triton's onnxruntime backend: `intra_op_thread_count`, `inter_op_thread_count`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
from tritonclient.grpc import model_config_pb2 as pb

from tutti import backends, rows
from tutti.config import ModelConfig
from tutti.cost import Alternatives
from tutti.dtypes import NUMPY, to_config
from tutti.errors import ConfigError, InferError, Internal, InvalidArgument
from tutti.repository import ModelFolder
from tutti.scheduler import Backend
from tutti.types import Call, Infer, InferRequest, InferResponse, Tensor, now_ns

_COMPLETED_BATCH_SIZE = 4
_ORT_TYPES = {
    "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64", "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32",
    "tensor(int64)": "INT64", "tensor(float16)": "FP16", "tensor(float)": "FP32", "tensor(double)": "FP64",
    "tensor(bfloat16)": "BF16", "tensor(string)": "BYTES",
}  # fmt: skip


def load(folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
    """One session, shared by the model's instances: ONNX Runtime's Run is thread-safe and weights are kept once."""
    config = folder.config
    path = backends.model_file(folder, version, "model.onnx")
    try:
        session = ort.InferenceSession(path, _options(config), providers=_providers(config))
    except Exception as error:
        raise ConfigError(f"model '{config.name}': onnxruntime cannot load {path.name}: {error}") from None
    _check_tensors(config, session)
    return [OnnxBackend(config, str(version), session) for _ in backends.instances(config)]


def complete(proto: Any, path: Path) -> None:
    """Fill in inputs, outputs and batching of a ModelConfig message from the graph, as Triton does.

    A graph whose tensors all have a variable first axis is batched: max_batch_size, where not given, becomes 4, with
    dynamic batching. Raises ConfigError when the graph cannot be read.
    """
    try:
        session = ort.InferenceSession(path, _quiet(), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ConfigError(f"model '{proto.name}': onnxruntime cannot load {path.name}: {error}") from None
    nodes = session.get_inputs() + session.get_outputs()
    is_batched = all(node.shape and not isinstance(node.shape[0], int) for node in nodes)
    if not proto.max_batch_size and not proto.input and not proto.output and is_batched:
        proto.max_batch_size = _COMPLETED_BATCH_SIZE
        proto.dynamic_batching.SetInParent()
    sequences = proto.sequence_batching
    own = {control.name for control in sequences.control_input}  # the server feeds and reads these itself
    own.update(name for state in sequences.state for name in (state.input_name, state.output_name))
    for field, given in ((proto.input, session.get_inputs()), (proto.output, session.get_outputs())):
        if field:
            continue
        for node in given:
            if node.name in own:
                continue
            datatype = _ORT_TYPES.get(node.type)
            if datatype is None:
                raise ConfigError(f"model '{proto.name}': tensor '{node.name}' has type {node.type}")
            dims = node.shape[1:] if proto.max_batch_size else node.shape
            data_type = pb.DataType.Value(to_config(datatype))
            field.add(name=node.name, data_type=data_type, dims=[n if isinstance(n, int) else -1 for n in dims])


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
        text = config.parameters.get(key, "0")
        if not text.isdecimal():
            raise ConfigError(f"model '{config.name}': parameters.{key}: expected a whole number, got '{text}'")
        setattr(options, key.replace("thread_count", "num_threads"), int(text))
    return options


def _providers(config: ModelConfig) -> list[str]:
    kinds = {group.kind for group in config.instance_groups}
    has_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if kinds == {"cpu"} or not has_cuda:
        if kinds == {"gpu"}:
            raise ConfigError(f"model '{config.name}': instance_group.kind: KIND_GPU, but onnxruntime finds no CUDA")
        return ["CPUExecutionProvider"]
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def _check_tensors(config: ModelConfig, session: Any) -> None:
    for kind, specs, nodes in (
        ("input", config.inputs, session.get_inputs()),
        ("output", config.outputs, session.get_outputs()),
    ):
        in_graph = {node.name: _ORT_TYPES.get(node.type, node.type) for node in nodes}
        for spec in specs:
            if spec.name not in in_graph:
                raise ConfigError(f"model '{config.name}': {kind} '{spec.name}': the graph has {sorted(in_graph)}")
            if in_graph[spec.name] != spec.datatype:
                raise ConfigError(
                    f"model '{config.name}': {kind} '{spec.name}': configured as {spec.datatype}, "
                    f"the graph has {in_graph[spec.name]}"
                )


class OnnxBackend:
    """One instance over a session."""

    def __init__(self, config: ModelConfig, version: str, session: Any, kind: str = "cpu") -> None:
        self.runs_inline = session.get_providers() == ["CPUExecutionProvider"]
        self.kind = kind
        self._config = config
        self._version = version
        self._session = session
        self._datatypes = {spec.name: spec.datatype for spec in config.outputs}
        for state in config.sequences.states if config.sequences is not None else ():
            self._datatypes[state.output_name] = state.datatype
        self._scratch = rows.Scratch()
        self._ways: dict[int, Alternatives] = {}
        self._all = tuple(self._datatypes)
        self._text_inputs = frozenset(spec.name for spec in config.inputs if spec.datatype == "BYTES")

    def execute(self, calls: Sequence[Call]) -> Sequence[InferResponse | Exception]:
        """One run for all. Where that fails, each request runs alone, so that only the culprit fails.

        Large inputs, which would have to be copied to be joined, run one by one where that has proved to be quicker.
        """
        requests = [call.request for call in calls]
        if len(requests) == 1 or not self.runs_inline or not rows.is_large(requests):
            return self._execute(requests)
        known = self._ways.setdefault(len(requests), Alternatives())
        way = known.choose()
        start_ns = now_ns()
        answers = self._execute(requests) if way == 0 else [self._execute([one])[0] for one in requests]
        known.record(way, now_ns() - start_ns, len(requests))
        return answers

    def _execute(self, requests: Sequence[InferRequest]) -> Sequence[InferResponse | Exception]:
        try:
            return self._run(requests)
        except InferError as error:
            if len(requests) == 1:
                return [error]
        return [answer for request in requests for answer in self._execute([request])]

    def close(self) -> None:
        """The session ends with its last instance."""

    def _run(self, requests: Sequence[InferRequest]) -> Sequence[InferResponse | Exception]:
        first = requests[0]
        is_alike = all(request.outputs == first.outputs for request in requests)
        asked = {name for request in (requests[:1] if is_alike else requests) for name in request.outputs or self._all}
        names = [name for name in self._datatypes if name in asked]
        feed = {name: self._input(requests, name) for name in first.inputs}
        try:
            arrays = self._session.run(names, feed)
        except Exception as error:
            raise self._failure(first, error) from None
        outputs = [self._output(name, array) for name, array in zip(names, arrays, strict=True)]
        return rows.answers(self._config.name, self._version, requests, outputs, is_alike)

    def _input(self, requests: Sequence[InferRequest], name: str) -> Any:
        array = rows.join(requests, name, self._scratch)
        if name in self._text_inputs:
            return array.astype(str)  # the string tensors of ONNX Runtime are text
        return array

    def _output(self, name: str, array: Any) -> Tensor:
        datatype = self._datatypes[name]
        if array.dtype != NUMPY[datatype]:
            array = array.astype(NUMPY[datatype])
        return Tensor(name, datatype, array.shape, array)

    def _failure(self, request: InferRequest, error: Exception) -> InferError:
        name = self._config.name
        for tensor in request.inputs.values():
            if 0 in tensor.shape:  # what most graphs fail on, in words that do not say so
                shape = list(tensor.shape)
                return InvalidArgument(
                    f"model '{name}': input '{tensor.name}' is empty: expected elements, got {shape}"
                )
        shapes = ", ".join(f"'{t.name}' {t.datatype}{list(t.shape)}" for t in request.inputs.values())
        return Internal(f"model '{name}': onnxruntime failed on input {shapes}: {error}")
