"""A Triton python model: LOGITS of each frame -> the text of the best path: repetitions and blanks are left out.

vocabulary.json has the tokens in their order, the blank's number, and what stands between words.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        told = json.loads(Path(__file__).with_name("vocabulary.json").read_text(encoding="utf-8"))
        self._tokens, self._blank, self._delimiter = told["tokens"], told["blank"], told["delimiter"]
        self._is_lower = told["is_lower"]

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        logits = pb_utils.get_input_tensor_by_name(request, "LOGITS").as_numpy()
        texts = [[self._text(row).encode()] for row in logits.argmax(-1)]
        return pb_utils.InferenceResponse([pb_utils.Tensor("TEXT", np.array(texts, dtype=object))])

    def _text(self, best):
        is_new = np.append(True, best[1:] != best[:-1])
        kept = [self._tokens[number] for number in best[is_new] if number != self._blank]
        text = "".join(" " if token == self._delimiter else token for token in kept).strip()
        return text.lower() if self._is_lower else text
