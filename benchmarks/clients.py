"""Load clients that cost little: wrk for HTTP, h2load for gRPC, one thread each."""

import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from benchmarks.models import MLP, BenchModel

_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement: requests a second, and the median and 99th percentile of latency in ms."""

    rate: float
    p50_ms: float
    p99_ms: float


def require_tools() -> None:
    """Raises SystemExit naming the packages to install."""
    missing = {"wrk": "wrk", "h2load": "nghttp2-client"}
    packages = [package for tool, package in missing.items() if shutil.which(tool) is None]
    if packages:
        raise SystemExit(f"the benchmarks need Debian's {' and '.join(packages)}: apt-get install {' '.join(packages)}")


def http_script(path: Path, body: bytes, header_length: int | None) -> Path:
    """A wrk script that posts `body`."""
    payload = path.with_suffix(".body")
    payload.write_bytes(body)
    length = "" if header_length is None else f'wrk.headers["Inference-Header-Content-Length"] = "{header_length}"\n'
    path.write_text(
        'wrk.method = "POST"\nlocal file = io.open("' + str(payload) + '", "rb")\n'
        'wrk.body = file:read("*a")\nfile:close()\n'
        f'wrk.headers["Content-Type"] = "application/octet-stream"\n{length}'
    )
    return path


def infer_body(model: BenchModel = MLP, parameters: str = "") -> tuple[bytes, int]:
    """The model's request over HTTP: binary in, binary out; and its header's length. `parameters` are JSON members."""
    header = (
        f'{{"inputs":[{{"name":"x","shape":{[1, *model.shape]},"datatype":"FP32",'
        f'"parameters":{{"binary_data_size":{model.item_bytes}}}}}],'
        f'"outputs":[{{"name":"y","parameters":{{"binary_data":true}}}}]'
        + (f',"parameters":{{{parameters}}}' if parameters else "")
        + "}"
    ).encode()
    return header + _item(model), len(header)


def grpc_message(path: Path, model: BenchModel = MLP) -> Path:
    """The model's request as a length-prefixed gRPC message."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, *model.shape])
    request = pb.ModelInferRequest(model_name=model.name, inputs=[tensor], raw_input_contents=[_item(model)])
    message = request.SerializeToString()
    path.write_bytes(b"\0" + struct.pack(">I", len(message)) + message)
    return path


def _item(model: BenchModel) -> bytes:
    return np.full(model.shape, 0.5, np.float32).tobytes()


def wrk(url: str, script: Path, clients: int, seconds: int) -> Figures:
    """Raises RuntimeError when the server answered anything but 200."""
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--latency", "-s", str(script), url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(text)
    return Figures(float(_find(r"Requests/sec:\s+([\d.]+)", text)), _wrk_ms("50%", text), _wrk_ms("99%", text))


def h2load_command(address: str, message: Path, clients: int, seconds: int) -> list[str]:
    """`clients` concurrent streams over four connections, one for fewer."""
    connections = min(4, clients)
    return [
        "h2load", "-t1", f"-c{connections}", f"-m{clients // connections}", "-D", str(seconds), "-d", str(message),
        "-H", "content-type: application/grpc", "-H", "te: trailers",
        f"http://{address}/inference.GRPCInferenceService/ModelInfer",
    ]  # fmt: skip


def h2load(address: str, message: Path, clients: int, seconds: int) -> Figures:
    """Raises RuntimeError when a request failed."""
    command = h2load_command(address, message, clients, seconds)
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if int(_find(r"(\d+) failed", text)):
        raise RuntimeError(text)
    rate = float(_find(r"finished in [^,]+, ([\d.]+) req/s", text))
    # h2load prints min, max, mean and deviation; the mean stands in for the median.
    mean = re.search(r"time for request:\s+\S+\s+(\S+)\s+(\S+)", text)
    assert mean is not None, text
    return Figures(rate, _ms(mean[2]), _ms(mean[1]))


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"no {pattern!r} in:\n{text}")
    return match[1]


def _wrk_ms(percentile: str, text: str) -> float:
    return _ms(_find(rf"^\s+{percentile}\s+(\S+)", text))


def _ms(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)(us|ms|s)", text)
    assert match is not None, text
    return float(match[1]) * _UNITS[match[2]]
