"""Attacks on a server's memory, while good clients ask: its peak RSS, and the good clients' p99, after each.

`python -m benchmarks.memory_attacks [--scale 0.1]`; exit status 1 where the server took more than is allowed, ended,
or did not answer a good client. Clients are plain sockets in this process, good ones in a thread of their own.
"""

import argparse
import contextlib
import gzip
import http.client
import json
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tutti.loadtest.process import free_ports, stop, wait_until_ready

MIB = 1024 * 1024
LARGE_FLOATS = 2 * MIB  # 8 MB
GRPC_MESSAGE_BYTES = 2**32 - 1
GOOD_CLIENTS = 4
_MODEL = """
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def execute(self, requests):
            answers = []
            for request in requests:
                x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
                y = {y}
                answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", y)]))
            return answers
"""
_CONFIG = """
    name: "{name}"
    backend: "python"
    max_batch_size: 0
    input {{ name: "x" data_type: TYPE_FP32 dims: [-1] }}
    output {{ name: "y" data_type: TYPE_FP32 dims: [-1] }}
    instance_group {{ kind: KIND_CPU }}
"""
# What the models make of x: a sum of it, or eight megabytes.
MODELS = {"total": "x.sum(keepdims=True)", "large": f"np.full({LARGE_FLOATS}, x[0], np.float32)"}


def write_models(root: Path) -> None:
    for name, expression in MODELS.items():
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(textwrap.dedent(_CONFIG.format(name=name)))
        (root / name / "1" / "model.py").write_text(textwrap.dedent(_MODEL.format(y=expression)))


@dataclass
class Server:
    """A server process, and what it has been seen to take."""

    process: "subprocess.Popen[bytes]"
    http: int
    grpc: int
    peak_bytes: int = 0
    _has_ended: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Until the end: the resident memory of the process and its children, every 10 ms."""
        while not self._has_ended.wait(0.01):
            self.peak_bytes = max(self.peak_bytes, rss_bytes(self.process.pid))

    def end(self) -> None:
        self._has_ended.set()

    def connect(self, port: int = 0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port or self.http), timeout=30)


def rss_bytes(pid: int) -> int:
    """Of a process and its descendants, without what they share with files."""
    total = 0
    with contextlib.suppress(OSError, IndexError, ValueError):
        pages = Path(f"/proc/{pid}/statm").read_text().split()
        total = int(pages[1]) * resource.getpagesize()
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += rss_bytes(int(child))
    return total


@contextlib.contextmanager
def serving(folder: Path, flags: Sequence[str]) -> Iterator[Server]:
    root = folder / "models"
    write_models(root)
    http_port, grpc_port, metrics_port = free_ports(3)
    ports = ["--http-port", str(http_port), "--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port)]
    traces = ["--trace-config", f"triton,file={folder / 'trace'}"]
    command = [sys.executable, "-m", "tutti.app.cli", "serve", str(root), *ports, *traces, *flags]
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{http_port}/v2/health/ready", log)
        server = Server(process, http_port, grpc_port)
        watcher = threading.Thread(target=server.watch)
        watcher.start()
        try:
            yield server
        finally:
            server.end()
            watcher.join()
    finally:
        if not stop(process):
            process.send_signal(signal.SIGKILL)


def infer(model: str, x: bytes) -> bytes:
    """A request in binary that wants its answer so."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [len(x) // 4], "parameters": {"binary_data_size": len(x)}}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nhost: t\r\ninference-header-content-length: {len(header)}\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % (len(header) + len(x)) + header + x


def read_answer(connection: socket.socket) -> int:
    """The status of the next answer, which is read to its end."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


class GoodClients:
    """Ask for small things all the time, one request at a time each."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._has_ended = threading.Event()
        self.latencies_s: list[float] = []
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(GOOD_CLIENTS)]

    def __enter__(self) -> "GoodClients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        request = infer("total", np.ones(4, np.float32).tobytes())
        try:
            with self._server.connect() as connection:
                while not self._has_ended.wait(0.005):
                    begin = time.monotonic()
                    connection.sendall(request)
                    status = read_answer(connection)
                    self.latencies_s.append(time.monotonic() - begin)
                    if status != 200:
                        self.failures.append(f"status {status}")
        except (OSError, http.client.HTTPException) as error:
            self.failures.append(repr(error))

    @property
    def p99_ms(self) -> float:
        return 1e3 * float(np.percentile(self.latencies_s, 99)) if self.latencies_s else float("inf")


