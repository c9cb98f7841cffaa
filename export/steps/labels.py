"""A Triton python model: class scores -> the name of the best class, and its score. labels.txt has the names."""

from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        lines = Path(__file__).with_name("labels.txt").read_text(encoding="utf-8").splitlines()
        self._labels = np.array([line.encode() for line in lines], dtype=object)

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        scores = pb_utils.get_input_tensor_by_name(request, "SCORES").as_numpy()
        best = scores.argmax(-1)
        made = {
            "LABEL": self._labels[best][:, np.newaxis],
            "SCORE": np.take_along_axis(scores, best[:, np.newaxis], -1).astype(np.float32),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in made.items()])
