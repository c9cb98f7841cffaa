"""Load clients that cost little: wrk for HTTP, h2load for gRPC, one thread each."""

import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from benchmarks.models import CLIP_RATE, MLP, BenchModel

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


def http_script(
    path: Path, body: bytes, header_length: int | None, content_type: str = "application/octet-stream"
) -> Path:
    """A wrk script that posts `body`."""
    payload = path.with_suffix(".body")
    payload.write_bytes(body)
    length = "" if header_length is None else f'wrk.headers["Inference-Header-Content-Length"] = "{header_length}"\n'
    path.write_text(
        'wrk.method = "POST"\nlocal file = io.open("' + str(payload) + '", "rb")\n'
        'wrk.body = file:read("*a")\nfile:close()\n'
        f'wrk.headers["Content-Type"] = "{content_type}"\n{length}'
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


def mixed_script(path: Path, good: bytes, bad: bytes, header_length: int, bad_in_100: int) -> Path:
    """A wrk script that posts `good`, and so many times in a hundred `bad`."""
    for name, body in (("good", good), ("bad", bad)):
        path.with_suffix(f".{name}").write_bytes(body)
    path.write_text(
        f'wrk.method = "POST"\nwrk.headers["Inference-Header-Content-Length"] = "{header_length}"\n'
        "local function read(name)\n  local file = io.open(name, 'rb')\n  local all = file:read('*a')\n"
        "  file:close()\n  return all\nend\nlocal requests, n = {}, 0\n"
        "function init(args)\n"
        f"  local good = wrk.format(nil, nil, nil, read('{path.with_suffix('.good')}'))\n"
        f"  local bad = wrk.format(nil, nil, nil, read('{path.with_suffix('.bad')}'))\n"
        f"  for i = 0, 99 do requests[i] = i < {bad_in_100} and bad or good end\nend\n"
        "function request()\n  n = (n + 1) % 100\n  return requests[n]\nend\n"
    )
    return path


def clips_script(path: Path, rate: int = CLIP_RATE, count: int = 200) -> Path:
    """A wrk script that posts clips of 1 to 30 s, drawn with a seed."""
    rng = np.random.default_rng(0)
    paths = []
    for number, size in enumerate(rng.integers(rate, 30 * rate + 1, count)):
        item = rng.normal(size=size).astype(np.float32).tobytes()
        tensor = f'{{"name":"x","shape":[1,{size}],"datatype":"FP32","parameters":{{"binary_data_size":{len(item)}}}}}'
        header = f'{{"inputs":[{tensor}],"outputs":[{{"name":"y","parameters":{{"binary_data":true}}}}]}}'.encode()
        paths.append((path.with_suffix(f".{number}"), len(header)))
        paths[-1][0].write_bytes(header + item)
    files = ",".join(f"{{'{name}', '{length}'}}" for name, length in paths)
    path.write_text(
        f"local files, requests, n = {{{files}}}, {{}}, 0\n"
        "function init(args)\n  for i, one in ipairs(files) do\n    local file = io.open(one[1], 'rb')\n"
        "    requests[i] = wrk.format('POST', nil, {['Inference-Header-Content-Length'] = one[2]}, file:read('*a'))\n"
        "    file:close()\n  end\nend\n"
        f"function request()\n  n = n % {count} + 1\n  return requests[n]\nend\n"
    )
    return path


def wrk(url: str, script: Path, clients: int, seconds: int) -> Figures:
    """Raises RuntimeError when the server answered anything but 200."""
    text = _wrk(url, script, clients, seconds)
    if "Non-2xx" in text:
        raise RuntimeError(text)
    return Figures(float(_find(r"Requests/sec:\s+([\d.]+)", text)), _wrk_ms("50%", text), _wrk_ms("99%", text))


def wrk_good(url: str, script: Path, clients: int, seconds: int) -> Figures:
    """The rate of those that were answered with 200, and everyone's latency."""
    text = _wrk(url, script, clients, seconds)
    found = re.search(r"(\d+) requests in ([\d.]+)s", text)
    assert found is not None, text
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    good = int(found[1]) - (int(bad[1]) if bad else 0)
    return Figures(good / float(found[2]), _wrk_ms("50%", text), _wrk_ms("99%", text))


def _wrk(url: str, script: Path, clients: int, seconds: int) -> str:
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--latency", "-s", str(script), url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Socket errors" in text:
        raise RuntimeError(text)
    return text


def perf_analyzer(program: str, protocol: str, address: str, clients: int) -> Figures:
    """NVIDIA's client on the tiny model."""
    command = [
        program, "-m", "mlp", "-u", address, "-i", protocol, "--concurrency-range", str(clients), "-s", "99",
        "-r", "3", "-p", "1000", "--shape", "x:384", "--percentile", "99",
    ]  # fmt: skip
    text = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120).stdout
    rate = float(_find(r"Throughput: ([\d.]+) infer/sec", text))
    p50, p99 = (float(_find(rf"p{n} latency: (\d+) usec", text)) / 1e3 for n in (50, 99))
    return Figures(rate, p50, p99)


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
