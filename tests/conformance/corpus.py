"""The corpus of the differential suite: one repository, and seeded requests to it, good and bad, over both protocols.

Each case is one exchange, or several in order; names are stable, so that a difference can be listed by name.
"""

import base64
import gzip
import json
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from tests.models import Repository
from tutti.core.dtypes import NUMPY, encode_bytes

SEED = 7
# A POSIX segment that whoever runs the corpus makes: 64 bytes, the first 16 of them 1.0, 2.0, 3.0, 4.0.
SHARED_KEY = "/tutti_differential"
SHARED_SIZE = 64
LENGTH = "Inference-Header-Content-Length"
DATATYPES = [name for name in NUMPY if name != "BF16"]  # numpy, and so Triton's python backend, knows no BF16
SHAPES = [(1,), (7,), (0,), (40,)]
BATCHED = ("FP32", "INT64", "UINT8", "BYTES", "BOOL")
CONTENTS = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


@dataclass(frozen=True)
class Http:
    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Grpc:
    """A unary call, or with `is_stream` the messages of one stream."""

    method: str
    messages: tuple[bytes, ...]
    metadata: tuple[tuple[str, str], ...] = ()
    is_stream: bool = False


@dataclass(frozen=True)
class Case:
    name: str
    steps: tuple[Http | Grpc, ...]


ECHO = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x)])
"""
PAIR = """
    a = pb_utils.get_input_tensor_by_name(request, "a").as_numpy()
    b = pb_utils.get_input_tensor_by_name(request, "b").as_numpy()
    c = pb_utils.get_input_tensor_by_name(request, "c")
    more = 0 if c is None else c.as_numpy()
    outputs = {"sum": a + b + more, "difference": a - b - more}
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(n, a.astype(np.int32)) for n, a in outputs.items() if n in request.requested_output_names()]
    )
"""
TELLS = """
    given = json.loads(request.parameters())
    given = {key: given[key] for key in sorted(given)}
    text = json.dumps([request.request_id(), request.correlation_id(), given]).encode()
    return pb_utils.InferenceResponse([pb_utils.Tensor("seen", np.array([text], dtype=object))])
"""
FAILS = """
    code = int(pb_utils.get_input_tensor_by_name(request, "x").as_numpy()[0])
    if code < 0:
        raise ValueError("raised")
    kinds = ("UNKNOWN", "INTERNAL", "NOT_FOUND", "INVALID_ARG", "UNAVAILABLE", "UNSUPPORTED", "ALREADY_EXISTS", "CANCELLED")
    kind = getattr(pb_utils.TritonError, kinds[code])
    return pb_utils.InferenceResponse(error=pb_utils.TritonError("failed on purpose", kind))
"""
SUMS = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    if pb_utils.get_input_tensor_by_name(request, "START").as_numpy().item():
        self.sum = 0
    self.sum = getattr(self, "sum", 0) + int(x.item())
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.full_like(x, self.sum))])
"""
COUNT = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for n in range(int(pb_utils.get_input_tensor_by_name(request, "x").as_numpy()[0])):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([n], np.int32))]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
TEXT = """
    text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)
    k = pb_utils.get_input_tensor_by_name(request, "k")
    out = b"|".join(text) + (b"" if k is None else str(k.as_numpy().reshape(-1).tolist()).encode())
    return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", np.array([[out]], dtype=object))])
"""
# What a python model sees of its request, of itself, and of Triton's module.
API = """
    x = pb_utils.get_input_tensor_by_name(request, "x")
    shown = {
        "id": request.request_id(), "correlation": request.correlation_id(), "flags": request.flags(),
        "outputs": sorted(request.requested_output_names()), "timeout": request.timeout(),
        "parameters": sorted(json.loads(request.parameters()).items()), "inputs": [t.name() for t in request.inputs()],
        "tensor": [x.name(), x.is_cpu(), str(x.as_numpy().dtype), list(x.as_numpy().shape)],
        "missing": pb_utils.get_input_tensor_by_name(request, "none"), "cancelled": request.is_cancelled(),
        "types": [
            str(np.dtype(pb_utils.triton_string_to_numpy(n))) for n in ("TYPE_BOOL", "TYPE_UINT8", "TYPE_INT64", "TYPE_FP16", "TYPE_FP64", "TYPE_STRING")
        ],
        "numbers": [pb_utils.numpy_to_triton_type(t) for t in (np.bool_, np.uint8, np.int64, np.float32, np.object_)],
        "back": [str(np.dtype(pb_utils.triton_to_numpy_type(n))) for n in (1, 2, 9, 11, 13)],
        "config": [
            pb_utils.get_input_config_by_name(self.config, "x"), pb_utils.get_output_config_by_name(self.config, "seen")["dims"],
            pb_utils.get_output_config_by_name(self.config, "none"), pb_utils.using_decoupled_model_transaction_policy(self.config),
        ],
        "args": [self.args[k] for k in ("model_name", "model_version", "model_instance_kind", "model_instance_device_id")],
        "arguments": sorted(self.args),
        "roundtrip": pb_utils.deserialize_bytes_tensor(pb_utils.serialize_byte_tensor(np.array([b"a", b"bc"], dtype=object))).tolist() == [b"a", b"bc"],
        "own": [float(v) for v in pb_utils.Tensor("t", np.array([1, 2], np.float32)).as_numpy()],
        "response": [
            pb_utils.InferenceResponse([]).has_error(), pb_utils.InferenceResponse(error=pb_utils.TritonError("e")).error().message(),
            len(pb_utils.InferenceResponse([pb_utils.Tensor("t", x.as_numpy())]).output_tensors()),
        ],
    }
    try:
        pb_utils.InferenceResponse(5)
    except Exception as error:
        shown["raises"] = True
    text = json.dumps(shown, sort_keys=True, default=str).encode()
    return pb_utils.InferenceResponse([pb_utils.Tensor("seen", np.array([text], dtype=object))])
"""
BLS = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    what = int(x[0])
    if what == 0:  # another model, and its output
        inner = pb_utils.InferenceRequest(
            model_name="add_one", requested_output_names=["y"], inputs=[pb_utils.Tensor("x", np.full((1, 4), 2.0, np.float32))]
        )
        answer = inner.exec()
        y = pb_utils.get_output_tensor_by_name(answer, "y").as_numpy().reshape(-1)[:1].astype(np.int32)
    elif what == 1:  # one that is not there
        answer = pb_utils.InferenceRequest(model_name="none", requested_output_names=["y"], inputs=[]).exec()
        y = np.array([int(answer.has_error())], np.int32)
    elif what == 2:  # a bad input
        answer = pb_utils.InferenceRequest(
            model_name="add_one", requested_output_names=["y"], inputs=[pb_utils.Tensor("x", np.zeros((1, 3), np.float32))]
        ).exec()
        y = np.array([int(answer.has_error()) + 10], np.int32)
    elif what == 3:  # a decoupled one
        answers = pb_utils.InferenceRequest(
            model_name="count", requested_output_names=["y"], inputs=[pb_utils.Tensor("x", np.array([4], np.int32))]
        ).exec(decoupled=True)
        total = 0
        for answer in answers:
            for tensor in answer.output_tensors():
                total += int(tensor.as_numpy()[0])
        y = np.array([total], np.int32)
    elif what == 4:  # an ensemble, of a version, with an id
        answer = pb_utils.InferenceRequest(
            request_id="inner", model_name="twice", model_version=1, requested_output_names=["y"],
            inputs=[pb_utils.Tensor("x", np.full((1, 4), 2.0, np.float32))],
        ).exec()
        y = pb_utils.get_output_tensor_by_name(answer, "y").as_numpy().reshape(-1)[:1].astype(np.int32)
    elif what == 5:  # parameters
        answer = pb_utils.InferenceRequest(
            request_id="inner", model_name="tells", requested_output_names=["seen"], parameters={"a": 1, "b": "c"},
            inputs=[pb_utils.Tensor("x", np.array([1], np.int32))],
        ).exec()
        y = np.array([len(pb_utils.get_output_tensor_by_name(answer, "seen").as_numpy()[0])], np.int32)
    elif what == 6:  # an exception of Triton's
        raise pb_utils.TritonModelException("on purpose")
    elif what == 7:  # an output of another type
        y = np.array([1.0], np.float64)
    elif what == 8:  # nothing
        return None
    elif what == 9:  # an output too many
        return pb_utils.InferenceResponse([pb_utils.Tensor(n, np.array([1], np.int32)) for n in ("y", "z")])
    elif what == 10:  # an output too few
        return pb_utils.InferenceResponse([])
    elif what == 11:  # of another shape
        y = np.zeros((2, 2), np.int32)
    else:
        y = x
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", y)])
"""
ASYNC_BLS = """
import asyncio
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    async def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            inner = [
                pb_utils.InferenceRequest(
                    model_name="add_one", requested_output_names=["y"], inputs=[pb_utils.Tensor("x", np.full((1, 4), n, np.float32))]
                ).async_exec()
                for n in range(int(x[0]))
            ]
            answers = await asyncio.gather(*inner)
            total = sum(int(pb_utils.get_output_tensor_by_name(a, "y").as_numpy()[0, 0]) for a in answers)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([total], np.int32))]))
        return responses
