"""Fuzzing of everything that reads a stranger's bytes: generators of inputs that are nearly right, and what must hold.

An input is read, or refused with the error meant for that: nothing else may come out, whatever goes in. What is read
is used as a server would use it.
"""

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from unittest import mock

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2

from tutti.core.dtypes import NUMPY
from tutti.core.errors import ConfigError, InferError
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.frontends.grpc import codec as grpc_codec
from tutti.frontends.grpc import methods as grpc_methods
from tutti.frontends.held_bytes import Holding
from tutti.frontends.http import codec as http_codec
from tutti.frontends.http import compression
from tutti.frontends.http import connection as http_connection
from tutti.frontends.http.connection import Connection
from tutti.frontends.http.exchange import Exchange
from tutti.frontends.http.server import new_memory
from tutti.frontends.size_limits import Limits
from tutti.frontends.v2 import generate
from tutti.repository import config
from tutti.serving.model import check_request

SLOWEST_S = 2.0
_TURN = 200

_CONFIG = """
name: "m" backend: "onnxruntime" max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, 2 ] }, { name: "t" data_type: TYPE_STRING dims: 1 optional: true } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] label_filename: "l" reshape { shape: [ -1 ] } } ]
dynamic_batching {
  preferred_batch_size: [ 2, 4 ] max_queue_delay_microseconds: 100 priority_levels: 2 default_priority_level: 1
  default_queue_policy { default_timeout_microseconds: 5 allow_timeout_override: true max_queue_size: 3 }
  priority_queue_policy { key: 1 value { timeout_action: DELAY } }
}
instance_group [ { count: 2 kind: KIND_CPU } ]
version_policy { specific { versions: [ 1, 2 ] } }
model_warmup { name: "w" batch_size: 1 inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 1, 2 ] zero_data: true } } }
parameters { key: "k" value { string_value: "v" } }
"""
_SEQUENCES = """
name: "m" backend: "python" max_batch_size: 4
input { name: "x" data_type: TYPE_INT32 dims: 1 } output { name: "y" data_type: TYPE_INT32 dims: 1 }
sequence_batching {
  oldest { max_candidate_sequences: 4 preferred_batch_size: 2 }
  control_input { name: "S" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }
  control_input { name: "C" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } }
  state { input_name: "i" output_name: "o" data_type: TYPE_FP32 dims: [ 1, -1 ] initial_state { dims: [ 1, 2 ] name: "z" } }
}
"""
_MODEL = config.parse(_CONFIG, "m")
_OUTPUTS = frozenset(spec.name for spec in _MODEL.outputs)
_ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63) - 1, 1e308, float("1e-300"), 0.5, "", "x", "y", "\x00",
    "é" * 50, "a" * 3000, [], [[]], {}, [1], ["a"], {"a": 1}, [[[[1]]]], "FP32", "BYTES", "BF16", [2**62, 4], [0], [-1, 2],
)  # fmt: skip


def _json_request(rng: random.Random) -> tuple[dict[str, Any], bytes]:
    datatype = rng.choice([*NUMPY, "FP32", "FP32"])
    rows = rng.randint(0, 4)
    count = rows * 2
    tensor: dict[str, Any] = {"name": "x", "datatype": datatype, "shape": [rows, 1, 2]}
    binary = b""
    if rng.random() < 0.5:
        size = count * (NUMPY[datatype].itemsize if datatype != "BYTES" else 5)
        binary = b"\x01\x00\x00\x00a" * count if datatype == "BYTES" else rng.randbytes(size)
        tensor["parameters"] = {"binary_data_size": len(binary)}
    else:
        tensor["data"] = [rng.choice([1, 2, 0.5]) for _ in range(count)]
    request: dict[str, Any] = {"inputs": [tensor], "id": rng.choice(["", "a"])}
    if rng.random() < 0.5:
        request["outputs"] = [{"name": "y", "parameters": {"classification": rng.randint(0, 3)}}]
    if rng.random() < 0.3:
        request["parameters"] = {"binary_data_output": True, "sequence_id": 4, "timeout": 5}
    return request, binary


