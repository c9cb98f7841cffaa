"""A Triton python model: the audio of each segment of speech, as items for a model that looks at one segment.

CLIPS holds a row's segments one after the other, filled up with zeros to whole seconds; SAMPLES says how long each is,
COUNT how many there are.
"""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self._rate = int(parameters["sample_rate"]["string_value"])

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        audio = pb_utils.get_input_tensor_by_name(request, "AUDIO").as_numpy()
        segments = pb_utils.get_input_tensor_by_name(request, "SEGMENTS").as_numpy()
        rows = [self._clips(*row) for row in zip(audio, segments, strict=True)]
        most = max(len(row) for row in rows)
        longest = max((len(clip) for row in rows for clip in row), default=0)
        clips = np.zeros((len(rows), most, -(-longest // self._rate) * self._rate), dtype=audio.dtype)
        samples = np.zeros((len(rows), most, 1), dtype=np.int32)
        for index, row in enumerate(rows):
            for number, clip in enumerate(row):
                clips[index, number, : len(clip)] = clip
                samples[index, number] = len(clip)
        count = np.array([[len(row)] for row in rows], dtype=np.int32)
        made = {"CLIPS": clips, "SAMPLES": samples, "COUNT": count}
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in made.items()])

    def _clips(self, audio, segments):
        bounds = [(round(float(start) * self._rate), round(float(end) * self._rate)) for start, end in segments]
        return [audio[start:end] for start, end in bounds if 0 <= start < end and len(audio[start:end])]
