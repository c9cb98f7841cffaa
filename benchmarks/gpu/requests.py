"""Requests as bytes of both protocols, and their answers; knows nothing of who sends them."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from benchmarks.gpu.context import Array

METHOD = "/inference.GRPCInferenceService/ModelInfer"
_DATATYPES = {
    np.dtype(np.int64): "INT64", np.dtype(np.uint8): "UINT8", np.dtype(np.float32): "FP32",
    np.dtype(np.float16): "FP16",
}  # fmt: skip
_DTYPES: dict[str, Any] = {name: dtype for dtype, name in _DATATYPES.items()}


@dataclass(frozen=True, slots=True)
class Request:
    """`tensors` are (name, array); the output comes back as a binary tensor."""

    model: str
    tensors: Sequence[tuple[str, Array]]
    output: str = "y"

    def http(self) -> tuple[bytes, bytes]:
        """Header lines (without Host) and the body."""
        inputs = [
            {"name": name, "shape": list(array.shape), "datatype": _DATATYPES[array.dtype],
             "parameters": {"binary_data_size": array.nbytes}}
            for name, array in self.tensors
        ]  # fmt: skip
        outputs = [{"name": self.output, "parameters": {"binary_data": True}}]
        header = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
        body = header + b"".join(array.tobytes() for _, array in self.tensors)
        head = (
            f"POST /v2/models/{self.model}/infer HTTP/1.1\r\nContent-Type: application/octet-stream\r\n"
            f"Inference-Header-Content-Length: {len(header)}\r\nContent-Length: {len(body)}\r\n"
        ).encode()
        return head, body

    def grpc(self) -> bytes:
        """A length-prefixed message."""
        inputs = [
            pb.ModelInferRequest.InferInputTensor(name=name, datatype=_DATATYPES[array.dtype], shape=array.shape)
            for name, array in self.tensors
        ]
        raw = [array.tobytes() for _, array in self.tensors]
        message = pb.ModelInferRequest(model_name=self.model, inputs=inputs, raw_input_contents=raw)
        text = message.SerializeToString()
        return struct.pack(">BI", 0, len(text)) + bytes(text)


def answer(header: dict[str, Any], binary: bytes) -> dict[str, Array]:
    """The tensors of an HTTP answer, whose JSON is `header`."""
    found, position = {}, 0
    for output in header["outputs"]:
        size = output["parameters"]["binary_data_size"]
        array = np.frombuffer(binary[position : position + size], _DTYPES[output["datatype"]])
        found[output["name"]] = array.reshape(output["shape"])
        position += size
    return found
