"""A Triton python model: class scores of each token -> its label, and the text's entities. labels.txt has the names.

ENTITIES is a JSON list of {"entity_group", "score", "start", "end", "word"}, places in characters: neighbouring tokens
of one class, beginning anew at each B-; tokens of the class O are none's.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        lines = Path(__file__).with_name("labels.txt").read_text(encoding="utf-8").splitlines()
        self._labels = lines

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        given = {
            name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in ("TEXT", "TOKEN_SCORES", "OFFSETS")
        }
        offsets, scores = given["OFFSETS"], given["TOKEN_SCORES"]
        best = scores.argmax(-1)
        highest = np.take_along_axis(scores, best[..., np.newaxis], -1)[..., 0]
        is_text = offsets[..., 0] >= 0
        labels = np.full(best.shape, b"", dtype=object)
        for at in np.argwhere(is_text):
            labels[tuple(at)] = self._labels[best[tuple(at)]].encode()
        texts = [text.decode("utf-8") for text in given["TEXT"].reshape(-1)]
        entities = [
            json.dumps(self._entities(text, best[row], highest[row], offsets[row]), ensure_ascii=False).encode()
            for row, text in enumerate(texts)
        ]
        made = {
            "ENTITIES": np.array(entities, dtype=object).reshape(-1, 1),
            "TOKEN_LABELS": labels,
            "TOKEN_OFFSETS": offsets,
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in made.items()])

    def _entities(self, text, best, highest, offsets):
        groups, before = [], None
        for number, score, (start, end) in zip(best, highest, offsets, strict=True):
            if start < 0:
                continue
            label = self._labels[number]
            begins, kind = label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label
            if kind != before or begins:
                groups.append((kind, []))
            groups[-1][1].append((float(score), int(start), int(end)))
            before = kind
        return [
            {
                "entity_group": kind,
                "score": float(np.mean([score for score, _, _ in tokens])),
                "start": tokens[0][1],
                "end": tokens[-1][2],
                "word": text[tokens[0][1] : tokens[-1][2]],
            }
            for kind, tokens in groups
            if kind != "O"
        ]
