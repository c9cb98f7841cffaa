"""What the log of requests is told of answers over gRPC. Called only where somebody wants to know."""

import re
import time

from tutti.frontends.http_events import about
from tutti.request_log import Event, RequestLog, harmless
from tutti.types import Call, now_ns

_NAMES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
# As gRPC's own text has them, and grpcio's, which escapes IPv6.
_PEER = re.compile(r"ipv[46]:(?:%5B|\[)?(.*?)(?:%5D|\])?:(\d+)")


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
def note_method(
    log: RequestLog,
    path: str,
    failure: tuple[int, str] | None,
    sizes: tuple[int, int],
    peer: str,
    total_ns: int,
    *target: str,
) -> None:
    """A call of which only the outside is known; `target` is (model, version, id) where it is an inference."""
    if log.wants(total_ns):
        code, details = failure or (0, "")
        model, version, request_id = target or ("", "", "")
        log.note(
            Event(
                time.time(), request_id, "grpc", name_of(path), model, version, _NAMES[code], *sizes, total_ns, None,
                "", client_of(peer), details,
            )
        )  # fmt: skip


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
