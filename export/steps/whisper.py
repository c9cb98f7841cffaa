"""A Triton python model: 16 kHz speech -> text, by Whisper's encoder and decoder with a cache of keys and values.

Greedy. All rows of all requests that came together are decoded together; one that has ended goes on with padding until
the last one has.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self._name = config["name"]
        here = Path(__file__).parent
        self._decoding = Greedy(here, json.loads((here / "decoding.json").read_text()), args)
        self._tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))

    def execute(self, requests):
        audio = [pb_utils.get_input_tensor_by_name(request, "AUDIO").as_numpy() for request in requests]
        most = self._decoding.samples
        answers = [None] * len(requests)
        for index, rows in enumerate(audio):
            if rows.shape[1] > most or not rows.shape[1]:
                message = f"model '{self._name}': input 'AUDIO': expected 1 to {most} samples, got {rows.shape[1]}"
                error = pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
                answers[index] = pb_utils.InferenceResponse([], error)
        good = [index for index, answer in enumerate(answers) if answer is None]
        if good:
            rows = np.concatenate([np.pad(audio[i], ((0, 0), (0, most - audio[i].shape[1]))) for i in good])
            made = self._decoding.tokens(rows)
            for index in good:
                own, made = made[: len(audio[index])], made[len(audio[index]) :]
                answers[index] = self._answer(own)
        return answers

    def _answer(self, rows):
        tokens = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        texts = self._tokenizer.decode_batch([list(map(int, row)) for row in rows], skip_special_tokens=True)
        text = np.array([[one.strip().encode()] for one in texts], dtype=object)
        return pb_utils.InferenceResponse([pb_utils.Tensor("TEXT", text), pb_utils.Tensor("TOKENS", tokens)])


class Greedy:
    """The two graphs, and the rules of decoding.json."""

    def __init__(self, folder, rules, args=None):
        self._rules = rules
        self.samples = rules["samples"]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"]
        if args is not None and args.get("model_instance_kind") == "GPU":
            number = int(args.get("model_instance_device_id") or 0)
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": number}))
        self._encoder = ort.InferenceSession(str(folder / "encoder.onnx"), options, providers=providers)
        self._decoder = ort.InferenceSession(str(folder / "decoder.onnx"), options, providers=providers)
        # In [-1, 1], or as whole numbers, as the graph was exported.
        is_int16 = self._encoder.get_inputs()[0].type == "tensor(int16)"
        self._datatype = np.int16 if is_int16 else np.float32
        self._cross = [node.name for node in self._encoder.get_outputs()]
        self._past = [node.name for node in self._decoder.get_inputs() if node.name.startswith("past_")]
        self._made = [node.name for node in self._decoder.get_outputs()]
        self._heads, self._width = rules["heads"], rules["head_width"]
        self._never = np.array(rules["suppress"], dtype=np.int64)
        self._not_first = np.array(rules["suppress_first"], dtype=np.int64)
        self._languages = np.array(rules["languages"], dtype=np.int64)

    def tokens(self, audio):
        """[rows, samples] -> each row's tokens after the prompt, without the one that ends it."""
        cross = self._encoder.run(None, {"AUDIO": audio.astype(self._datatype)})
        cross = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in zip(self._cross, cross, strict=True)}
        rows = len(audio)
        prompt = np.tile(np.array(self._rules["prompt"], dtype=np.int64), (rows, 1))
        if len(self._languages):
            logits, _ = self._step(prompt[:, :1], self._empty(rows), cross)
            prompt[:, 1] = self._languages[logits[:, self._languages].argmax(-1)]
        end, most = self._rules["end"], self._rules["max_length"]
        found = [[] for _ in range(rows)]
        is_open = np.ones(rows, bool)
        ids, past, length = prompt, self._empty(rows), prompt.shape[1]
        while length < most and is_open.any():
            logits, past = self._step(ids, past, cross)
            logits[:, self._never] = -np.inf
            if ids is prompt:
                logits[:, self._not_first] = -np.inf
            ids = logits.argmax(-1)[:, np.newaxis].astype(np.int64)
            ids[~is_open] = self._rules["pad"]
            for row in np.flatnonzero(is_open):
                if ids[row, 0] == end:
                    is_open[row] = False
                else:
                    found[row].append(int(ids[row, 0]))
            length += 1
        return found

    def _empty(self, rows):
        empty = np.zeros((rows, self._heads, 0, self._width), np.float32)
        return {name: ort.OrtValue.ortvalue_from_numpy(empty) for name in self._past}

    def _step(self, ids, past, cross):
        """Logits after the last of `ids`, and the cache with all of them."""
        feed = {"ids": ort.OrtValue.ortvalue_from_numpy(ids), **past, **cross}
        logits, *cache = self._decoder.run_with_ort_values(self._made, feed)
        return logits.numpy(), dict(zip(self._past, cache, strict=True))
