"""What the log of requests is told of answers over gRPC. Called only where somebody wants to know."""

import re
import time
from typing import NamedTuple

from tutti.core.types import Call, now_ns
from tutti.frontends.grpc import codec as grpc_codec
from tutti.frontends.grpc.methods import MODEL_INFER
from tutti.frontends.http.log_events import about
from tutti.observing.request_log import Event, RequestLog, harmless

_NAMES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
# As gRPC's own text has them, and grpcio's, which escapes IPv6.
# A call whose client has left before its answer, as gRPC has it.
GONE = 1, "the client had gone before its answer"
_LATE = 4
# The native server measures a deadline from when a call comes, we from when it is taken.
_CLOCKS_NS = 10_000_000
_PEER = re.compile(r"ipv[46]:(?:%5B|\[)?(.*?)(?:%5D|\])?:(\d+)")


def left(failure: tuple[int, str], deadline_ns: int) -> tuple[int, str]:
    """What a client has seen that left before `failure` could be told: the end of its deadline, or its leaving."""
    seen = (_LATE, GONE[1]) if deadline_ns and now_ns() >= deadline_ns - _CLOCKS_NS else GONE
    return failure if failure[0] == seen[0] else seen


@harmless
def note_call(
    log: RequestLog,
    call: Call,
    failure: tuple[int, str] | None,
    sizes: tuple[int, int],
    peer: str,
    request: str = "infer",
) -> None:
    """An inference that has ended; `sizes` are the bytes of its request and its answer."""
    total_ns = now_ns() - call.arrived_ns if call.arrived_ns else 0
    if not log.wants(total_ns):
        return
    model, version, pool, error = about(call.request.model_name, call.request.model_version, call.answer)
    code, details = failure or (0, "")
    log.note(
        Event(
            time.time(), call.request.id, "grpc", request, model, version, _NAMES[code], *sizes, total_ns,
            call.times.spent(call.arrived_ns) if call.times is not None else None, pool, client_of(peer),
            details or error,
        )
    )  # fmt: skip


@harmless
def note_streamed(log: RequestLog, call: Call, failure: tuple[int, str] | None, size: int, peer: str) -> None:
    """A request of a stream that has ended; its last answer has `size` bytes."""
    sizes = sum(len(tensor.raw()) for tensor in call.request.inputs.values()), size
    note_call(log, call, failure, sizes, peer, "stream")


@harmless
def note_refusal(log: RequestLog, path: str, failure: tuple[int, str], payload: bytes, peer: str) -> None:
    """A call that was refused before anybody worked on it. It took no time."""
    if log.wants(0):
        _note_method(log, path, failure, (len(payload), 0), peer, 0, _target(path, payload))


class Outside(NamedTuple):
    """What is kept of a call that another process answers: never its message, which may be large."""

    path: str
    peer: str
    began_ns: int
    bytes_in: int
    target: tuple[str, str, str]
    # 0 for none.
    deadline_ns: int


def outside(path: str, payload: bytes, peer: str, left_ns: int = 0) -> Outside:
    """What to keep of a call that comes now."""
    now = now_ns()
    return Outside(path, peer, now, len(payload), _target(path, payload), now + left_ns if left_ns else 0)


@harmless
def note_outside(log: RequestLog, call: Outside, failure: tuple[int, str] | None, bytes_out: int) -> None:
    """The other process has answered."""
    took_ns = now_ns() - call.began_ns
    if log.wants(took_ns):
        _note_method(log, call.path, failure, (call.bytes_in, bytes_out), call.peer, took_ns, call.target)


@harmless
def note_method(
    log: RequestLog, path: str, failure: tuple[int, str] | None, sizes: tuple[int, int], peer: str, total_ns: int
) -> None:
    """A call that is no inference; `sizes` are the bytes of its request and its answer."""
    if log.wants(total_ns):
        _note_method(log, path, failure, sizes, peer, total_ns, ("", "", ""))


def _note_method(
    log: RequestLog,
    path: str,
    failure: tuple[int, str] | None,
    sizes: tuple[int, int],
    peer: str,
    total_ns: int,
    target: tuple[str, str, str],
) -> None:
    code, details = failure or (0, "")
    model, version, request_id = target
    log.note(
        Event(
            time.time(), request_id, "grpc", name_of(path), model, version, _NAMES[code], *sizes, total_ns, None, "",
            client_of(peer), details,
        )
    )  # fmt: skip


def _target(path: str, payload: bytes) -> tuple[str, str, str]:
    """(model, version, id) of an inference."""
    return grpc_codec.named(payload) if path == MODEL_INFER else ("", "", "")


def name_of(path: str) -> str:
    """What the log calls a method."""
    return {"ModelInfer": "infer", "ModelStreamInfer": "stream"}.get(name := path.rpartition("/")[2], name)


def client_of(peer: str) -> str:
    """HOST:PORT of gRPC's name for a peer, or what else it is."""
    match = _PEER.fullmatch(peer)
    if match is None:
        return "" if peer.startswith("unix:") else peer
    host, port = match.groups()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
