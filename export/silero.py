"""Speech detection: Silero VAD's 16 kHz network over a whole clip at once, its segments, and how loud each is.

The graph takes 16 kHz mono PCM of any length: framing, the STFT (as a convolution) and the recurrence are inside.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from tutti.export import layout, onnx
from tutti.export.ensemble import chain
from tutti.export.errors import ExportError
from tutti.export.graphs import Arrays, Graph, Product
from tutti.export.narrow import Wide
from tutti.export.sound import AUDIO_FILE, decoder_step, in_int16, read
from tutti.export.sources import Source
from tutti.repository.model_config import TensorSpec

SAMPLE_RATE = 16_000
FRAME = 512
CONTEXT = 64
MAX_BATCH_SIZE = 32
LEVEL_BATCH_SIZE = 256
SILENCE_DBFS = -100.0
_SEGMENT_PARAMETERS = {
    "frame_s": str(FRAME / SAMPLE_RATE),
    "threshold": "0.5",
    "min_speech_s": "0.25",
    "min_silence_s": "0.3",
}
# TorchScript parameter -> ours. The network is the one of Silero VAD's 16 kHz model.
_WEIGHTS = {
    "stft.forward_basis_buffer": "stft.weight",
    **{f"encoder.{i}.reparam_conv.{kind}": f"encoder.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")},
    **{f"decoder.rnn.{kind}_{gate}": f"lstm.{kind}_{gate}_l0" for kind in ("weight", "bias") for gate in ("ih", "hh")},
    **{f"decoder.decoder.2.{kind}": f"head.{kind}" for kind in ("weight", "bias")},
}


class SpeechDetector(torch.nn.Module):
    """AUDIO [batch, samples] FP32 in [-1, 1] -> speech probability per 32 ms frame [batch, ceil(samples / 512)]."""

    def __init__(self) -> None:
        super().__init__()
        self.stft = torch.nn.Conv1d(1, 258, 256, stride=128, bias=False)
        channels = ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        self.encoder = torch.nn.ModuleList(
            torch.nn.Conv1d(inside, outside, 3, stride=stride, padding=1) for inside, outside, stride in channels
        )
        self.lstm = torch.nn.LSTM(128, 128, batch_first=True)
        self.head = torch.nn.Conv1d(128, 1, 1)

    def forward(self, AUDIO: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensor's name in the repository
        # Each frame sees the 64 samples before it; the last one is filled up with zeros.
        frames = F.pad(AUDIO, (CONTEXT, FRAME - 1)).unfold(1, CONTEXT + FRAME, FRAME)
        flat = frames.reshape(-1, CONTEXT + FRAME)
        spectrum = self.stft(F.pad(flat, (0, 64), mode="reflect").unsqueeze(1).to(self.stft.weight.dtype))
        features = (spectrum[:, :129] ** 2 + spectrum[:, 129:] ** 2).sqrt()
        for layer in self.encoder:
            features = layer(features).relu()
        states, _ = self.lstm(features.reshape(AUDIO.shape[0], -1, 128))
        return self.head(states.relu().transpose(1, 2)).sigmoid().squeeze(1)  # type: ignore[no-any-return]


class SegmentLevel(Wide):
    """CLIP [batch, samples] FP32 of which SAMPLES [batch, 1] INT32 count -> LEVEL [batch, 1] FP32, RMS in dBFS.

    dBFS = 10 log10(mean square); silence is SILENCE_DBFS.
    """

    def forward(self, CLIP: torch.Tensor, SAMPLES: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensors' names
        real = torch.arange(CLIP.shape[1], device=CLIP.device).unsqueeze(0) < SAMPLES
        square = (CLIP * real).square().sum(1, keepdim=True) / SAMPLES.clamp(min=1)
        return 10 * torch.log10(square.clamp(min=10 ** (SILENCE_DBFS / 10)))


def level_reference(case: Arrays) -> Arrays:
    """The same, row by row."""
    levels = []
    for clip, (samples,) in zip(case["CLIP"], case["SAMPLES"], strict=True):
        square = float(np.square(clip[:samples].astype(np.float64)).mean()) if samples else 0.0
        levels.append([10 * np.log10(max(square, 10 ** (SILENCE_DBFS / 10)))])
    return {"LEVEL": np.array(levels, dtype=np.float32)}


def _level_cases() -> list[Mapping[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(1)
    cases: list[Mapping[str, np.ndarray[Any, Any]]] = []
    for batch, samples in ((1, 1), (2, 16_000), (5, 48_000)):
        clips = (rng.normal(size=(batch, samples)) * 0.1).astype(np.float32)
        cases.append({"CLIP": clips, "SAMPLES": rng.integers(0, samples + 1, (batch, 1)).astype(np.int32)})
    return cases


def level_graph(name: str) -> Graph:
    """NAME_level, for one segment at a time."""
    return Graph(
        f"{name}_level",
        SegmentLevel().eval(),
        {"CLIP": torch.randn(2, SAMPLE_RATE), "SAMPLES": torch.full((2, 1), 9_000, dtype=torch.int32)},
        ("LEVEL",),
        {"CLIP": {0: onnx.BATCH, 1: "samples"}, "SAMPLES": {0: onnx.BATCH}},
        _level_cases(),
        {
            "CLIP": ((1, SAMPLE_RATE), (16, 5 * SAMPLE_RATE), (LEVEL_BATCH_SIZE, 30 * SAMPLE_RATE)),
            "SAMPLES": ((1, 1), (16, 1), (LEVEL_BATCH_SIZE, 1)),
        },
        reference=level_reference,
        max_batch_size=LEVEL_BATCH_SIZE,
        parameters={"intra_op_thread_count": "1"},
    )


def load(source: Source) -> tuple[SpeechDetector, Any]:
    """The detector with the weights of Silero's TorchScript file, and that file's own network as the reference."""
    try:
        reference = torch.jit.load(str(source.path), map_location="cpu").eval()
    except RuntimeError as error:
        raise ExportError(f"'{source.location}' is no TorchScript file: {error}") from None
    weights = {name.removeprefix("_model."): tensor for name, tensor in reference.state_dict().items()}
    missing = sorted(set(_WEIGHTS) - set(weights))
    if missing:
        raise ExportError(f"'{source.location}' is not Silero VAD: it lacks {missing[:3]}")
    detector = SpeechDetector()
    detector.load_state_dict({ours: weights[theirs] for theirs, ours in _WEIGHTS.items()})
    return detector.eval(), reference


def reference_probabilities(reference: Any, audio: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Frame by frame, as the package runs it: [batch, samples] -> [batch, frames]."""
    rows = []
    for row in audio:
        reference.reset_states()
        padded = np.pad(row, (0, -len(row) % FRAME))
        chunks = torch.from_numpy(padded).split(FRAME)
        with torch.inference_mode():
            rows.append([float(reference(chunk, SAMPLE_RATE)) for chunk in chunks])
    return np.array(rows, dtype=np.float32)


