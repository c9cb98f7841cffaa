"""A Triton python model: an audio file's bytes -> mono samples in [-1, 1] at the model's rate, of the model's length.

Or in INT16, where that is its output's type: those of a mono file of 16 bits are as they are in it.

WAV in PCM is read with Python's own library; FLAC, OGG and MP3 need soundfile, other rates soxr.
"""

import io
import json
import wave

import numpy as np
import triton_python_backend_utils as pb_utils

# Longer files are refused before they are decoded: a small one can announce hours.
MAX_SECONDS = 3600


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self._name = config["name"]
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._is_int16 = pb_utils.get_output_config_by_name(config, "AUDIO")["data_type"] == "TYPE_INT16"
        self._rate = int(parameters["sample_rate"])
        # 0: as long as it is. Shorter ones are filled up with zeros, after whole repetitions where that is wanted.
        self._samples = int(parameters.get("samples", "0"))
        self._repeats = parameters.get("fill", "zeros") == "repeat"

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        elements = pb_utils.get_input_tensor_by_name(request, "AUDIO_FILE").as_numpy().reshape(-1)
        try:
            rows = [self._fitted(self._decode(element)) for element in elements]
            if len({len(row) for row in rows}) != 1:
                raise ValueError(
                    f"rows of one request need one length, got {sorted({len(row) for row in rows})} samples"
                )
        except Exception as error:
            message = f"model '{self._name}': input 'AUDIO_FILE': {error}"
            return pb_utils.InferenceResponse([], pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
        audio = np.stack(rows).astype(np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("AUDIO", to_int16(audio) if self._is_int16 else audio)])

    def _decode(self, data):
        samples, rate = read_wav(data) if data[:4] == b"RIFF" else read_other(data)
        if len(samples) > MAX_SECONDS * rate:
            raise ValueError(f"expected at most {MAX_SECONDS} s, got {len(samples) / rate:.0f} s")
        if rate == self._rate:
            return samples
        try:
            import soxr
        except ImportError:
            raise ValueError(
                f"expected {self._rate} Hz, got {rate} Hz: resampling needs soxr (pip install soxr)"
            ) from None
        return soxr.resample(samples, rate, self._rate)

    def _fitted(self, samples):
        if not len(samples):
            raise ValueError("expected audio, got no samples")
        if not self._samples:
            return samples
        if self._repeats:
            samples = np.tile(samples, max(1, self._samples // len(samples)))
        samples = samples[: self._samples]
        return np.pad(samples, (0, self._samples - len(samples)))


def to_int16(samples):
    """[-1, 1] -> INT16, 32,768 steps to 1.0; what is beyond is cut."""
    return np.clip(np.rint(samples * np.float32(32768)), -32768, 32767).astype(np.int16)


def read_wav(data):
    """Samples of a WAV file, its channels' mean, and its rate."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(min(file.getnframes(), (MAX_SECONDS + 1) * rate))
    except (wave.Error, EOFError):
        return read_other(data)
    if width == 1:
        samples = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    elif width == 3:
        parts = np.frombuffer(raw, np.uint8).reshape(-1, 3).astype(np.int32)
        samples = ((parts[:, 2] << 24 | parts[:, 1] << 16 | parts[:, 0] << 8) >> 8).astype(np.float32) / 8388608
    else:
        samples = np.frombuffer(raw, f"<i{width}").astype(np.float32) / float(1 << (8 * width - 1))
    return samples.reshape(-1, channels).mean(1), rate


def read_other(data):
    """The same of a file that libsndfile knows."""
    try:
        import soundfile
    except ImportError:
        raise ValueError(
            "expected a WAV file in PCM, got something else: it needs soundfile (pip install soundfile)"
        ) from None
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except Exception as error:
        raise ValueError(f"expected an audio file: {error}") from None
    return samples.mean(1), rate
