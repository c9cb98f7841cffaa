"""Audio: which family a source is of, and the classifiers and embeddings over whole clips.

Features are in the graph, so that it takes samples: log-mel spectrograms as a convolution (AST, CLAP), zero mean and
unit variance (wav2vec 2.0, WavLM, HuBERT). They are compared with the checkpoint's own feature extractor.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from export import onnx, silero, whisper
from export.ensemble import chain, labels_step
from export.errors import ExportError
from export.features import LogMel, kernel
from export.graphs import Arrays, Graph, Limits, Product
from export.sound import AUDIO_FILE, decoder_step, in_int16, read
from export.sources import Source

MAX_BATCH_SIZE = 16
SEED = 0
_WAVEFORM = ("wav2vec2", "wavlm", "hubert", "unispeech", "unispeech-sat", "wav2vec2-conformer")
_AST_FLOOR = 1.192092955078125e-07
# The extractors work in float64, and cast what they make: mels of near silence differ by more than a graph does.
_FEATURES = Limits(1e-3, 0.9999, 1.0)

# What comes before the network, the spectrogram or the mean and variance of a quiet clip, needs 32 bits.
_WIDE = frozenset({"AUDIO"})


class SpectrogramClassifier(torch.nn.Module):
    """AUDIO [batch, samples] FP32, 16 kHz -> SCORES [batch, classes] FP32, softmax: AST over its filter bank."""

    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__()
        self.model = model
        window = np.hanning(400)
        filters = _ast_filters(extractor)
        weight = kernel(window, 512, preemphasis=0.97, removes_offset=True)
        self.mel = LogMel(weight, 160, filters, _AST_FLOOR, "log")
        self._frames = int(extractor.max_length)
        self._is_normalized = bool(extractor.do_normalize)
        self._mean, self._scale = float(extractor.mean), 2 * float(extractor.std)

    def forward(self, AUDIO: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensor's name in the repository
        mel = F.pad(self.mel(AUDIO), (0, 0, 0, self._frames))[:, : self._frames]
        if self._is_normalized:
            mel = (mel - self._mean) / self._scale
        return self.model(input_values=mel.to(self.model.dtype)).logits.softmax(-1)  # type: ignore[no-any-return]


class WaveformClassifier(torch.nn.Module):
    """AUDIO [batch, samples] FP32, 16 kHz -> SCORES [batch, classes] FP32, softmax."""

    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__()
        self.model = model
        self._is_normalized = bool(extractor.do_normalize)

    def forward(self, AUDIO: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensor's name in the repository
        audio = AUDIO
        if self._is_normalized:
            variance = audio.var(dim=1, keepdim=True, correction=0)
            audio = (audio - audio.mean(dim=1, keepdim=True)) / (variance + 1e-7).sqrt()
        return self.model(input_values=audio.to(self.model.dtype)).logits.softmax(-1)  # type: ignore[no-any-return]


class AudioEncoder(torch.nn.Module):
    """AUDIO [batch, samples] FP32, 48 kHz and 10 s -> EMBEDDING [batch, width] FP32 of length 1: CLAP."""

    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__()
        self.model = model
        size = int(extractor.fft_window_size)
        window = np.hanning(size + 1)[:-1]
        filters = extractor.mel_filters_slaney
        self.mel = LogMel(kernel(window, size), int(extractor.hop_length), filters, 1e-10, "dB", size // 2)

    def forward(self, AUDIO: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensor's name in the repository
        mel = self.mel(AUDIO).unsqueeze(1).to(self.model.dtype)
        found = self.model.get_audio_features(input_features=mel)
        return F.normalize(found if isinstance(found, torch.Tensor) else found.pooler_output, dim=-1)


def _ast_filters(extractor: Any) -> Any:
    """[257, mels]; the extractor has none of its own where torchaudio is installed."""
    from transformers.audio_utils import mel_filter_bank

    return mel_filter_bank(
        num_frequency_bins=257, num_mel_filters=extractor.num_mel_bins, min_frequency=20,
        max_frequency=extractor.sampling_rate // 2, sampling_rate=extractor.sampling_rate, norm=None,
        mel_scale="kaldi", triangularize_in_mel_space=True,
    )  # fmt: skip


def product(
    source: Source,
    name: str,
    ensemble: str,
    work: Path,
    language: str,
    task: str,
    samples: Path | None,
    datatype: str = "FP32",
) -> Product:
    """Of the family that the source is of: a file is Silero's, a folder or hub id says by its configuration.

    `datatype` is that of samples, FP32 or INT16.
    """
    from transformers import AutoConfig

    if samples is not None and not samples.is_dir():
        raise ExportError(f"--samples {samples}: expected a folder of WAV files")
    if source.is_local and source.path.is_file():
        return silero.product(source, name, ensemble, samples, datatype)
    if source.location is None:
        return _classifier(source, source.config_type, name, ensemble, work, samples, datatype)
    try:
        kind = AutoConfig.from_pretrained(source.location).model_type
    except (OSError, ValueError) as error:
        raise ExportError(f"transformers cannot load '{source.location}': {error}") from None
    if kind == "whisper":
        return whisper.product(source.location, source.provenance, name, ensemble, work, language, task, datatype)
    if kind == "clap":
        return _embedding(source, name, ensemble, samples, datatype)
    return _classifier(source, kind, name, ensemble, work, samples, datatype)


def _load(source: Source, kind: str, family: str) -> tuple[Any, Any]:
    """(model, its feature extractor); random weights and a plain extractor for a configuration."""
    import transformers

    torch.manual_seed(SEED)
    maker = getattr(transformers, family)
    try:
        if source.location is not None:
            model = maker.from_pretrained(source.location, dtype=torch.float32)
            return model.eval(), transformers.AutoFeatureExtractor.from_pretrained(source.location)
        config = transformers.AutoConfig.for_model(source.config_type, **dict(source.options))
        model = maker.from_config(config).eval()
        if kind == "audio-spectrogram-transformer":
            frames, bins = int(config.max_length), int(config.num_mel_bins)
            return model, transformers.ASTFeatureExtractor(max_length=frames, num_mel_bins=bins)
        return model, transformers.Wav2Vec2FeatureExtractor()
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"transformers cannot load the audio model: {error}") from None


def _classifier(
    source: Source, kind: str, name: str, ensemble: str, work: Path, samples: Path | None, datatype: str
) -> Product:
    """NAME_classifier, from samples to scores; and the ensemble from a file's bytes to labels."""
    known = ("audio-spectrogram-transformer", *_WAVEFORM)
    if kind not in known:
        raise ExportError(f"expected whisper, clap, {', '.join(known)} or Silero's file, got '{kind}'")
    model, extractor = _load(source, kind, "AutoModelForAudioClassification")
    is_spectrogram = kind == "audio-spectrogram-transformer"
    module = (SpectrogramClassifier if is_spectrogram else WaveformClassifier)(model, extractor).eval()

    def reference(case: Arrays) -> Arrays:
        features = extractor(list(case["AUDIO"]), sampling_rate=extractor.sampling_rate, return_tensors="pt")
        with torch.inference_mode():
            return {"SCORES": model(input_values=features["input_values"]).logits.softmax(-1).numpy()}

    rate, names = int(extractor.sampling_rate), model.config.id2label
    labels = [str(names[number]) for number in range(len(names))]
    longest = 160 * (int(extractor.max_length) + 2) if is_spectrogram else 10 * rate
    graph = Graph(
        f"{name}_classifier",
        module,
        {"AUDIO": torch.from_numpy(_noise(2, rate, 3))},
        ("SCORES",),
        {"AUDIO": {0: onnx.BATCH, 1: "samples"}},
        _cases((rate // 2, rate, 2 * rate + 123, min(longest + 5000, 4 * rate)), samples, rate),
        {"AUDIO": ((1, rate // 2), (4, 2 * rate), (MAX_BATCH_SIZE, max(longest, 4 * rate)))},
        reference=reference,
        max_batch_size=MAX_BATCH_SIZE,
        labels=labels,
        decision="SCORES",
        limits={"fp32": _FEATURES, "torch": _FEATURES},
        wide=_WIDE,
    )
    return _with_ensemble(graph, source, name, ensemble, rate, 0, labels, work, datatype)


def _embedding(source: Source, name: str, ensemble: str, samples: Path | None, datatype: str) -> Product:
    """NAME_encoder, from ten seconds of samples to an embedding; and the ensemble from a file's bytes."""
    model, extractor = _load(source, "clap", "AutoModel")
    if model.config.audio_config.enable_fusion:
        raise ExportError(
            "CLAP with fusion draws the pieces of a clip at random, so that it has no one answer: expected a "
            "checkpoint without, as laion/clap-htsat-unfused"
        )
    size, rate = int(extractor.nb_max_samples), int(extractor.sampling_rate)

    def reference(case: Arrays) -> Arrays:
        features = extractor(
            list(case["AUDIO"]), sampling_rate=rate, return_tensors="pt", truncation="rand_trunc", padding="repeatpad"
        )
        with torch.inference_mode():
            found = model.get_audio_features(input_features=features["input_features"])
        found = found if isinstance(found, torch.Tensor) else found.pooler_output
        return {"EMBEDDING": F.normalize(found, dim=-1).numpy()}

    graph = Graph(
        f"{name}_encoder",
        AudioEncoder(model, extractor).eval(),
        {"AUDIO": torch.from_numpy(_noise(2, size, 3))},
        ("EMBEDDING",),
        {"AUDIO": {0: onnx.BATCH}},
        _cases((size, size), None, rate) + _own(samples, rate, size),
        {"AUDIO": ((1, size), (4, size), (MAX_BATCH_SIZE, size))},
        reference=reference,
        max_batch_size=MAX_BATCH_SIZE,
        limits={"fp32": _FEATURES, "torch": _FEATURES},
        wide=_WIDE,
    )
    return _with_ensemble(graph, source, name, ensemble, rate, size, [], Path(), datatype)


def _with_ensemble(
    graph: Graph,
    source: Source,
    name: str,
    ensemble: str,
    rate: int,
    size: int,
    labels: Sequence[str],
    work: Path,
    datatype: str,
) -> Product:
    graph = in_int16(graph) if datatype == "INT16" else graph
    steps = [decoder_step(name, rate, size, "repeat", datatype)]
    if not ensemble:
        return Product([graph], steps, None, source.provenance)
    steps += [labels_step(name, labels, work)] if labels else []
    names = [f"{name}_decoder", graph.name, *(step.name for step in steps[1:])]
    return Product(
        [graph], steps, lambda entries: chain(ensemble, AUDIO_FILE, [entries[one] for one in names]), source.provenance
    )


def _noise(batch: int, samples: int, seed: int) -> np.ndarray[Any, Any]:
    """Noise under a loudness that rises and falls, with a tone in it."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples)
    loudness = 0.05 + np.abs(np.sin(time / 5000)) * 0.3
    tones = np.sin(time * rng.uniform(0.01, 0.3, (batch, 1))) * 0.3
    return ((rng.normal(size=(batch, samples)) * 0.3 + tones) * loudness).astype(np.float32)


def _cases(lengths: Sequence[int], samples: Path | None, rate: int) -> list[Arrays]:
    batches = (1, 2, 3, 1)
    made: list[Arrays] = [
        {"AUDIO": _noise(batch, length, seed)}
        for seed, (batch, length) in enumerate(zip(batches, lengths, strict=False))
    ]
    return made + _own(samples, rate, 0)


def _own(samples: Path | None, rate: int, size: int) -> list[Arrays]:
    """The user's files, each a case; fitted to `size` samples as the decoder step does."""
    found: list[Arrays] = []
    for path in sorted(samples.iterdir()) if samples is not None else ():
        audio = read(path, rate)
        if size:
            audio = np.tile(audio, max(1, size // max(1, len(audio))))[:size]
            audio = np.pad(audio, (0, size - len(audio)))
        found.append({"AUDIO": audio[np.newaxis]})
    return found