def _cases() -> list[Mapping[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(0)
    cases: list[Mapping[str, np.ndarray[Any, Any]]] = []
    for batch, samples in ((1, 1), (1, FRAME), (2, FRAME + 1), (3, 16_000), (1, 50_001)):
        loudness = np.abs(np.sin(np.arange(samples) / 3000)) * 0.3
        cases.append({"AUDIO": (rng.normal(size=(batch, samples)) * loudness).astype(np.float32)})
    return cases


def product(source: Source, name: str, ensemble: str, samples: Path | None, datatype: str) -> Product:
    """NAME_vad, NAME_segments, NAME_clips and NAME_level; and the ensemble, from a file's bytes to segments."""
    detector, reference = load(source)
    cases = _cases() + ([{"AUDIO": read(path)[np.newaxis]} for path in sorted(samples.iterdir())] if samples else [])
    vad = Graph(
        f"{name}_vad",
        detector,
        {"AUDIO": torch.randn(2, 4 * FRAME + 100)},
        ("SPEECH_PROBS",),
        {"AUDIO": {0: onnx.BATCH, 1: "samples"}},
        cases,
        {"AUDIO": ((1, FRAME), (8, 10 * SAMPLE_RATE), (MAX_BATCH_SIZE, 30 * SAMPLE_RATE))},
        reference=lambda case: {"SPEECH_PROBS": reference_probabilities(reference, case["AUDIO"])},
        max_batch_size=MAX_BATCH_SIZE,
        parameters={"intra_op_thread_count": "1"},
    )
    graphs = [vad, level_graph(name)]
    graphs = [in_int16(graph) for graph in graphs] if datatype == "INT16" else graphs
    audio, probabilities = TensorSpec("AUDIO", datatype, (-1,)), TensorSpec("SPEECH_PROBS", "FP32", (-1,))
    segments = TensorSpec("SEGMENTS", "FP32", (-1, 2))
    clips = [TensorSpec("CLIPS", datatype, (-1, -1)), TensorSpec("SAMPLES", "INT32", (-1, 1))]
    steps = [
        layout.Entry(
            f"{name}_segments", "python", [probabilities], [segments],
            {"model.py": layout.step_file("speech_segments")}, MAX_BATCH_SIZE, _SEGMENT_PARAMETERS,
        ),
        layout.Entry(
            f"{name}_clips", "python", [audio, segments], [*clips, TensorSpec("COUNT", "INT32", (1,))],
            {"model.py": layout.step_file("speech_clips")}, MAX_BATCH_SIZE, {"sample_rate": str(SAMPLE_RATE)},
        ),
    ]  # fmt: skip
    make = None
    if ensemble:
        steps.append(decoder_step(name, SAMPLE_RATE, datatype=datatype))
        names = [f"{name}_decoder", vad.name, f"{name}_segments"]
        make = lambda entries: chain(ensemble, AUDIO_FILE, [entries[entry] for entry in names])  # noqa: E731
    return Product(graphs, steps, make, source.provenance)
