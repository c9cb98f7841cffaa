"""The tiny model as mosec's users write it: raw bytes in and out."""

import os

import numpy as np
import onnxruntime as ort
from mosec import Server, Worker


class Mlp(Worker):
    def __init__(self) -> None:
        super().__init__()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])

    def deserialize(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.float32)

    def serialize(self, data: np.ndarray) -> bytes:
        return data.tobytes()

    def forward(self, data: list[np.ndarray]) -> list[np.ndarray]:
        return list(self._session.run(None, {"x": np.stack(data)})[0])


if __name__ == "__main__":
    server = Server()
    # Batches that do not wait were the quickest of 0, 1 and 5 ms.
    server.append_worker(Mlp, max_batch_size=64, max_wait_time=0)
    server.run()
