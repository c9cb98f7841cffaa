"""A Triton python model: how likely it is that a text needs a closer look, from its words and letters alone.

Logistic regression over hashed words, pairs of words and runs of letters; gate.npz has its weights.
"""

from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from text_gate_features import features


class TritonPythonModel:
    def initialize(self, args):
        self._name = args["model_name"]
        weights = np.load(Path(__file__).with_name("gate.npz"))
        self._weights, self._bias = weights["weights"], float(weights["bias"])

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        elements = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy().reshape(-1)
        try:
            texts = [element.decode("utf-8") for element in elements]
        except UnicodeDecodeError as error:
            message = f"model '{self._name}': input 'TEXT': expected UTF-8: {error}"
            return pb_utils.InferenceResponse([], pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
        scores = [features(text, len(self._weights)) @ self._weights for text in texts]
        risk = 1 / (1 + np.exp(-(np.array(scores) + self._bias)))
        return pb_utils.InferenceResponse([pb_utils.Tensor("RISK", risk.astype(np.float32).reshape(-1, 1))])