def unread_answers(server: Server, scale: float) -> str:
    """Clients that ask for 8 MB and never read."""
    request = infer("large", np.ones(1, np.float32).tobytes())
    with contextlib.ExitStack() as open_ones:
        for _ in range(max(1, round(200 * scale))):
            open_ones.enter_context(server.connect()).sendall(request)
        time.sleep(5)
    return "held for 5 s"


def unread_grpc_answers(server: Server, scale: float) -> str:
    """The same over gRPC."""
    from tritonclient.grpc import service_pb2 as pb

    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1])
    raw = [np.ones(1, np.float32).tobytes()]
    message = pb.ModelInferRequest(model_name="large", inputs=[tensor], raw_input_contents=raw).SerializeToString()
    data = _frame(0, 1, 1, b"\0" + len(message).to_bytes(4, "big") + message)
    with contextlib.ExitStack() as open_ones:
        for _ in range(max(1, round(200 * scale))):
            open_ones.enter_context(server.connect(server.grpc)).sendall(_begun_infer() + data)
        time.sleep(5)
    return "held for 5 s"


def idle_connections(server: Server, scale: float) -> str:
    """Connections that have sent 8 MB each, and stay."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(round(10_000 * scale), hard // 2)
    body = infer("total", np.ones(LARGE_FLOATS, np.float32).tobytes())
    answered = 0
    with contextlib.ExitStack() as open_ones:
        for _ in range(count):
            try:
                connection = open_ones.enter_context(server.connect())
                connection.sendall(body)
                answered += read_answer(connection) == 200
            except (OSError, http.client.HTTPException):
                break
    return f"{answered} of {count} were answered"


def _post(server: Server, body: bytes, coding: str = "", path: str = "/v2/models/total/infer") -> int:
    with server.connect() as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: t\r\ncontent-length: {len(body)}\r\n"
        head += f"content-encoding: {coding}\r\n" if coding else ""
        connection.sendall(head.encode() + b"\r\n" + body)
        return read_answer(connection)


def _together(count: int, ask: Callable[[], int]) -> str:
    """Several at once; returns how often which status came."""
    statuses: list[int | str] = []

    def run() -> None:
        try:
            statuses.append(ask())
        except (OSError, http.client.HTTPException) as error:
            statuses.append(type(error).__name__)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ", ".join(f"{statuses.count(status)} times {status}" for status in dict.fromkeys(statuses))


def bombs(size: int) -> dict[str, bytes]:
    """JSON of so many bytes that takes far more than its text."""
    arrays = b'{"inputs":[' + b"[]," * (size // 3) + b"[]]}"
    objects = b'{"inputs":[' + b"{}," * (size // 3) + b"{}]}"
    floats = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[' + b"1.5," * (size // 4) + b"1.5]}]}"
    return {"arrays": arrays, "objects": objects, "floats": floats}


def gzip_bombs(server: Server, scale: float) -> str:
    """Some kilobytes that are 63 MB of JSON, several at once."""
    seen = []
    for name, text in bombs(63 * MIB).items():
        packed = gzip.compress(text, 9)
        count = max(1, round(16 * scale))
        for path in ("/v2/models/total/infer", "/v2/models/total/generate"):
            seen.append(f"{name}: {_together(count, lambda p=packed, at=path: _post(server, p, 'gzip', at))}")  # type: ignore[misc]
    return "; ".join(seen)


def json_bombs(server: Server, scale: float) -> str:
    """The same in plain."""
    count = max(1, round(8 * scale))
    seen = [
        f"{name}: {_together(count, lambda t=text: _post(server, t))}"  # type: ignore[misc]
        for name, text in bombs(63 * MIB).items()
    ]
    return "; ".join(seen)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _begun_infer() -> bytes:
    """A connection's first frames: its settings, and the head of an infer call."""
    from hpack import Encoder

    headers = [(":method", "POST"), (":scheme", "http"), (":path", "/inference.GRPCInferenceService/ModelInfer")]
    headers += [(":authority", "t"), ("content-type", "application/grpc"), ("te", "trailers")]
    settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"")
    return settings + _frame(1, 4, 1, Encoder().encode(headers))


