"""The demo's view of the server: NVIDIA's tritonclient over HTTP and gRPC, and nothing of ours."""

import json
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import np_to_triton_dtype

SAMPLES = Path(__file__).parent / "samples"
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to moderate, and what is known about it."""

    name: str
    audio: np.ndarray[Any, np.dtype[np.float32]]
    segments_s: list[list[float]]
    text: str
    label: str
    image: bytes
    digit: int

    def inputs(self) -> Arrays:
        return {
            "AUDIO": self.audio[np.newaxis],
            "TEXT": as_bytes([self.text.encode()]),
            "IMAGE": as_bytes([self.image]),
        }


def as_bytes(elements: list[bytes]) -> np.ndarray[Any, Any]:
    """[len(elements), 1] object array, as tritonclient wants BYTES."""
    array = np.empty((len(elements), 1), dtype=object)
    array[:, 0] = elements
    return array


def read_wav(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """16 kHz mono 16-bit PCM -> [-1, 1]."""
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / np.float32(32768)


def load_items() -> list[Item]:
    known = json.loads((SAMPLES / "samples.json").read_text())
    return [
        Item(
            item["name"],
            read_wav(SAMPLES / f"{item['clip']}.wav"),
            known["segments_s"][item["clip"]],
            item["text"],
            item["label"],
            (SAMPLES / item["image"]).read_bytes(),
            item["digit"],
        )
        for item in known["items"]
    ]


class Client:
    """One protocol's tritonclient."""

    def __init__(self, protocol: str, url: str, timeout_s: float | None = None) -> None:
        """An answer over gRPC is waited for as long as `timeout_s`; over HTTP the library itself waits 60 s."""
        self.protocol = protocol
        self._limits = {"client_timeout": timeout_s} if protocol == "grpc" and timeout_s else {}
        self._library: Any = httpclient if protocol == "http" else grpcclient
        self._client = self._library.InferenceServerClient(url)

    def is_ready(self) -> bool:
        try:
            return bool(self._client.is_server_ready())
        except Exception:
            return False

    def infer(self, model: str, inputs: Mapping[str, np.ndarray[Any, Any]]) -> tuple[Arrays, str]:
        """All outputs, and the pool that answered ("" where there are none). Raises InferenceServerException."""
        tensors = []
        for name, array in inputs.items():
            tensor = self._library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        result = self._client.infer(model, tensors, **self._limits)
        response = result.get_response()
        if self.protocol == "http":
            names = [output["name"] for output in response["outputs"]]
            pool = response.get("parameters", {}).get("tutti_pool", "")
        else:
            names = [output.name for output in response.outputs]
            pool = response.parameters["tutti_pool"].string_param if "tutti_pool" in response.parameters else ""
        return {name: result.as_numpy(name) for name in names}, pool