def _spoil(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """A JSON value with something in it changed, taken away, added or repeated."""
    if depth > 6 or (depth and rng.random() < 0.15):
        return rng.choice(_ODD)
    if isinstance(value, dict) and value:
        made = dict(value)
        key = rng.choice(list(made))
        how = rng.random()
        if how < 0.15:
            del made[key]
        elif how < 0.25:
            made[rng.choice(["name", "data", "shape", "parameters", "shared_memory_region", "triton_x"])] = rng.choice(
                _ODD
            )
        else:
            made[key] = _spoil(rng, made[key], depth + 1)
        return made
    if isinstance(value, list) and value:
        made_list = list(value)
        index = rng.randrange(len(made_list))
        if rng.random() < 0.2:
            made_list *= rng.choice([0, 2, 30])
        else:
            made_list[index] = _spoil(rng, made_list[index], depth + 1)
        return made_list
    return rng.choice(_ODD)


def _bitten(rng: random.Random, data: bytes) -> bytes:
    """Bytes with a few of them flipped, cut out, doubled or put in."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made) + 1)
        how = rng.random()
        if how < 0.5 and made:
            made[min(at, len(made) - 1)] = rng.randrange(256)
        elif how < 0.65:
            del made[at : at + rng.randint(1, 8)]
        elif how < 0.8:
            made[at:at] = rng.randbytes(rng.randint(1, 8))
        elif how < 0.9:
            made[at:at] = made[:at][-16:]
        else:
            del made[at:]
    return bytes(made)


def _use(request: InferRequest) -> None:
    """What a server does with a request that was read."""
    with contextlib.suppress(InferError):
        check_request(_MODEL, _OUTPUTS, request)
    for tensor in request.inputs.values():
        with contextlib.suppress(InferError):
            array = tensor.array()
            assert array.shape == tensor.shape, "an array has another shape than its tensor"
            assert len(Tensor(tensor.name, tensor.datatype, tensor.shape, array).raw()) <= 2**24


def _same(first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    """What both come to, which must be the same: requests of equal content, or errors of equal text."""
    outcomes = []
    for one in (first, second):
        try:
            outcomes.append(one())
        except _REFUSALS as error:
            outcomes.append(error)
    shown = [str(o) if isinstance(o, Exception) else _shown(o[0] if isinstance(o, tuple) else o) for o in outcomes]
    assert shown[0] == shown[1], f"read again, it is another: {shown}"
    if isinstance(outcomes[0], Exception):
        raise outcomes[0]
    return outcomes[0]


def _shown(request: InferRequest) -> Any:
    tensors = [(t.name, t.datatype, t.shape, bytes(t.raw())) for t in request.inputs.values()]
    return (
        request.model_name,
        request.model_version,
        request.id,
        request.outputs,
        request.parameters,
        dict(request.classes),
        tensors,
    )


def http_request(rng: random.Random, cache: http_codec.HeaderCache) -> None:
    request, binary = _json_request(rng)
    if rng.random() < 0.8:
        request = _spoil(rng, request)
    header = json.dumps(request).encode()
    if rng.random() < 0.3:
        header = _bitten(rng, header)
    length = rng.choice([len(header), len(header), len(header), None, 0, len(header) + 1, 2**40])
    body = header + binary
    if length == 0:
        read = http_codec.decode_raw(_MODEL, "", body)
        _use(read)
        return
    read, reply = _same(
        lambda: http_codec.decode("m", "", body, length, cache), lambda: http_codec.decode("m", "", body, length)
    )
    _use(read)
    outputs = [Tensor("y", "FP32", (1, 2), b"\0" * 8), Tensor("t", "BYTES", (1,), b"\1\0\0\0a")]
    head, pieces = http_codec.encode(InferResponse("m", "1", outputs), read.id, reply)
    answer = b"".join(pieces)
    json.loads(answer if head is None else answer[:head])


def generate_request(rng: random.Random, _: Any) -> None:
    given: Any = {"x": [1.0, 2.0], "t": "text", "id": "a", "parameters": {"p": 1}}
    body = json.dumps(_spoil(rng, given)).encode()
    _use(generate.decode(_MODEL, "", _bitten(rng, body) if rng.random() < 0.3 else body))


def grpc_request(rng: random.Random, cache: grpc_codec.TemplateCache) -> None:
    datatype = rng.choice([*NUMPY, "FP32"])
    rows = rng.randint(0, 3)
    message = service_pb2.ModelInferRequest(
        model_name="m", id=rng.choice(["", "a"]), model_version=rng.choice(["", "1", "x"])
    )
    for name in rng.choice([("x",), ("x", "x"), ("x", "t"), ()]):
        shape = rng.choice([(rows, 1, 2), (rows,), (), (-1, 2), (2**62, 4), (0, 2**50)])
        tensor = message.inputs.add(name=name, datatype=datatype, shape=shape)
        if rng.random() < 0.3:
            tensor.contents.fp32_contents.extend([1.0] * rng.choice([0, 1, rows * 2]))
        if rng.random() < 0.2:
            tensor.contents.bytes_contents.append(b"a")
        if rng.random() < 0.2:
            tensor.parameters[rng.choice(["shared_memory_region", "x"])].string_param = "r"
        if rng.random() < 0.6:
            message.raw_input_contents.append(rng.randbytes(rng.choice([0, 8, rows * 8, 5])))
    if rng.random() < 0.4:
        output = message.outputs.add(name=rng.choice(["y", ""]))
        output.parameters["classification"].int64_param = rng.choice([1, -1, 2**40])
    if rng.random() < 0.3:
        message.parameters[rng.choice(["timeout", "triton_x"])].int64_param = rng.choice([1, -1, 2**62])
        message.parameters["empty"].SetInParent()
    payload = message.SerializeToString()
    if rng.random() < 0.6:
        payload = _bitten(rng, payload)
    # What was read before is read by its form: the same must come out, also of what differs in a byte.
    for made in (payload, payload, _bitten(rng, payload), payload):
        read = _same(partial(cache.decode, made), partial(grpc_codec.decode, made))
        # So are large ones, by another way.
        _same(partial(_decode_as_large, made), partial(grpc_codec.decode, made))
    _use(read)
    answer = InferResponse("m", "1", [Tensor("y", "FP32", (1, 2), b"\0" * 8)], {"a": 1, "b": True, "c": "s", "d": 0.5})
    back = service_pb2.ModelInferResponse.FromString(grpc_codec.encode(answer, read.id))
    assert back.id == read.id
    grpc_codec.id_of(payload)


def _decode_as_large(payload: bytes) -> InferRequest:
    usual, grpc_codec.LARGE_MESSAGE_BYTES = grpc_codec.LARGE_MESSAGE_BYTES, 0
    try:
        return grpc_codec.decode(payload)
    finally:
        grpc_codec.LARGE_MESSAGE_BYTES = usual


def grpc_question(rng: random.Random, methods: Any) -> None:
    """Bytes for every other gRPC method, which may not even be of its message."""
    method = rng.choice(methods)
    message = service_pb2.RepositoryModelLoadRequest(model_name=rng.choice(["m", "../m", "", "a" * 300]))
    message.parameters["config"].string_param = rng.choice(["{}", "{", "[]", "\x00"])
    message.parameters["file:1/x"].bytes_param = b"x"
    payload = message.SerializeToString() if rng.random() < 0.5 else rng.randbytes(rng.randint(0, 30))
    method.answer(_bitten(rng, payload) if rng.random() < 0.5 else payload)


def _spoiled_text(rng: random.Random, text: str) -> str:
    words = text.split(" ")
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(len(words))
        how = rng.random()
        if how < 0.3:
            words[at] = rng.choice(words)
        elif how < 0.5:
            del words[at]
        elif how < 0.7:
            words[at] = rng.choice(
                ["-1", "0", "99999999999999999999", "1e9", '""', '"\\xff"', "{", "}", "[", "nan", "TYPE_INVALID"]
            )
        elif how < 0.8:
            words[at:at] = words[at : at + rng.randint(1, 30)]
        else:
            words[at] = _bitten(rng, words[at].encode()).decode("latin-1")
    return " ".join(words)


def config_text(rng: random.Random, _: Any) -> None:
    made = config.parse(_spoiled_text(rng, rng.choice([_CONFIG, _SEQUENCES])), "m")
    config.as_json(made.proto)
    text_format.MessageToString(made.proto)
    for spec in made.inputs:
        spec.accepts((1, 2))


def config_json(rng: random.Random, known: dict[str, Any]) -> None:
    proto = text_format.Parse(rng.choice([_CONFIG, _SEQUENCES]), model_config_pb2.ModelConfig())
    text = json.dumps(_spoil(rng, config.as_json(proto)))
    config.parse_json(_bitten(rng, text.encode()) if rng.random() < 0.3 else text, "m")


def compressed(rng: random.Random, _: Any) -> None:
    coding = rng.choice(["gzip", "deflate"])
    data = compression.compress(rng.choice([b"", b"a" * 5000, rng.randbytes(50)]), coding)
    limit = rng.choice([0, 10, 4999, 5000, 10**6])
    assert len(compression.decompress(_bitten(rng, data) if rng.random() < 0.7 else data, coding, limit)) <= limit
    compression.choose(_bitten(rng, b"gzip;q=0.5, deflate, identity;q=0").decode("latin-1"))


class _Transport:
    """Takes what a connection writes."""

    def __init__(self) -> None:
        self.closed = False
        self.written = 0

    def write(self, data: bytes) -> None:
        self.written += len(data)

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> None:
        """It has no peer."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class _Forgetful(dict[bytes, Any]):
    """Keeps nothing."""

    def __setitem__(self, key: bytes, value: Any) -> None: ...


class _Front:
    """Answers every exchange at once, and notes what it was."""

    limits = Limits(max_input_size=1000)
    is_draining = False
    memory = staticmethod(new_memory)

    def __init__(self, heads: dict[bytes, Any]) -> None:
        self.connections: set[Connection] = set()
        self.stalled: set[Connection] = set()
        self.holding = Holding(self.limits.max_inflight_bytes)
        self.heads = heads
        self.seen: list[Any] = []

    def make_room(self, size: int) -> None:
        """Nobody is stalled."""

    def refused(self, exchange: Exchange, status: int, message: str) -> None:
        """There is no log."""

    def handle(self, exchange: Exchange) -> None:
        self.seen.append((exchange.method, exchange.url, list(exchange.headers), exchange.body, exchange.keep_alive))
        exchange.connection.respond(exchange, 200, "fine")


def http_bytes(rng: random.Random, known: dict[bytes, Any]) -> None:
    """The bytes of a connection: requests with headers and bodies, cut anywhere.

    Whether their heads were read before must make no difference.
    """
    body = rng.choice([b"", b"12345", b"a\r\n\r\nb", rng.randbytes(1500)])
    head = b"POST /v2/models/m/infer HTTP/1.1\r\nhost: h\r\n"
    if rng.random() < 0.5:
        head += b"transfer-encoding: chunked\r\n\r\n"
        data = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        length = rng.choice([len(body), len(body), len(body), 0, 2**64, -1])
        more = rng.choice(
            [b"", b"", b"expect: 100-continue\r\n", b"connection: close\r\n", b"connection: keep-alive\r\n"]
        )
        end = rng.choice([b"\r\n\r\n", b"\r\n\r\n", b"\n\n", b"\r\n\n"])
        data = head + more + b"content-length: %d" % length + end + body
    data = _bitten(rng, data * rng.randint(1, 3)) if rng.random() < 0.6 else data * 3
    cuts = [0]
    while cuts[-1] < len(data):
        cuts.append(cuts[-1] + rng.choice([1, 50, 400, 5000]))
    seen = []
    for heads in (known, _Forgetful()):
        front = _Front(heads)
        connection = Connection(front)
        transport = _Transport()
        connection.connection_made(transport)  # type: ignore[arg-type]
        for start, stop in itertools.pairwise(cuts):
            if not transport.closed:
                connection.data_received(data[start:stop])
        connection.connection_lost(None)
        seen.append(front.seen)
    assert seen[0] == seen[1], f"heads that were read before are read otherwise: {seen}"


Target = Callable[[random.Random, Any], None]
TARGETS: dict[str, Target] = {
    "HTTP infer requests": http_request,
    "generate requests": generate_request,
    "gRPC infer requests": grpc_request,
    "other gRPC requests": grpc_question,
    "config.pbtxt": config_text,
    "configurations in JSON": config_json,
    "compressed bodies": compressed,
    "HTTP/1.1 connections": http_bytes,
}
_REFUSALS = (InferError, ConfigError)


def run(name: str, seed: int, indexes: Iterable[int], context: Any) -> tuple[int, float]:
    """Try these inputs of a target; returns how many were read rather than refused, and the slowest in seconds.

    Raises what a target must not raise, with the input's seed; AssertionError for one that took too long.
    """
    target = TARGETS[name]
    read = 0
    slowest = 0.0
    for index in indexes:
        started = time.perf_counter()
        try:
            target(random.Random(f"{seed}/{name}/{index}"), context)
            read += 1
        except _REFUSALS:
            pass
        except Exception as error:
            raise AssertionError(
                f"{name}: seed '{seed}/{name}/{index}' raised {type(error).__name__}: {error}"
            ) from error
        slowest = max(slowest, time.perf_counter() - started)
        assert slowest < SLOWEST_S, f"{name}: seed '{seed}/{name}/{index}' took {slowest:.1f} s"
    return read, slowest


def contexts(api: Any) -> dict[str, Any]:
    """What the targets need besides a random generator; `api` is a server's Api whose models may be loaded."""
    return {
        "HTTP infer requests": http_codec.HeaderCache(),
        "gRPC infer requests": grpc_codec.TemplateCache(),
        "HTTP/1.1 connections": {},
        "other gRPC requests": list(grpc_methods.methods(api).values()),
    }


def run_all(api: Any, seed: int, count: int, report: Callable[[str, int, float], None] = lambda *_: None) -> None:
    """Every target in turn; on an event loop, which connections need."""

    async def work() -> None:
        known = contexts(api)
        for name in TARGETS:
            read, slowest = 0, 0.0
            for start in range(0, count, _TURN):
                some = run(name, seed, range(start, min(start + _TURN, count)), known.get(name))
                read, slowest = read + some[0], max(slowest, some[1])
                await asyncio.sleep(0)  # connections that linger are closed by the loop
            report(name, read, slowest)

    with mock.patch.object(http_connection, "LINGER_S", 0.0):
        asyncio.run(work())
