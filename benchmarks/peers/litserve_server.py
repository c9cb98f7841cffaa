"""The tiny model as LitServe's users write it: it takes JSON, so the tensor is a text in it."""

import os
import sys
from typing import Any

import litserve
import numpy as np
import onnxruntime as ort


class Mlp(litserve.LitAPI):
    def setup(self, device: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])

    def decode_request(self, request: dict[str, Any]) -> np.ndarray:
        return np.frombuffer(bytes.fromhex(request["x"]), np.float32)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        output: np.ndarray = self._session.run(None, {"x": x})[0]
        return output

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, str]:
        return {"y": output.tobytes().hex()}


if __name__ == "__main__":
    api = Mlp(max_batch_size=64, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", fast_queue=True)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, access_log=False, log_level="warning"
    )