"""
# What the sequence batcher's control inputs say.
CONTROLS = """
    names = ("START", "END", "READY", "CORRID")
    found = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names]
    text = json.dumps([[str(a.dtype), list(a.shape), a.reshape(-1).tolist()] for a in found], default=str).encode()
    return pb_utils.InferenceResponse([pb_utils.Tensor("seen", np.array([[text]], dtype=object))])
"""
INT = "data_type: TYPE_INT32 dims: 4"


def fill(repository: Repository) -> None:
    """The models of the corpus."""
    for datatype in DATATYPES:
        kind = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
        for name, rows, dims in ((f"echo_{datatype}", 0, "[ -1 ]"), (f"rows_{datatype}", 4, "[ -1, 2 ]")):
            if rows and datatype not in BATCHED:
                continue
            ends = f'input {{ name: "x" data_type: {kind} dims: {dims} }} output {{ name: "y" data_type: {kind} dims: {dims} }}'
            repository.add_python(name, f'backend: "python" max_batch_size: {rows} {ends}', ECHO)
    repository.add_onnx(extra="version_policy { all {} } dynamic_batching { max_queue_delay_microseconds: 100 }")
    repository.add_onnx("labelled")
    path = repository.root / "labelled" / "config.pbtxt"
    path.write_text(path.read_text().replace('output { name: "y"', 'output { name: "y" label_filename: "labels.txt"'))
    (repository.root / "labelled" / "labels.txt").write_text("zero\none\ntwo\n")
    optional = f'input {{ name: "c" {INT} optional: true }}'
    repository.add_python(
        "pair",
        f"""
        backend: "python" max_batch_size: 4
        input {{ name: "a" {INT} }} input {{ name: "b" {INT} }} {optional}
        output {{ name: "sum" {INT} }} output {{ name: "difference" {INT} }}
        """,
        PAIR,
    )
    repository.add(
        "twice",
        """
        platform: "ensemble" max_batch_size: 8
        input { name: "x" data_type: TYPE_FP32 dims: 4 }
        output { name: "y" data_type: TYPE_FP32 dims: 4 }
        ensemble_scheduling {
          step { model_name: "add_one" model_version: -1 input_map { key: "x" value: "x" } output_map { key: "y" value: "z" } }
          step { model_name: "labelled" model_version: -1 input_map { key: "x" value: "z" } output_map { key: "y" value: "y" } }
        }
        """,
        {},
    )
    one = 'backend: "python" input { name: "x" data_type: TYPE_INT32 dims: 1 }'
    repository.add_python("tells", f'{one} output {{ name: "seen" data_type: TYPE_STRING dims: 1 }}', TELLS)
    repository.add_python("fails", f'{one} output {{ name: "y" data_type: TYPE_INT32 dims: 1 }}', FAILS)
    repository.add_python(
        "api",
        f'{one} output {{ name: "seen" data_type: TYPE_STRING dims: 1 }} output {{ name: "other" data_type: TYPE_INT32 dims: 1 }}',
        API,
        'self.args, self.config = args, json.loads(args["model_config"])',
    )
    repository.add_python("bls", f'{one} output {{ name: "y" data_type: TYPE_INT32 dims: -1 }}', BLS)
    repository.add("async_bls", f'{one} output {{ name: "y" data_type: TYPE_INT32 dims: 1 }}', {"model.py": ASYNC_BLS})
    decoupled = 'output { name: "y" data_type: TYPE_INT32 dims: 1 } model_transaction_policy { decoupled: true }'
    repository.add("count", f"{one} {decoupled}", {"model.py": COUNT})
    repository.add_python(
        "sums",
        """
        backend: "python" max_batch_size: 1
        input { name: "x" data_type: TYPE_INT32 dims: 1 }
        output { name: "y" data_type: TYPE_INT32 dims: 1 }
        sequence_batching {
          direct {}
          control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }
        }
        """,
        SUMS,
    )
    for name, strategy, rows, kind in (
        ("direct", "direct {}", 3, "UINT64"), ("oldest", "oldest { max_candidate_sequences: 4 }", 4, "INT32"),
        ("alone", "direct {}", 0, "INT64"),
    ):  # fmt: skip
        repository.add_python(
            name,
            f"""
            backend: "python" max_batch_size: {rows}
            input {{ name: "x" data_type: TYPE_INT32 dims: 1 }}
            output {{ name: "seen" data_type: TYPE_STRING dims: {1 if rows else -1} {"" if rows else "dims: -1"} }}
            sequence_batching {{
              {strategy}
              control_input {{ name: "START" control {{ kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] }} }}
              control_input {{ name: "END" control {{ kind: CONTROL_SEQUENCE_END fp32_false_true: [ -1, 1 ] }} }}
              control_input {{ name: "READY" control {{ kind: CONTROL_SEQUENCE_READY bool_false_true: [ false, true ] }} }}
              control_input {{ name: "CORRID" control {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_{kind} }} }}
            }}
            """,
            CONTROLS,
        )
    repository.add_python(
        "text",
        """
        backend: "python" max_batch_size: 8
        input { name: "text_input" data_type: TYPE_STRING dims: 1 }
        input { name: "k" data_type: TYPE_INT32 dims: -1 optional: true }
        output { name: "text_output" data_type: TYPE_STRING dims: 1 }
        """,
        TEXT,
    )


def values(datatype: str, shape: tuple[int, ...], rng: np.random.Generator, is_text: bool = False) -> np.ndarray:
    dtype = NUMPY[datatype]
    if datatype == "BYTES":
        pool = [b"", b"a", "ü".encode(), b"long" * 100, b"x y"] + ([] if is_text else [b"\x00\xff", bytes(range(256))])
        array = np.empty(shape, dtype=object)
        array.reshape(-1)[:] = [pool[i] for i in rng.integers(0, len(pool), array.size)]
        return array
    if dtype.kind == "f":
        return rng.normal(0, 100, shape).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def raw_of(datatype: str, array: np.ndarray) -> bytes:
    return encode_bytes(array.reshape(-1)) if datatype == "BYTES" else array.tobytes()


def as_json(datatype: str, array: np.ndarray) -> list[Any]:
    flat = array.reshape(-1).tolist()
    return [value.decode("utf-8", "replace") for value in flat] if datatype == "BYTES" else flat


def infer(model: str, *inputs: dict[str, Any], headers: dict[str, str] | None = None, **more: Any) -> Http:
    """An infer request of JSON alone."""
    body = json.dumps({"inputs": list(inputs), **more}).encode()
    return Http("POST", f"/v2/models/{model}/infer", body, headers or {})


def binary(model: str, header: dict[str, Any], content: bytes, length: str | None = None, **headers: str) -> Http:
    text = json.dumps(header).encode()
    return Http("POST", f"/v2/models/{model}/infer", text + content, {LENGTH: length or str(len(text)), **headers})


def tensor(name: str, datatype: str, shape: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape) if isinstance(shape, tuple) else shape, **more}


def sized(content: bytes) -> dict[str, Any]:
    return {"parameters": {"binary_data_size": len(content)}}


def parameter(value: Any) -> pb.InferParameter:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return pb.InferParameter(**{kinds[type(value)]: value})


def message(
    model: str,
    *inputs: Any,
    raw: tuple[bytes, ...] = (),
    outputs: tuple[Any, ...] = (),
    parameters: dict[str, Any] | None = None,
    **more: Any,
) -> bytes:
    request = pb.ModelInferRequest(
        model_name=model, inputs=inputs, outputs=outputs, raw_input_contents=raw,
        parameters={key: parameter(value) for key, value in (parameters or {}).items()}, **more,
    )  # fmt: skip
    return request.SerializeToString()


def grpc_input(name: str, datatype: str, shape: Any, **contents: Any) -> Any:
    made = pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    if contents:
        made.contents.CopyFrom(pb.InferTensorContents(**contents))
    return made


def wanted(name: str, **parameters: Any) -> Any:
    return pb.ModelInferRequest.InferRequestedOutputTensor(
        name=name, parameters={key: parameter(value) for key, value in parameters.items()}
    )


def call(*messages: bytes, method: str = "ModelInfer", **more: Any) -> Grpc:
    return Grpc(method, messages, **more)


def cases() -> Iterator[Case]:
    rng = np.random.default_rng(SEED)
    for group in (
        _datatypes(rng), _edges(), _rows(rng), _options(), _http_mistakes(), _grpc_mistakes(), _drawn_mistakes(), _questions(),
        _settings(), _shared(), _generate(), _streams(), _sequences(), _errors(), _python(), _control(),
    ):  # fmt: skip
        yield from group


def _datatypes(rng: np.random.Generator) -> Iterator[Case]:
    """Every datatype, several sizes, every representation there and back."""
    for datatype in DATATYPES:
        model = f"echo_{datatype}"
        for shape in SHAPES:
            array = values(datatype, shape, rng)
            text = values(datatype, shape, rng, is_text=True)
            raw = raw_of(datatype, array)
            name = f"{datatype}{list(shape)}"
            as_text = tensor("x", datatype, shape, data=as_json(datatype, text))
            as_bytes = tensor("x", datatype, shape, **sized(raw))
            out = [{"name": "y", "parameters": {"binary_data": True}}]
            plain = [{"name": "y"}]
            yield Case(f"http {name} json json", (infer(model, as_text, outputs=plain),))
            yield Case(f"http {name} json binary", (infer(model, as_text, outputs=out),))
            yield Case(f"http {name} binary binary", (binary(model, {"inputs": [as_bytes], "outputs": out}, raw),))
            if datatype != "BYTES":  # which JSON would show only where it is text
                yield Case(f"http {name} binary json", (binary(model, {"inputs": [as_bytes]}, raw),))
            yield Case(f"grpc {name} raw", (call(message(model, grpc_input("x", datatype, shape), raw=(raw,))),))
            if datatype in CONTENTS:
                items = array.reshape(-1).tolist()
                typed = grpc_input("x", datatype, shape, **{CONTENTS[datatype]: items})
                yield Case(f"grpc {name} typed", (call(message(model, typed)),))


def _edges() -> Iterator[Case]:
    """Values at the edge of what JSON and the datatypes can say."""
    for datatype in ("FP32", "FP64"):
        for value in (np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38, 0.1):
            raw = np.array([value], NUMPY[datatype]).tobytes()
            header = {"inputs": [tensor("x", datatype, (1,), **sized(raw))]}
            yield Case(f"http {datatype} edge {value} shown", (binary(f"echo_{datatype}", header, raw),))
    for text in (b"NaN", b"Infinity", b"1e400", b"-0", b"0.1e1", b"1E2", b"01", b"+1", b".5", b"5.", b"0x1", b"1_0"):
        body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[%b]}]}' % text
        yield Case(f"http FP32 edge {text.decode()} read", (Http("POST", "/v2/models/echo_FP32/infer", body),))
    for datatype, given in (
        ("BOOL", [0, 1]), ("BOOL", [True, 0]), ("BOOL", [2, 0]), ("BOOL", ["true", "false"]), ("BOOL", [1.0, 0.0]),
        ("INT8", [127, -128]), ("INT8", [128, 0]), ("UINT8", [-1, 0]), ("UINT64", [2**64 - 1, 0]), ("UINT64", [2**64, 0]),
        ("INT64", [2**63 - 1, -(2**63)]), ("INT64", [2**63, 0]), ("INT32", [1.0, 2.0]), ("INT32", [1.5, 2]), ("INT32", [True, 1]),
        ("INT32", ["1", "2"]), ("FP32", [1, 2]), ("FP32", [True, 1]), ("FP64", [1e400, 0]), ("INT16", [40000, 0]),
    ):  # fmt: skip
        body = json.dumps({"inputs": [tensor("x", datatype, (2,), data=given)]}).encode()
        yield Case(f"http {datatype} edge {given}", (Http("POST", f"/v2/models/echo_{datatype}/infer", body),))
    for element in (b"\xff\xfe", b"a\x00b", "\u2028\U0001f600".encode(), b'"\\/\b\f\n', b"\x7f", b"<&>"):
        raw = struct.pack("<I", len(element)) + element
        header = {"inputs": [tensor("x", "BYTES", (1,), **sized(raw))]}
        yield Case(f"http BYTES edge {element!r} shown", (binary("echo_BYTES", header, raw),))
    for escaped in (
        b'"\\u0041"',
        b'"\\ud83d\\ude00"',
        b'"\\ud83d"',
        b'"\\u0000"',
        b'"\\x"',
        b'"a\nb"',
        b'"\xff"',
        b"'a'",
    ):
        body = b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":[%b]}]}' % escaped
        yield Case(f"http BYTES edge {escaped!r} read", (Http("POST", "/v2/models/echo_BYTES/infer", body),))
    good = b'"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]'
    for name, body in {
        "comment": b"{/* c */%b}" % good, "trailing comma": b"{%b,}" % good, "doubled member": b'{"id":"a","id":"b",%b}' % good,
        "after it": b"{%b} x" % good, "space before it": b"  \r\n{%b}" % good, "a BOM": b"\xef\xbb\xbf{%b}" % good,
        "unknown members": b'{"zzz":1,%b}' % good, "null members": b'{"id":null,"outputs":null,"parameters":null,%b}' % good,
        "scalar data": good.replace(b"[1]}]", b"1}]").join((b"{", b"}")),
    }.items():  # fmt: skip
        yield Case(f"http JSON edge: {name}", (Http("POST", "/v2/models/echo_FP32/infer", body),))


def _rows(rng: np.random.Generator) -> Iterator[Case]:
    """Batched models: rows, nested JSON, and shapes that do not fit."""
    for datatype in BATCHED:
        model = f"rows_{datatype}"
        for shape in ((1, 1, 2), (3, 2, 2), (4, 5, 2), (5, 1, 2), (1, 2), (2, 3, 3), (0, 1, 2), (1, 0, 2)):
            array = values(datatype, shape, rng, is_text=True)
            raw = raw_of(datatype, array)
            name = f"rows {datatype}{list(shape)}"
            nested = array.tolist()
            if datatype == "BYTES":
                nested = np.vectorize(bytes.decode, otypes=[object])(array).tolist() if array.size else array.tolist()
            yield Case(f"http {name} nested", (infer(model, tensor("x", datatype, shape, data=nested)),))
            yield Case(f"grpc {name}", (call(message(model, grpc_input("x", datatype, shape), raw=(raw,))),))


X = tensor("x", "FP32", (1, 4))
OK = {**X, "data": [1, 2, 3, 4]}
RAW = np.arange(4, dtype=np.float32).tobytes()
PAIR_IN = [tensor(n, "INT32", (2, 4), data=list(range(8))) for n in "ab"]
GRPC_X = grpc_input("x", "FP32", (1, 4))


def _options() -> Iterator[Case]:
    """Outputs, forms, ids, versions, parameters, classes, compression."""
    for default in (None, True, False):
        for listed in ([], ["sum"], ["difference", "sum"]):
            for flag in (None, True, False):
                outputs = [
                    {"name": n, **({} if flag is None else {"parameters": {"binary_data": flag}})} for n in listed
                ]
                more: dict[str, Any] = {"outputs": outputs} if listed else {}
                if default is not None:
                    more["parameters"] = {"binary_data_output": default}
                name = f"http outputs {'+'.join(listed) or 'all'} default {default} flag {flag}"
                yield Case(name, (infer("pair", *PAIR_IN, **more),))
    yield Case("http optional input", (infer("pair", *PAIR_IN, tensor("c", "INT32", (2, 4), data=[1] * 8)),))
    yield Case("http empty outputs", (infer("add_one", OK, outputs=[]),))
    for request_id in ("", "a", "ü", "x" * 500, 'quote"', "line\nbreak"):
        yield Case(f"http id {request_id[:8]!r}", (infer("add_one", OK, id=request_id),))
        yield Case(f"grpc id {request_id[:8]!r}", (call(message("add_one", GRPC_X, raw=(RAW,), id=request_id)),))
    for version in ("1", "2", "9", "x", "-1", "01"):
        yield Case(
            f"http version {version}",
            (Http("POST", f"/v2/models/add_one/versions/{version}/infer", infer("", OK).body),),
        )
        yield Case(f"grpc version {version}", (call(message("add_one", GRPC_X, raw=(RAW,), model_version=version)),))
    one = tensor("x", "INT32", (1,), data=[1])
    grpc_one = grpc_input("x", "INT32", (1,), int_contents=[1])
    for key, value in (("a", 1), ("b", "text"), ("c", True), ("d", False), ("long" * 20, -5), ("ü", "ü")):
        yield Case(f"http parameter {key[:8]}", (infer("tells", one, parameters={key: value}, id="i"),))
        yield Case(f"grpc parameter {key[:8]}", (call(message("tells", grpc_one, parameters={key: value}, id="i")),))
    for key in ("triton_nope", "triton_final_response"):
        yield Case(f"http parameter {key}", (infer("tells", one, parameters={key: 1}),))
        yield Case(f"grpc parameter {key}", (call(message("tells", grpc_one, parameters={key: 1})),))
    for key, value in (("priority", 1), ("timeout", 1_000_000), ("sequence_id", 5)):
        yield Case(f"http parameter {key}", (infer("add_one", OK, parameters={key: value}),))
        yield Case(f"grpc parameter {key}", (call(message("add_one", GRPC_X, raw=(RAW,), parameters={key: value})),))
    for key, value in (
        ("priority", "x"),
        ("priority", -1),
        ("timeout", True),
        ("sequence_id", True),
        ("sequence_end", 1),
    ):
        yield Case(f"http parameter {key} {value}", (infer("add_one", OK, parameters={key: value}),))
        yield Case(
            f"grpc parameter {key} {value}", (call(message("add_one", GRPC_X, raw=(RAW,), parameters={key: value})),)
        )
    for model in ("add_one", "labelled", "twice"):
        for k in (1, 3, 9):
            classes = [{"name": "y", "parameters": {"classification": k}}]
            yield Case(f"http {model} classes {k}", (infer(model, OK, outputs=classes),))
            yield Case(
                f"grpc {model} classes {k}",
                (call(message(model, GRPC_X, raw=(RAW,), outputs=(wanted("y", classification=k),))),),
            )
    both = [{"name": "y", "parameters": {"classification": 2, "binary_data": True}}]
    yield Case("http binary classes", (infer("labelled", OK, outputs=both),))
    integers = [{"name": "sum", "parameters": {"classification": 2}}]
    yield Case("http classes of integers", (infer("pair", *PAIR_IN, outputs=integers),))
    yield Case(
        "http classes unbatched",
        (infer("echo_FP32", tensor("x", "FP32", (3,), data=[3, 1, 2]), outputs=classes_of("y", 2)),),
    )
    body = infer("add_one", OK).body
    for coding, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        yield Case(
            f"http sent {coding}", (Http("POST", "/v2/models/add_one/infer", pack(body), {"Content-Encoding": coding}),)
        )
        for accepted in (coding, f"{coding}, identity", f"identity, {coding};q=0.5"):
            yield Case(f"http accepts {accepted}", (infer("add_one", OK, headers={"Accept-Encoding": accepted}),))
    yield Case("http accepts br", (infer("add_one", OK, headers={"Accept-Encoding": "br"}),))
    yield Case("http accepts *", (infer("add_one", OK, headers={"Accept-Encoding": "identity"}),))


def classes_of(name: str, count: int) -> list[dict[str, Any]]:
    return [{"name": name, "parameters": {"classification": count}}]


def _http_mistakes() -> Iterator[Case]:
    def one(name: str, *steps: Http) -> Case:
        return Case(f"http mistake: {name}", steps)

    path = "/v2/models/add_one/infer"
    yield one("empty body", Http("POST", path))
    yield one("not JSON", Http("POST", path, b"{"))
    yield one("an array", Http("POST", path, b"[]"))
    yield one("no inputs", Http("POST", path, b"{}"))
    yield one("empty inputs", infer("add_one"))
    for name, given in {
        "wrong datatype": {**OK, "datatype": "INT32"},
        "no such datatype": {**OK, "datatype": "FLOAT"},
        "datatype a number": {**OK, "datatype": 5},
        "wrong rank": {**OK, "shape": [4]},
        "wrong shape": {**X, "shape": [1, 3], "data": [1, 2, 3]},
        "too few elements": {**X, "data": [1, 2]},
        "too many elements": {**X, "data": [1] * 9},
        "negative shape": {**OK, "shape": [-1, 4]},
        "fractional shape": {**OK, "shape": [1.5, 4]},
        "shape a text": {**OK, "shape": "1,4"},
        "no shape": {"name": "x", "datatype": "FP32", "data": [1, 2, 3, 4]},
        "text for numbers": {**X, "data": ["a"] * 4},
        "null data": {**X, "data": None},
        "batch too large": {**X, "shape": [9, 4], "data": [1] * 36},
        "batch of none": {**X, "shape": [0, 4], "data": []},
        "unknown input": {**OK, "name": "z"},
        "input without name": {"shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]},
        "huge shape": {**OK, "shape": [2**40, 2**40]},
        "shared memory not there": {**X, "parameters": {"shared_memory_region": "none", "shared_memory_byte_size": 16}},
    }.items():
        yield one(name, infer("add_one", given))
    yield one("input twice", infer("add_one", OK, OK))
    yield one("one input too many", infer("add_one", OK, {**OK, "name": "z"}))
    yield one("an input missing", infer("pair", PAIR_IN[0]))
    yield one("inputs disagree on rows", infer("pair", PAIR_IN[0], tensor("b", "INT32", (1, 4), data=[1] * 4)))
    yield one("unknown output", infer("add_one", OK, outputs=[{"name": "q"}]))
    yield one("output twice", infer("add_one", OK, outputs=[{"name": "y"}, {"name": "y"}]))
    yield one("output without name", infer("add_one", OK, outputs=[{}]))
    yield one("id a number", infer("add_one", OK, id=5))
    yield one("parameters an array", infer("add_one", OK, parameters=[]))
    for reserved in ("triton_enable_empty_final_response", "triton_x"):
        yield one(f"parameter {reserved}", infer("add_one", OK, parameters={reserved: True}))
    yield one("classes negative", infer("add_one", OK, outputs=classes_of("y", -1)))
    yield one("classes a text", infer("add_one", OK, outputs=[{"name": "y", "parameters": {"classification": "2"}}]))
    yield one("unknown model", infer("none", OK))
    yield one("wrong verb", Http("GET", path))
    whole = {"inputs": [{**X, **sized(RAW)}]}
    yield one("binary too short", binary("add_one", {"inputs": [{**X, **sized(RAW)}]}, RAW[:8]))
    yield one("binary too long", binary("add_one", whole, RAW + RAW))
    yield one("binary of another size", binary("add_one", {"inputs": [{**X, **sized(RAW[:12])}]}, RAW[:12]))
    yield one("data and binary", binary("add_one", {"inputs": [{**OK, **sized(RAW)}]}, RAW))
    negative = {**X, "parameters": {"binary_data_size": -16}}
    yield one("negative binary size", binary("add_one", {"inputs": [negative]}, RAW))
    for name, length in {
        "negative": "-1", "too large": "99999", "no number": "abc", "fractional": "1.5", "overflowing": "9" * 25,
        "with a sign": "+10", "hexadecimal": "0x10",
    }.items():  # fmt: skip
        yield one(f"header length {name}", binary("add_one", whole, RAW, length))
    yield one("raw too short", Http("POST", path, RAW[:8], {LENGTH: "0"}))
    yield one("raw for two inputs", Http("POST", "/v2/models/pair/infer", RAW, {LENGTH: "0"}))
    yield one("broken gzip", Http("POST", path, b"zzz", {"Content-Encoding": "gzip"}))
    yield one("unknown coding", Http("POST", path, b"zzz", {"Content-Encoding": "br"}))
    yield one(
        "broken BYTES",
        binary("echo_BYTES", {"inputs": [tensor("x", "BYTES", (2,), **sized(b"\5\0\0\0abc"))]}, b"\5\0\0\0abc"),
    )
    over = struct.pack("<I", 2**32 - 1) + b"abc"
    yield one(
        "BYTES of a huge element", binary("echo_BYTES", {"inputs": [tensor("x", "BYTES", (1,), **sized(over))]}, over)
    )
    yield one("good raw of a row", Http("POST", "/v2/models/echo_FP32/infer", RAW, {LENGTH: "0"}))
    yield one("good raw text", Http("POST", "/v2/models/echo_BYTES/infer", b"some text", {LENGTH: "0"}))
    yield one("decoupled", infer("count", tensor("x", "INT32", (1,), data=[1])))
    yield one("sequence without id", infer("sums", tensor("x", "INT32", (1, 1), data=[1])))


def _grpc_mistakes() -> Iterator[Case]:
    def one(name: str, payload: bytes, **more: Any) -> Case:
        return Case(f"grpc mistake: {name}", (call(payload, **more),))

    def given(*inputs: Any, raw: tuple[bytes, ...] = (RAW,), **more: Any) -> bytes:
        return message("add_one", *inputs, raw=raw, **more)

    yield one("no message", b"\xff\xff\xff")
    yield one("empty message", b"")
    yield one("no inputs", given(raw=()))
    yield one("no data", given(GRPC_X, raw=()))
    for name, item in {
        "wrong datatype": grpc_input("x", "INT32", (1, 4)),
        "no such datatype": grpc_input("x", "FLOAT", (1, 4)),
        "no datatype": grpc_input("x", "", (1, 4)),
        "wrong rank": grpc_input("x", "FP32", (4,)),
        "wrong shape": grpc_input("x", "FP32", (2, 2)),
        "negative shape": grpc_input("x", "FP32", (-1, 4)),
        "huge shape": grpc_input("x", "FP32", (2**40, 2**40)),
        "unknown input": grpc_input("z", "FP32", (1, 4)),
        "input without name": grpc_input("", "FP32", (1, 4)),
    }.items():
        yield one(name, given(item))
    yield one("batch too large", given(grpc_input("x", "FP32", (9, 4)), raw=(RAW * 9,)))
    yield one("batch of none", given(grpc_input("x", "FP32", (0, 4)), raw=(b"",)))
    yield one("raw too short", given(GRPC_X, raw=(RAW[:8],)))
    yield one("raw too long", given(GRPC_X, raw=(RAW * 2,)))
    yield one("raw twice", given(GRPC_X, raw=(RAW, RAW)))
    yield one("input twice", given(GRPC_X, GRPC_X, raw=(RAW, RAW)))
    yield one("both raw and typed", given(grpc_input("x", "FP32", (1, 4), fp32_contents=[1, 2, 3, 4])))
    yield one("typed of another type", given(grpc_input("x", "FP32", (1, 4), int_contents=[1, 2, 3, 4]), raw=()))
    yield one("typed too few", given(grpc_input("x", "FP32", (1, 4), fp32_contents=[1, 2]), raw=()))
    yield one("typed too many", given(grpc_input("x", "FP32", (1, 4), fp32_contents=[1] * 9), raw=()))
    yield one("typed FP16", message("echo_FP16", grpc_input("x", "FP16", (1,), fp32_contents=[1.0])))
    yield one("unknown output", given(GRPC_X, outputs=(wanted("q"),)))
    yield one("output twice", given(GRPC_X, outputs=(wanted("y"), wanted("y"))))
    yield one("unknown model", message("none", GRPC_X, raw=(RAW,)))
    yield one("no model", message("", GRPC_X, raw=(RAW,)))
    yield one("an input missing", message("pair", grpc_input("a", "INT32", (1, 4)), raw=(b"\0" * 16,)))
    yield one("broken BYTES", message("echo_BYTES", grpc_input("x", "BYTES", (1,)), raw=(b"\5\0\0\0abc",)))
    yield one("decoupled", message("count", grpc_input("x", "INT32", (1,), int_contents=[1])))
    yield one("sequence without id", message("sums", grpc_input("x", "INT32", (1, 1), int_contents=[1])))
    region = grpc_input("x", "FP32", (1, 4))
    region.parameters["shared_memory_region"].string_param = "none"
    region.parameters["shared_memory_byte_size"].int64_param = 16
    yield one("shared memory not there", given(region, raw=()))


def _drawn_mistakes() -> Iterator[Case]:
    """Good requests with one thing drawn at random made wrong."""
    rng = random.Random(SEED)
    for index in range(80):
        item = dict(OK)
        key = rng.choice(["name", "datatype", "shape", "data"])
        item[key] = rng.choice(
            [None, 0, -1, "", "x", [], {}, [[]], [1], [1, 2, 3], True, 1e300, "FP64", [[1, 2], [3, 4]]]
        )
        yield Case(f"http drawn {index} {key}={str(item[key])[:20]}", (infer("add_one", item),))


def _questions() -> Iterator[Case]:
    models = ["add_one", "labelled", "twice", "pair", "count", "sums", "text", "echo_BYTES", "rows_FP32", "none"]
    for model in models:
        for suffix in (
            "",
            "/ready",
            "/config",
            "/stats",
            "/versions/1",
            "/versions/1/ready",
            "/versions/9",
            "/versions/9/ready",
        ):
            yield Case(f"http GET {model}{suffix}", (Http("GET", f"/v2/models/{model}{suffix}"),))
        for method, request in (
            ("ModelReady", pb.ModelReadyRequest(name=model)), ("ModelMetadata", pb.ModelMetadataRequest(name=model)),
            ("ModelConfig", pb.ModelConfigRequest(name=model)),
            ("ModelStatistics", pb.ModelStatisticsRequest(name=model)),
            ("ModelReady", pb.ModelReadyRequest(name=model, version="9")),
            ("ModelMetadata", pb.ModelMetadataRequest(name=model, version="1")),
        ):  # fmt: skip
            yield Case(f"grpc {method} {model} {request.version}", (call(request.SerializeToString(), method=method),))
    for path in (
        "/v2",
        "/v2/",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/stats",
        "/v2/zzz",
        "/",
        "/v2/models",
        "/v3",
    ):
        yield Case(f"http GET {path}", (Http("GET", path),))
    for path in ("/v2", "/v2/health/live", "/v2/models/add_one", "/v2/models/add_one/config"):
        yield Case(f"http POST {path}", (Http("POST", path),))
    for method in ("ServerLive", "ServerReady"):
        yield Case(f"grpc {method}", (call(b"", method=method),))


def _settings() -> Iterator[Case]:
    yield Case("http trace", (Http("GET", "/v2/trace/setting"),))
    yield Case("http trace of a model", (Http("GET", "/v2/models/add_one/trace/setting"),))
    yield Case("http trace of none", (Http("GET", "/v2/models/none/trace/setting"),))
    yield Case("grpc trace", (call(b"", method="TraceSetting"),))
    for changes in (
        {"trace_rate": "5"}, {"trace_count": "7"}, {"log_frequency": "3"}, {"trace_level": ["OFF"]}, {"trace_count": "-5"},
        {"trace_rate": "x"}, {"trace_rate": 5}, {"trace_level": ["TIMESTAMPS"]}, {"trace_file": "/tmp/x"}, {"trace_level": "OFF"},
        {"trace_rate": None},
    ):  # fmt: skip
        yield Case(
            f"http set trace {json.dumps(changes)}", (Http("POST", "/v2/trace/setting", json.dumps(changes).encode()),)
        )
    yield Case(
        "http set and clear trace of a model",
        (
            Http("POST", "/v2/models/add_one/trace/setting", b'{"trace_rate": "9"}'),
            Http("GET", "/v2/trace/setting"),
            Http("POST", "/v2/models/add_one/trace/setting", b'{"trace_rate": null}'),
        ),
    )
    yield Case("http logging", (Http("GET", "/v2/logging"),))
    yield Case("grpc logging", (call(b"", method="LogSettings"),))
    for changes in (  # type: ignore[assignment]
        {"log_info": False}, {"log_info": True}, {"log_verbose_level": 1}, {"log_verbose_level": 0}, {"log_warning": True},
        {"log_format": "ISO8601"}, {"log_format": "default"}, {"log_format": "x"}, {"log_file": "/tmp/x"}, {"log_info": "x"},
        {"log_verbose_level": -1},
    ):  # fmt: skip
        yield Case(
            f"http set logging {json.dumps(changes)}", (Http("POST", "/v2/logging", json.dumps(changes).encode()),)
        )
    for kind in ("system", "cuda"):
        base = f"/v2/{kind}sharedmemory"
        yield Case(f"http {kind} memory", (Http("GET", f"{base}/status"), Http("GET", f"{base}/region/none/status")))
        yield Case(
            f"http {kind} memory unregister",
            (Http("POST", f"{base}/region/none/unregister"), Http("POST", f"{base}/unregister")),
        )
        name = "SystemSharedMemory" if kind == "system" else "CudaSharedMemory"
        yield Case(f"grpc {kind} memory", (call(b"", method=f"{name}Status"), call(b"", method=f"{name}Unregister")))
    for body in (
        {},
        {"key": "/none"},
        {"byte_size": 4},
        {"key": "/none", "byte_size": 4},
        {"key": "/none", "byte_size": "4"},
    ):
        path = "/v2/systemsharedmemory/region/a/register"
        yield Case(f"http register {json.dumps(body)}", (Http("POST", path, json.dumps(body).encode()),))


def _shared() -> Iterator[Case]:
    """Inputs and outputs in system shared memory."""
    register = Http(
        "POST",
        "/v2/systemsharedmemory/region/r/register",
        json.dumps({"key": SHARED_KEY, "offset": 0, "byte_size": SHARED_SIZE}).encode(),
    )
    unregister = Http("POST", "/v2/systemsharedmemory/region/r/unregister")
    status = Http("GET", "/v2/systemsharedmemory/region/r/status")

    def region(size: int, offset: int = 0) -> dict[str, Any]:
        given = {"shared_memory_region": "r", "shared_memory_byte_size": size}
        return {**given, "shared_memory_offset": offset} if offset else given

    def http(source: dict[str, Any], target: dict[str, Any] | None = None) -> Http:
        outputs = {"outputs": [{"name": "y", "parameters": target}]} if target else {}
        return infer("add_one", {**X, "parameters": source}, **outputs)

    def grpc(source: dict[str, Any], target: dict[str, Any] | None = None) -> Grpc:
        item = grpc_input("x", "FP32", (1, 4))
        for key, value in source.items():
            item.parameters[key].CopyFrom(parameter(value))
        return call(message("add_one", item, outputs=(wanted("y", **target),) if target else ()))

    read = Http("POST", "/v2/models/add_one/infer", infer("add_one", {**X, "parameters": region(16, 16)}).body)
    yield Case("http register and status", (register, register, status, unregister, unregister, status))
    for make, name in ((http, "http"), (grpc, "grpc")):
        for what, steps in {
            "input": (make(region(16)),),
            "input and output": (make(region(16), region(16, 16)), read),
            "output larger than needed": (make(region(16), region(48, 16)), read),
            "output too small": (make(region(16), region(8, 16)),),
            "input outside": (make(region(16, 56)),),
            "input of another size": (make(region(12)),),
            "output outside": (make(region(16), region(64, 16)),),
            "size overflowing": (make(region(16, 2**62)),),
        }.items():
            yield Case(f"{name} shared {what}", (register, *steps, unregister))
        yield Case(f"{name} shared after unregister", (register, unregister, make(region(16))))


def _generate() -> Iterator[Case]:
    for body in (
        {"text_input": "hi"}, {"text_input": "ü"}, {"text_input": "hi", "id": "a"}, {"text_input": ["hi"]}, {"text_input": ["a", "b"]},
        {"text_input": "hi", "k": 3}, {"text_input": "hi", "k": [1, 2, 3]}, {"text_input": "hi", "parameters": {"p": 1, "q": "s"}},
        {"text_input": "hi", "zzz": 1}, {"text_input": 5}, {}, {"text_input": "x", "k": "3"}, {"text_input": None}, [1], {"text_input": {}},
        {"text_input": "hi", "id": 5},
    ):  # fmt: skip
        for route in ("generate", "generate_stream"):
            yield Case(
                f"http {route} {json.dumps(body)}",
                (Http("POST", f"/v2/models/text/{route}", json.dumps(body).encode()),),
            )
    for n in (0, 1, 2, 5):
        for route in ("generate", "generate_stream"):
            yield Case(f"http {route} count {n}", (Http("POST", f"/v2/models/count/{route}", b'{"x": %d}' % n),))
    for route in ("generate", "generate_stream"):
        yield Case(f"http {route} of none", (Http("POST", f"/v2/models/none/{route}", b"{}"),))
        yield Case(f"http GET {route}", (Http("GET", f"/v2/models/text/{route}"),))
        yield Case(
            f"http {route} version 1", (Http("POST", f"/v2/models/text/versions/1/{route}", b'{"text_input": "v"}'),)
        )
        yield Case(f"http {route} not JSON", (Http("POST", f"/v2/models/text/{route}", b"{"),))


def _streams() -> Iterator[Case]:
    def count(n: int, **more: Any) -> bytes:
        return message("count", grpc_input("x", "INT32", (1,), int_contents=[n]), id=f"c{n}", **more)

    good = message("add_one", GRPC_X, raw=(RAW,), id="good")
    bad = message("add_one", grpc_input("x", "INT32", (1, 4)), raw=(RAW,), id="bad")
    unknown = message("none", GRPC_X, raw=(RAW,), id="unknown")
    wants = {"parameters": {"triton_enable_empty_final_response": True}}
    for name, messages in {
        "nothing": (), "one": (good,), "three": (good, good, good), "an error": (bad,), "unknown": (unknown,),
        "an error between": (good, bad, good), "not a message": (b"\xff\xff",),
        **{f"count {n}": (count(n),) for n in (0, 1, 3)}, **{f"count {n} to the end": (count(n, **wants),) for n in (0, 1, 3)},
        "good to the end": (message("add_one", GRPC_X, raw=(RAW,), id="e", **wants),),
    }.items():  # fmt: skip
        yield Case(f"grpc stream {name}", (call(*messages, method="ModelStreamInfer", is_stream=True),))
    strict = (("triton_grpc_error", "true"),)
    for name, payload in (("good", good), ("bad", bad), ("unknown", unknown)):
        yield Case(
            f"grpc strict stream {name}", (call(payload, method="ModelStreamInfer", is_stream=True, metadata=strict),)
        )


def _sequences() -> Iterator[Case]:
    def http(key: Any, value: int, start: bool = False, end: bool = False) -> Http:
        parameters = {"sequence_id": key, "sequence_start": start, "sequence_end": end}
        return infer("sums", tensor("x", "INT32", (1, 1), data=[value]), parameters=parameters)

    def grpc(key: Any, value: int, start: bool = False, end: bool = False) -> Grpc:
        parameters = {"sequence_id": key, "sequence_start": start, "sequence_end": end}
        return call(message("sums", grpc_input("x", "INT32", (1, 1), int_contents=[value]), parameters=parameters))

    def controlled(model: str, key: Any, start: bool = False, end: bool = False, rows: int = 1) -> Http:
        parameters = {"sequence_id": key, "sequence_start": start, "sequence_end": end}
        shape = (1,) if model == "alone" else (rows, 1)
        return infer(model, tensor("x", "INT32", shape, data=[0] * rows), parameters=parameters)

    for model in ("direct", "oldest", "alone"):
        for key in (21, "name"):
            steps = (controlled(model, key, True), controlled(model, key), controlled(model, key, end=True))
            yield Case(f"http controls of {model} {key}", steps)
        if model != "alone":  # whose one slot they would have to wait for
            yield Case(
                f"http controls of {model}, two sequences",
                (
                    controlled(model, 31, True), controlled(model, 32, True), controlled(model, 31), controlled(model, 32, end=True),
                    controlled(model, 31, end=True),
                ),
            )  # fmt: skip
        yield Case(f"http controls of {model}, several rows", (controlled(model, 41, True, rows=2),))
        yield Case(f"http controls of {model}, no id", (controlled(model, 0, True),))
    for make, name in ((http, "http"), (grpc, "grpc")):
        yield Case(f"{name} sequence", (make(11, 1, True), make(11, 2), make(11, 3, end=True)))
        yield Case(f"{name} sequence by name", (make("abc", 1, True), make("abc", 2, end=True)))
        yield Case(f"{name} sequence without start", (make(12, 1),))
        yield Case(f"{name} sequence restarted", (make(13, 1, True), make(13, 5, True), make(13, 2, end=True)))
        yield Case(f"{name} sequence after its end", (make(14, 1, True, True), make(14, 2)))
        yield Case(f"{name} sequence of one", (make(15, 9, True, True),))
        yield Case(f"{name} sequence id 0", (make(0, 1, True),))
        yield Case(f"{name} sequence id empty", (make("", 1, True),))


def _errors() -> Iterator[Case]:
    """What a python model's errors become."""
    for code in (-1, *range(8)):
        x = tensor("x", "INT32", (1,), data=[code])
        yield Case(f"http model error {code}", (infer("fails", x),))
        yield Case(
            f"grpc model error {code}", (call(message("fails", grpc_input("x", "INT32", (1,), int_contents=[code]))),)
        )


