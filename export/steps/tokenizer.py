"""A Triton python model: text -> token ids, with the encoder's own tokenizer.json.

Lengths are rounded up to a bucket, so that requests of similar length can share a batch of the encoder.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

BUCKETS = (16, 32, 64, 128, 256, 512)


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self._name = config["name"]
        parameters = config["parameters"]
        self._max_length = int(parameters["max_length"]["string_value"])
        # Triton names the model's folder or the repository, depending on its version: this file's place is certain.
        self._tokenizer = Tokenizer.from_file(str(Path(__file__).with_name("tokenizer.json")))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._max_length)
        self._pad_id = int(parameters["pad_id"]["string_value"])

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        elements = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy().reshape(-1)
        try:
            texts = [element.decode("utf-8") for element in elements]
        except UnicodeDecodeError as error:
            message = f"model '{self._name}': input 'TEXT': expected UTF-8: {error}"
            return pb_utils.InferenceResponse([], pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
        encoded = self._tokenizer.encode_batch(texts)
        longest = max(len(encoding.ids) for encoding in encoded)
        length = min(next((bucket for bucket in BUCKETS if bucket >= longest), longest), self._max_length)
        ids = np.full((len(encoded), length), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(encoded):
            ids[row, : len(encoding.ids)] = encoding.ids
            mask[row, : len(encoding.ids)] = 1
        return pb_utils.InferenceResponse([pb_utils.Tensor("input_ids", ids), pb_utils.Tensor("attention_mask", mask)])
