"""What is sent: inputs from a model's metadata, seeded or from files, as the bytes of each protocol's message."""

import csv
import glob
import itertools
import json
import random
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as httpclient
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException, serialize_byte_tensor, triton_to_np_dtype

from tutti.loadtest.errors import ScenarioError
from tutti.loadtest.names import near
from tutti.loadtest.scenario import Payload, Scenario, Sizes
from tutti.loadtest.shared import Region

Array = np.ndarray[Any, Any]

# They come along with the package, wherever it is installed.
SAMPLES = Path(__file__).with_name("samples")
SENTENCES = Path(__file__).with_name("sentences.tsv")
VARIABLE_SIZE = 16
CLIP_S = 2.0
RATE = 16_000
# Parameters that the HTTP client takes by name.
_OF_TRITON = frozenset({"sequence_id", "sequence_start", "sequence_end", "priority", "timeout"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input as the server's metadata gives it."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> "TensorInfo":
        return cls(metadata["name"], metadata["datatype"], tuple(int(n) for n in metadata["shape"]))


class Payloads:
    """Draws inputs. Two with one seed draw the same; the repository's samples stand for tensors of their names."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        known = json.loads((SAMPLES / "samples.json").read_text())
        self._images = [(SAMPLES / item["image"]).read_bytes() for item in known["items"]]
        self._clips = [read_wav(SAMPLES / f"{name}.wav") for name in known["segments_s"]]
        with SENTENCES.open(encoding="utf-8", newline="") as file:
            self._texts = [row["text"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]

    def draw(
        self, inputs: Sequence[TensorInfo], rows: int = 1, sizes: Mapping[str, Sizes] | None = None
    ) -> dict[str, Array]:
        return {tensor.name: self._draw(tensor, rows, (sizes or {}).get(tensor.name)) for tensor in inputs}

    def _draw(self, tensor: TensorInfo, rows: int, sizes: Sizes | None) -> Array:
        if tensor.name == "AUDIO" and sizes is None:
            clip = self._random.choice(self._clips)
            start = self._random.randrange(len(clip) - int(CLIP_S * RATE))
            return np.repeat(clip[np.newaxis, start : start + int(CLIP_S * RATE)], rows, axis=0)
        size = self._size(sizes) if sizes is not None else VARIABLE_SIZE
        is_batched = bool(tensor.shape) and tensor.shape[0] == -1
        dims = tensor.shape[1:] if is_batched else tensor.shape
        shape = (*((rows,) if is_batched else ()), *(size if n == -1 else n for n in dims))
        if tensor.datatype == "BYTES":
            source = self._images if tensor.name == "IMAGE" else [text.encode() for text in self._texts]
            array = np.empty(shape, dtype=object)
            for index in np.ndindex(*shape):
                array[index] = self._random.choice(source)
            return array
        dtype = triton_to_np_dtype(tensor.datatype)
        if np.issubdtype(dtype, np.floating):
            return self._numbers.random(shape).astype(dtype)
        return self._numbers.integers(0, 2, shape).astype(dtype)

    def _size(self, sizes: Sizes) -> int:
        low, high = sizes.low, sizes.high
        if sizes.kind == "uniform":
            size = self._random.randint(low, high)
        else:  # nine in ten between the two, the others at them
            middle, spread = (np.log(low) + np.log(high)) / 2, (np.log(high) - np.log(low)) / (2 * 1.645)
            size = int(np.clip(np.exp(self._random.gauss(float(middle), float(spread))), low, high))
        return max(sizes.multiple_of, size // sizes.multiple_of * sizes.multiple_of)


def read_wav(path: Path) -> Array:
    """[samples] FP32 of a mono WAV file of 16 bits. Raises ScenarioError for any other."""
    try:
        with wave.open(str(path)) as file:
            return _samples(path, file)
    except (OSError, EOFError, wave.Error) as error:
        raise ScenarioError(f"{path}: expected WAV: {str(error) or 'it ends too soon'}") from None


def _samples(path: Path, file: wave.Wave_read) -> Array:
    channels, size = file.getnchannels(), file.getsampwidth()
    if (channels, size) != (1, 2):
        raise ScenarioError(f"{path}: expected one channel of 16 bits, got {channels} of {8 * size}")
    return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


@dataclass(frozen=True, slots=True)
class Message:
    """One request, as it goes over the wire. `head` precedes an HTTP body; it ends before the Host header."""

    model: str
    body: bytes
    head: bytes = b""
    rows: int = 1


MetadataOf = Callable[[str, str], Sequence[TensorInfo]]
"""(model, version) -> its inputs."""


def messages(
    scenario: Scenario, metadata_of: MetadataOf, region: Region | None = None
) -> tuple[list[Message], list[float]]:
    """Every message that may be sent, and how often, as weights; their inputs in `region` where there is one.

    Raises ScenarioError for files that are not there.
    """
    drawn_messages: list[Message] = []
    weights: list[float] = []
    for number, payload in enumerate(scenario.payloads):
        infos = list(metadata_of(payload.model, payload.version))
        unknown = sorted({*payload.sizes, *payload.files, *payload.inputs} - {info.name for info in infos})
        if unknown:
            known = [info.name for info in infos]
            but = f"and no '{unknown[0]}'{near(unknown[0], known)}"
            raise ScenarioError(f"payloads.{number}: model '{payload.model}' has the inputs {', '.join(known)}, {but}")
        infos = [info for info in infos if not payload.inputs or info.name in payload.inputs]
        source = Payloads(scenario.seed * 1000 + number)
        files = {
            name: itertools.cycle(_files(scenario.folder, name, pattern)) for name, pattern in payload.files.items()
        }
        of_payload = []
        for _ in range(payload.count):
            drawn = source.draw(infos, payload.rows, payload.sizes)
            for info in infos:
                if info.name in files:
                    drawn[info.name] = _of_file(info, next(files[info.name]), payload.rows)
            of_payload.append(_message(scenario, payload, infos, drawn, region))
        drawn_messages += of_payload
        weights += [payload.weight / len(of_payload)] * len(of_payload)
    return drawn_messages, weights


def _files(folder: Path, name: str, pattern: str) -> list[Any]:
    """Texts, samples or bytes."""
    samples: list[Any] = []
    for path in sorted(Path(path) for path in glob.glob(str(folder / pattern))):
        if path.suffix == ".txt":
            samples += [line.encode() for line in _text(path).splitlines() if line.strip()]
        else:
            samples.append(path)
    if not samples:
        raise ScenarioError(f"payloads: files.{name}: nothing matches '{pattern}' in {folder}")
    return samples


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: byte {error.start} is no UTF-8: expected a text in each line") from None


def _of_file(info: TensorInfo, sample: Any, rows: int) -> Array:
    if isinstance(sample, Path) and sample.suffix == ".wav" and info.datatype.startswith("FP"):
        return np.repeat(read_wav(sample)[np.newaxis].astype(triton_to_np_dtype(info.datatype)), rows, axis=0)
    if info.datatype != "BYTES":
        source = sample.name if isinstance(sample, Path) else "a line of .txt"
        raise ScenarioError(
            f"payloads: files.{info.name}: expected .wav for FP32 or FP16, got {source} for {info.datatype}"
        )
    data = sample.read_bytes() if isinstance(sample, Path) else sample
    shape = (rows, *(1 for _ in info.shape[1:]))
    array = np.empty(shape, dtype=object)
    array[...] = data
    return array


def _message(
    scenario: Scenario,
    payload: Payload,
    infos: Sequence[TensorInfo],
    arrays: Mapping[str, Array],
    region: Region | None,
) -> Message:
    if scenario.target.protocol == "http":
        return _http(scenario, payload, infos, arrays, region)
    request = pb.ModelInferRequest(model_name=payload.model, model_version=payload.version)
    for info in infos:
        array = arrays[info.name]
        tensor = request.inputs.add(name=info.name, datatype=info.datatype, shape=array.shape)
        raw = _raw(info, array)
        if region is None:
            request.raw_input_contents.append(raw)
            continue
        tensor.parameters["shared_memory_region"].string_param = region.name
        tensor.parameters["shared_memory_byte_size"].int64_param = len(raw)
        tensor.parameters["shared_memory_offset"].int64_param = region.place(raw)
    for name in payload.outputs:
        request.outputs.add(name=name)
    for key, value in payload.parameters.items():
        field = {bool: "bool_param", int: "int64_param"}.get(type(value), "string_param")
        setattr(request.parameters[key], field, value)
    return Message(payload.model, request.SerializeToString(), rows=payload.rows)


def _raw(info: TensorInfo, array: Array) -> bytes:
    if info.datatype == "BYTES":
        packed = serialize_byte_tensor(array)
        return bytes(packed.item()) if packed.size else b""
    return array.tobytes()


def _http(
    scenario: Scenario,
    payload: Payload,
    infos: Sequence[TensorInfo],
    arrays: Mapping[str, Array],
    region: Region | None,
) -> Message:
    inputs = []
    for info in infos:
        tensor = httpclient.InferInput(info.name, list(arrays[info.name].shape), info.datatype)
        if region is None:
            tensor.set_data_from_numpy(arrays[info.name])
        else:
            raw = _raw(info, arrays[info.name])
            tensor.set_shared_memory(region.name, len(raw), region.place(raw))
        inputs.append(tensor)
    outputs = [httpclient.InferRequestedOutput(name) for name in payload.outputs] or None
    options: dict[str, Any] = {name: value for name, value in payload.parameters.items() if name in _OF_TRITON}
    others = {name: value for name, value in payload.parameters.items() if name not in _OF_TRITON}
    try:
        body, length = httpclient.InferenceServerClient.generate_request_body(
            inputs, outputs=outputs, parameters=others or None, **options
        )
    except InferenceServerException as error:
        raise ScenarioError(f"payloads: model '{payload.model}': {error.message()}") from None
    version = f"/versions/{payload.version}" if payload.version else ""
    lines = [f"POST /v2/models/{payload.model}{version}/infer HTTP/1.1"]
    lines += [f"{key}: {value}" for key, value in scenario.target.headers.items()]
    if length is not None:
        lines.append(f"Inference-Header-Content-Length: {length}")
    lines.append(f"Content-Length: {len(body)}")
    return Message(payload.model, bytes(body), ("\r\n".join(lines) + "\r\n").encode(), payload.rows)