def _python() -> Iterator[Case]:
    """The python backend's API, as a model sees it and uses it."""
    one = tensor("x", "INT32", (1,), data=[3])
    seen = [{"name": "seen"}]
    yield Case("http python api", (infer("api", one, id="me", outputs=seen, parameters={"a": 1, "timeout": 5000000}),))
    yield Case(
        "http python api of a sequence",
        (infer("api", one, outputs=seen, parameters={"sequence_id": 7, "sequence_start": True}),),
    )
    grpc_one = grpc_input("x", "INT32", (1,), int_contents=[3])
    yield Case(
        "grpc python api", (call(message("api", grpc_one, outputs=(wanted("seen"),), parameters={"b": "c"}, id="me")),)
    )
    for what in range(13):
        if what == 8:  # which tritonserver 2.51 never answers
            continue
        yield Case(f"http python bls {what}", (infer("bls", tensor("x", "INT32", (1,), data=[what])),))
    for count in (0, 1, 5):
        yield Case(f"http python async bls {count}", (infer("async_bls", tensor("x", "INT32", (1,), data=[count])),))


def _control() -> Iterator[Case]:
    """Load and unload. Last, for what they change."""

    def load(name: str, **parameters: Any) -> Http:
        body = json.dumps({"parameters": parameters} if parameters else {}).encode()
        return Http("POST", f"/v2/repository/models/{name}/load", body)

    def unload(name: str) -> Http:
        return Http("POST", f"/v2/repository/models/{name}/unload", b"{}")

    ask = infer("labelled", OK)
    yield Case(
        "http index", (Http("POST", "/v2/repository/index"), Http("POST", "/v2/repository/index", b'{"ready": true}'))
    )
    yield Case("grpc index", (call(b"", method="RepositoryIndex"),))
    yield Case("http index with broken JSON", (Http("POST", "/v2/repository/index", b"{"),))
    yield Case("http load", (load("labelled"), ask))
    yield Case("http load of none", (load("none"), load("")))
    yield Case("http unload of none", (unload("none"),))
    # After an unload Triton may still say UNLOADING for a while: only what both say for sure.
    yield Case("http load again", (unload("labelled"), load("labelled"), ask))
    config = {
        "backend": "onnxruntime", "max_batch_size": 2,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [4]}],
    }  # fmt: skip
    yield Case(
        "http load with config",
        (
            load("labelled", config=json.dumps(config)),
            infer("labelled", {**X, "shape": [3, 4], "data": [1] * 12}),
            load("labelled"),
        ),
    )
    yield Case("http load with broken config", (load("labelled", config="{"), ask))
    yield Case("http load with config of another type", (load("labelled", config=5), ask))
    one = base64.b64encode(b"x").decode()
    for path in ("../1/model.onnx", "1/../../x", "/1/model.onnx", "1/model.onnx"):
        yield Case(f"http load with file {path} alone", (load("labelled", **{f"file:{path}": one}), ask))
    yield Case("http load with unknown parameter", (load("labelled", nope=1),))
    for method, request in (
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="none")),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="none")),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="add_one")),
    ):  # fmt: skip
        yield Case(f"grpc {method} {request.model_name}", (call(request.SerializeToString(), method=method),))
