"""A Triton python model: speech probability per frame -> segments of speech, [start, end] in seconds.

Speech starts at a frame of at least `threshold` and ends where the probability stays below `threshold - 0.15` for
`min_silence_s`; shorter speech than `min_speech_s` is dropped. Rows of one request are padded with [-1, -1].
"""

import json

import numpy as np
import triton_python_backend_utils as pb_utils

HYSTERESIS = 0.15


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        names = ("frame_s", "threshold", "min_speech_s", "min_silence_s")
        self._frame_s, self._threshold, self._min_speech_s, self._min_silence_s = (
            float(parameters[name]["string_value"]) for name in names
        )

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        rows = [self._segments(row) for row in pb_utils.get_input_tensor_by_name(request, "SPEECH_PROBS").as_numpy()]
        most = max(len(row) for row in rows)
        segments = np.full((len(rows), most, 2), -1.0, dtype=np.float32)
        for index, row in enumerate(rows):
            segments[index, : len(row)] = np.array(row, dtype=np.float32).reshape(-1, 2)
        return pb_utils.InferenceResponse([pb_utils.Tensor("SEGMENTS", segments)])

    def _segments(self, probabilities):
        found = []
        start = silence = None
        for index, probability in enumerate(probabilities):
            at = index * self._frame_s
            if probability >= self._threshold:
                start = at if start is None else start
                silence = None
            elif probability < self._threshold - HYSTERESIS and start is not None:
                silence = at if silence is None else silence
                if at - silence >= self._min_silence_s:
                    found.append((start, silence))
                    start = silence = None
        if start is not None:
            found.append((start, silence or len(probabilities) * self._frame_s))
        return [(begin, end) for begin, end in found if end - begin >= self._min_speech_s]
