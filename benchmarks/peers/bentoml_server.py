"""The tiny model as BentoML's users write it: an array in JSON, adaptive batches, no access log."""

import os

import bentoml
import numpy as np
import onnxruntime as ort


# With the usual bound on waiting it refuses some of 64 clients; this one refuses none.
@bentoml.service(logging={"access": {"enabled": False}}, traffic={"max_concurrency": 512})
class Mlp:
    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=60_000)
    def run(self, x: np.ndarray) -> np.ndarray:
        output: np.ndarray = self._session.run(None, {"x": np.asarray(x, np.float32)})[0]
        return output
