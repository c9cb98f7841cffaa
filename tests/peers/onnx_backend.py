"""Runs inside tritonserver's python backend: `backend: "onnxruntime"` for a server without the C++ one."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):  # type: ignore[no-untyped-def]
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        options = ort.SessionOptions()
        threads = config.get("parameters", {}).get("intra_op_thread_count")
        if threads:
            options.intra_op_num_threads = int(threads["string_value"])
        self.session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.inputs = [spec["name"] for spec in config["input"]]
        self.outputs = [spec["name"] for spec in config["output"]]

    def execute(self, requests):  # type: ignore[no-untyped-def]
        """One run for the whole batch: the batcher joins only requests of equal shape."""
        arrays = [[pb_utils.get_input_tensor_by_name(r, name).as_numpy() for r in requests] for name in self.inputs]
        feed = {name: np.concatenate(parts) for name, parts in zip(self.inputs, arrays, strict=True)}
        results = self.session.run(self.outputs, feed)
        responses, at = [], 0
        for part in arrays[0]:
            rows = len(part)
            tensors = [pb_utils.Tensor(name, y[at : at + rows]) for name, y in zip(self.outputs, results, strict=True)]
            responses.append(pb_utils.InferenceResponse(tensors))
            at += rows
        return responses
