"""A Triton python model: one moderation score per item, from what was heard, written and seen.

score = 1 - (1 - text_weight(speech) * text_risk) * (1 - image_weight * image_risk)     (a noisy or)

text_risk is 1 - P(safe_label), or TEXT_RISK of a text that was not looked at closer, whose LABEL_SCORES are zeros;
image_risk is the probability of the flagged image classes. TEXT counts fully where the clip is all speech, or where there
is no clip, and `silent_text_weight` where nobody speaks. The policy is in config.pbtxt.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        parameters = {
            key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        models = Path(__file__).resolve().parents[2]
        text_labels = (models / parameters["text_model"] / "labels.txt").read_text().split()
        image_labels = (models / parameters["image_model"] / "labels.txt").read_text().split()
        self._safe = text_labels.index(parameters["safe_label"])
        self._flagged = [image_labels.index(label) for label in parameters["flagged_image_labels"].split(",")]
        self._image_weight = float(parameters["image_weight"])
        self._silent_text_weight = float(parameters["silent_text_weight"])

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        speech, hint, text, image = (
            None if tensor is None else tensor.as_numpy()
            for tensor in (
                pb_utils.get_input_tensor_by_name(request, name)
                for name in ("SPEECH_PROBS", "TEXT_RISK", "LABEL_SCORES", "IMAGE_SCORES")
            )
        )
        rows = next(len(given) for given in (speech, hint, text, image) if given is not None)
        text_risk = np.zeros(rows) if hint is None else hint[:, 0]
        if text is not None:
            text_risk = np.where(text.any(axis=1), 1.0 - text[:, self._safe], text_risk)
        image_risk = np.zeros(rows) if image is None else image[:, self._flagged].sum(axis=1)
        spoken = np.ones(rows) if speech is None else (speech >= 0.5).mean(axis=1)
        text_weight = self._silent_text_weight + (1.0 - self._silent_text_weight) * spoken
        score = 1.0 - (1.0 - text_weight * text_risk) * (1.0 - self._image_weight * image_risk)
        scores = score.astype(np.float32).reshape(-1, 1)
        return pb_utils.InferenceResponse([pb_utils.Tensor("MODERATION_SCORE", scores)])