def grpc_message(server: Server, scale: float) -> str:
    """One message of 4 GiB, by frames of HTTP/2, as fast as the server lets it come."""
    wanted = round(GRPC_MESSAGE_BYTES * min(1.0, scale))
    with server.connect(server.grpc) as connection:
        connection.sendall(_begun_infer())
        prefix = b"\0" + GRPC_MESSAGE_BYTES.to_bytes(4, "big")
        sent = _send_message(connection, prefix, wanted)
    return f"{sent // MIB} of {wanted // MIB} MiB were taken"


def _send_message(connection: socket.socket, prefix: bytes, wanted: int) -> int:
    """DATA frames within both windows; returns what was sent when the server ended the call, or all."""
    received = b""
    windows = {0: 65535, 1: 65535}
    connection.sendall(_frame(0, 0, 1, prefix))
    sent = len(prefix)
    windows = {stream: left - sent for stream, left in windows.items()}
    piece = bytes(16384)
    connection.settimeout(10)
    try:
        while sent < wanted:
            if min(windows.values()) >= len(piece):
                connection.sendall(_frame(0, 0, 1, piece))
                sent += len(piece)
                windows = {stream: left - len(piece) for stream, left in windows.items()}
                continue
            data = connection.recv(65536)
            if not data:
                break
            received += data
            while len(received) >= 9 and len(received) >= 9 + int.from_bytes(received[:3], "big"):
                size, kind, flags = int.from_bytes(received[:3], "big"), received[3], received[4]
                stream, payload = int.from_bytes(received[5:9], "big"), received[9 : 9 + size]
                received = received[9 + size :]
                if kind == 8 and stream in windows:
                    windows[stream] += int.from_bytes(payload, "big")
                elif kind == 4 and not flags & 1:
                    connection.sendall(_frame(4, 1, 0, b""))
                    for at in range(0, size, 6):
                        if int.from_bytes(payload[at : at + 2], "big") == 4:
                            windows[1] += int.from_bytes(payload[at + 2 : at + 6], "big") - 65535
                elif kind in (1, 3, 7):
                    return sent
    except OSError:  # the server has ended it
        return sent
    return sent


def tensor_traces(server: Server, scale: float) -> str:
    """A client has every tensor of every request traced, and sends large ones."""
    on = {"trace_level": ["TENSORS"], "trace_rate": "1", "trace_count": "-1", "log_frequency": "0"}
    off = {"trace_level": ["OFF"]}
    status = _post(server, json.dumps(on).encode(), path="/v2/trace/setting")
    request = infer("total", np.random.default_rng(0).random(LARGE_FLOATS, np.float32).tobytes())
    with server.connect() as connection:
        for _ in range(max(1, round(200 * scale))):
            connection.sendall(request)
            read_answer(connection)
    _post(server, json.dumps(off).encode(), path="/v2/trace/setting")
    return f"setting: {status}"


ATTACKS: dict[str, Callable[[Server, float], str]] = {
    "unread answers": unread_answers,
    "unread gRPC answers": unread_grpc_answers,
    "idle connections": idle_connections,
    "gzip bombs": gzip_bombs,
    "JSON bombs": json_bombs,
    "tensor traces": tensor_traces,
    "gRPC message": grpc_message,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of clients and bytes")
    parser.add_argument("--allowed-mib", type=int, default=1024)
    parser.add_argument("--only", action="append", choices=ATTACKS, help="this attack")
    options, flags = parser.parse_known_args()
    is_fine = True
    for name in options.only or ATTACKS:
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder), flags) as server:
            before = rss_bytes(server.process.pid)
            with GoodClients(server) as good:
                said = ATTACKS[name](server, options.scale)
                time.sleep(0.5)
            after = rss_bytes(server.process.pid)
            has_ended = server.process.poll() is not None
        is_within = server.peak_bytes <= options.allowed_mib * MIB and not has_ended and not good.failures
        is_fine = is_fine and is_within
        print(
            f"{'fine' if is_within else 'NOT '} {name}: RSS {before // MIB} MiB before, {server.peak_bytes // MIB} at "
            f"its peak, {after // MIB} after; good clients: {len(good.latencies_s)} answers, p99 {good.p99_ms:.1f} ms, "
            f"failures {good.failures[:3]}; {said}",
            flush=True,
        )
    return 0 if is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
