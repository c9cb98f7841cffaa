"""A Triton python model: text -> token ids, with the encoder's own tokenizer.json.

Lengths are rounded up to a bucket, so that requests of similar length can share a batch of the encoder. What else it
does follows from its configuration: an input TEXT_PAIR is the second text of a pair, outputs token_type_ids and OFFSETS
are made where they are there; the parameter "prompt" stands before each text, "truncation_side" is where long ones are
cut, and "fixed_length" fills all of them up to one length.
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
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._inputs = [one["name"] for one in config["input"]]
        self._outputs = [one["name"] for one in config["output"]]
        self._max_length = int(parameters["max_length"])
        self._prompt = parameters.get("prompt", "")
        self._is_fixed = "fixed_length" in parameters
        # Triton names the model's folder or the repository, depending on its version: this file's place is certain.
        self._tokenizer = Tokenizer.from_file(str(Path(__file__).with_name("tokenizer.json")))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._max_length, direction=parameters.get("truncation_side", "right"))
        self._pad_id = int(parameters["pad_id"])

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        columns = []
        for name in self._inputs:
            elements = pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)
            try:
                columns.append([element.decode("utf-8") for element in elements])
            except UnicodeDecodeError as error:
                message = f"model '{self._name}': input '{name}': expected UTF-8: {error}"
                return pb_utils.InferenceResponse([], pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
        texts = [self._prompt + text for text in columns[0]]
        encoded = self._tokenizer.encode_batch(
            texts if len(columns) == 1 else list(zip(texts, columns[1], strict=True))
        )
        longest = max(len(encoding.ids) for encoding in encoded)
        length = min(next((bucket for bucket in BUCKETS if bucket >= longest), longest), self._max_length)
        made = self._tensors(encoded, self._max_length if self._is_fixed else length)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, made[name]) for name in self._outputs])

    def _tensors(self, encoded, length):
        ids = np.full((len(encoded), length), self._pad_id, dtype=np.int64)
        made = {"input_ids": ids, "attention_mask": np.zeros_like(ids)}
        if "token_type_ids" in self._outputs:
            made["token_type_ids"] = np.zeros_like(ids)
        if "OFFSETS" in self._outputs:  # of a token's first and behind its last character; -1 where it is none's
            made["OFFSETS"] = np.full((*ids.shape, 2), -1, dtype=np.int64)
        for row, encoding in enumerate(encoded):
            count = len(encoding.ids)
            ids[row, :count] = encoding.ids
            made["attention_mask"][row, :count] = 1
            if "token_type_ids" in made:
                made["token_type_ids"][row, :count] = encoding.type_ids
            if "OFFSETS" in made:
                is_text = np.array(encoding.special_tokens_mask) == 0
                made["OFFSETS"][row, :count][is_text] = np.array(encoding.offsets).reshape(-1, 2)[is_text]
        return made
