"""Audio: which family a source is of; classifiers, embeddings and CTC transcription over whole clips.

Features are in the graph, so that it takes samples: log-mel spectrograms as a convolution (AST, CLAP), zero mean and
unit variance (wav2vec 2.0, WavLM, HuBERT). They are compared with the checkpoint's own feature extractor.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from tutti.export import checkpoint, onnx, silero, whisper
from tutti.export.checkpoint import Loaded
from tutti.export.ensemble import chain, labels_step
from tutti.export.errors import ExportError
from tutti.export.features import LogMel, kernel
from tutti.export.graphs import Arrays, Check, Graph, Limits, Product, Trial
from tutti.export.layout import Entry, step_file
from tutti.export.sound import AUDIO_FILE, as_wav, decoder_step, in_int16, read
from tutti.export.sources import Source
from tutti.repository.model_config import TensorSpec

MAX_BATCH_SIZE = 16
_WAVEFORM = ("wav2vec2", "wavlm", "hubert", "unispeech", "unispeech-sat", "wav2vec2-conformer")
_AST_FLOOR = 1.192092955078125e-07
# The extractors work in float64, and cast what they make: mels of near silence differ by more than a graph does.
_FEATURES = Limits(1e-3, 0.9999, 1.0)

# What comes before the network, the spectrogram or the mean and variance of a quiet clip, needs 32 bits.
_WIDE = frozenset({"AUDIO"})


class SpectrogramClassifier(torch.nn.Module):
    """AUDIO [batch, samples] FP32, 16 kHz -> SCORES [batch, classes] FP32: AST over its filter bank."""

    def __init__(self, model: Any, extractor: Any, function: str) -> None:
        super().__init__()
        self.model = model
        self._function = function
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
        logits = self.model(input_values=mel.to(self.model.dtype)).logits
        return checkpoint.scores(logits, self._function)


class Waveform(torch.nn.Module):
    """AUDIO [batch, samples] FP32, 16 kHz -> SCORES [batch, classes] FP32, or LOGITS of each frame: function "none"."""

    def __init__(self, model: Any, extractor: Any, function: str) -> None:
        super().__init__()
        self.model = model
        self._function = function
        self._is_normalized = bool(extractor.do_normalize)

    def forward(self, AUDIO: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensor's name in the repository
        audio = AUDIO
        if self._is_normalized:
            variance = audio.var(dim=1, keepdim=True, correction=0)
            audio = (audio - audio.mean(dim=1, keepdim=True)) / (variance + 1e-7).sqrt()
        return checkpoint.scores(self.model(input_values=audio.to(self.model.dtype)).logits, self._function)


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
        features = self.model.get_audio_features(input_features=mel)
        return F.normalize(features if isinstance(features, torch.Tensor) else features.pooler_output, dim=-1)


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
    if samples is not None and not samples.is_dir():
        raise ExportError(f"--samples {samples}: expected a folder of WAV files")
    if source.is_local and source.path.is_file():
        return silero.product(source, name, ensemble, samples, datatype)
    config = checkpoint.configuration(source, "audio")
    kind, head = config.model_type, checkpoint.task_of(config)
    if source.location is not None:
        if kind == "whisper" and head in ("", "ConditionalGeneration"):
            return whisper.product(source.location, source.provenance, name, ensemble, work, language, task, datatype)
        if kind == "clap" and not head:
            return _embedding(source, config, name, ensemble, samples, datatype)
        if kind in _WAVEFORM and head == "CTC":
            return _transcription(source, config, name, ensemble, work, samples, datatype)
        if head not in ("SequenceClassification", "AudioClassification") or kind == "whisper":
            raise ExportError(
                f"'{source.given}' is a {checkpoint.architecture(config) or kind}: `tutti export audio` covers Whisper "
                "(WhisperForConditionalGeneration), sound classifiers (as Wav2Vec2ForSequenceClassification), CTC "
                "transcription (as Wav2Vec2ForCTC), CLAP's embeddings and Silero's file"
            )
    return _classifier(source, config, name, ensemble, work, samples, datatype)


def _load(source: Source, config: Any, family: str) -> tuple[Loaded, Any]:
    """(model, its feature extractor); random weights and a plain extractor for a configuration."""
    import transformers

    loaded = checkpoint.load(getattr(transformers, family), source, config)
    if source.location is not None:
        with checkpoint.told(source):
            return loaded, transformers.AutoFeatureExtractor.from_pretrained(source.location)
    if config.model_type == "audio-spectrogram-transformer":
        frames, bins = int(config.max_length), int(config.num_mel_bins)
        return loaded, transformers.ASTFeatureExtractor(max_length=frames, num_mel_bins=bins)
    return loaded, transformers.Wav2Vec2FeatureExtractor()


def _classifier(
    source: Source, config: Any, name: str, ensemble: str, work: Path, samples: Path | None, datatype: str
) -> Product:
    """NAME_classifier, from samples to scores; and the ensemble from a file's bytes to labels."""
    known, kind = ("audio-spectrogram-transformer", *_WAVEFORM), config.model_type
    if kind in ("whisper", "clap"):
        problem = f"'{source.given}': of {kind} a checkpoint is needed, a folder or a hub id"
        raise ExportError(f"{problem}; random weights, by config:TYPE, are made of {', '.join(known)}")
    if kind not in known:
        covered = f"Whisper, CLAP, {', '.join(known)} and Silero's file"
        raise ExportError(f"'{source.given}' is a {kind}: `tutti export audio` covers {covered}")
    loaded, extractor = _load(source, config, "AutoModelForAudioClassification")
    function = checkpoint.function_of(loaded.model.config, is_one_sigmoid=False)
    labels = checkpoint.labels(loaded.model.config)
    graph, seen = _over_samples(loaded, extractor, f"{name}_classifier", "SCORES", function, samples, source)
    graph = replace(graph, labels=labels)
    last = [labels_step(name, labels, work)]
    rate = int(extractor.sampling_rate)
    return _with_ensemble(graph, source, name, ensemble, rate, 0, last, datatype, seen, _sounds(graph, rate))


def _over_samples(
    loaded: Loaded, extractor: Any, name: str, output: str, function: str, samples: Path | None, source: Source
) -> tuple[Graph, Check]:
    """The graph of a network from samples to what it makes of them, and what was seen of its weights."""
    model = loaded.model
    is_spectrogram = model.config.model_type == "audio-spectrogram-transformer"
    module = (SpectrogramClassifier if is_spectrogram else Waveform)(model, extractor, function).eval()

    def reference(case: Arrays) -> Arrays:
        features = extractor(list(case["AUDIO"]), sampling_rate=extractor.sampling_rate, return_tensors="pt")
        with torch.inference_mode():
            logits = model(input_values=features["input_values"]).logits
            return {output: checkpoint.scores(logits, function).numpy()}

    rate = int(extractor.sampling_rate)
    longest = 160 * (int(extractor.max_length) + 2) if is_spectrogram else 10 * rate
    graph = Graph(
        name,
        module,
        {"AUDIO": torch.from_numpy(_noise(2, rate, 3))},
        (output,),
        {"AUDIO": {0: onnx.BATCH, 1: "samples"}},
        _cases((rate // 2, rate, 2 * rate + 123, min(longest + 5000, 4 * rate)), samples, rate),
        {"AUDIO": ((1, rate // 2), (4, 2 * rate), (MAX_BATCH_SIZE, max(longest, 4 * rate)))},
        reference=reference,
        max_batch_size=MAX_BATCH_SIZE,
        decision=output,
        limits={"fp32": _FEATURES, "torch": _FEATURES},
        wide=_WIDE,
    )
    return graph, checkpoint.check_weights(loaded, module, {"AUDIO": graph.example["AUDIO"]}, source)


def _transcription(
    source: Source, config: Any, name: str, ensemble: str, work: Path, samples: Path | None, datatype: str
) -> Product:
    """NAME_frames, from samples to the logits of each frame; and the ensemble from a file's bytes to its text."""
    from transformers import AutoTokenizer

    loaded, extractor = _load(source, config, "AutoModelForCTC")
    with checkpoint.told(source):
        tokenizer = AutoTokenizer.from_pretrained(source.location)
    graph, seen = _over_samples(loaded, extractor, f"{name}_frames", "LOGITS", "none", samples, source)
    rate = int(extractor.sampling_rate)
    trials = _sounds(graph, rate, lambda logits: tokenizer.decode(logits[0].argmax(-1)))
    last = [_transcript_step(name, tokenizer, config, work)]
    return _with_ensemble(graph, source, name, ensemble, rate, 0, last, datatype, seen, trials)


def _transcript_step(name: str, tokenizer: Any, config: Any, work: Path) -> Entry:
    """NAME_transcript: LOGITS -> TEXT, by the checkpoint's own vocabulary."""
    size = int(config.vocab_size)
    if len(tokenizer) > size:
        raise ExportError(f"its tokenizer has {len(tokenizer)} tokens, its network {size}: it is another's")
    tokens = [str(tokenizer.convert_ids_to_tokens(number)) for number in range(size)]
    told = {
        "tokens": tokens,
        "blank": int(tokenizer.pad_token_id),
        "delimiter": str(tokenizer.word_delimiter_token),
        "is_lower": bool(getattr(tokenizer, "do_lower_case", False)),
    }
    file = work / "vocabulary.json"
    file.write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    logits, text = TensorSpec("LOGITS", "FP32", (-1, size)), TensorSpec("TEXT", "BYTES", (1,))
    files = {"model.py": step_file("transcript"), "vocabulary.json": file}
    return Entry(f"{name}_transcript", "python", [logits], [text], files, MAX_BATCH_SIZE)


def _sounds(graph: Graph, rate: int, text_of: Callable[[Any], str] | None = None) -> list[Trial]:
    """Short, usual and long files, by the graph's own reference: the checkpoint's extractor and transformers' model."""
    reference = graph.reference
    assert reference is not None

    def original(samples: Any) -> Arrays:
        answer = reference({"AUDIO": samples.astype(np.float32)[np.newaxis] / 32768})
        if text_of is None:
            return answer
        return {"TEXT": np.array([[text_of(answer["LOGITS"]).encode()]], dtype=object)}

    trials = []
    for length, seconds in (("half a second", 0.5), ("two seconds", 2), ("twelve seconds", 12)):
        samples = (_noise(1, int(seconds * rate), 7)[0].clip(-1, 1) * 32767).astype("<i2")
        trials.append(Trial(length, {AUDIO_FILE.name: as_wav(samples, rate)}, partial(original, samples)))
    return trials


def _embedding(source: Source, config: Any, name: str, ensemble: str, samples: Path | None, datatype: str) -> Product:
    """NAME_encoder, from ten seconds of samples to an embedding; and the ensemble from a file's bytes."""
    loaded, extractor = _load(source, config, "AutoModel")
    model = loaded.model
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
            embedding = model.get_audio_features(input_features=features["input_features"])
        embedding = embedding if isinstance(embedding, torch.Tensor) else embedding.pooler_output
        return {"EMBEDDING": F.normalize(embedding, dim=-1).numpy()}

    module = AudioEncoder(model, extractor).eval()
    seen = checkpoint.check_weights(loaded, module, {"AUDIO": torch.from_numpy(_noise(1, size, 3))}, source)
    graph = Graph(
        f"{name}_encoder",
        module,
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
    return _with_ensemble(graph, source, name, ensemble, rate, size, [], datatype, seen)


def _with_ensemble(
    graph: Graph,
    source: Source,
    name: str,
    ensemble: str,
    rate: int,
    size: int,
    last: Sequence[Entry],
    datatype: str,
    seen: Check,
    trials: Sequence[Trial] = (),
) -> Product:
    """`last` are the steps behind the graph."""
    graph = in_int16(graph) if datatype == "INT16" else graph
    steps = [decoder_step(name, rate, size, "repeat", datatype)]
    checks = [lambda _: seen]
    if not ensemble:
        return Product([graph], steps, None, source.provenance, checks)
    steps += last
    names = [f"{name}_decoder", graph.name, *(step.name for step in steps[1:])]

    def make(entries: Mapping[str, Entry]) -> Entry:
        return chain(ensemble, AUDIO_FILE, [entries[entry] for entry in names])

    return Product([graph], steps, make, source.provenance, checks, trials=trials)


def _noise(batch: int, samples: int, seed: int) -> np.ndarray[Any, Any]:
    """Noise under a loudness that rises and falls, with a tone in it."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples)
    loudness = 0.05 + np.abs(np.sin(time / 5000)) * 0.3
    tones = np.sin(time * rng.uniform(0.01, 0.3, (batch, 1))) * 0.3
    return ((rng.normal(size=(batch, samples)) * 0.3 + tones) * loudness).astype(np.float32)


def _cases(lengths: Sequence[int], samples: Path | None, rate: int) -> list[Arrays]:
    batches = (1, 2, 3, 1)
    cases: list[Arrays] = [
        {"AUDIO": _noise(batch, length, seed)}
        for seed, (batch, length) in enumerate(zip(batches, lengths, strict=False))
    ]
    return cases + _own(samples, rate, 0)


def _own(samples: Path | None, rate: int, size: int) -> list[Arrays]:
    """The user's files, each a case; fitted to `size` samples as the decoder step does."""
    cases: list[Arrays] = []
    for path in sorted(samples.iterdir()) if samples is not None else ():
        audio = read(path, rate)
        if size:
            audio = np.tile(audio, max(1, size // max(1, len(audio))))[:size]
            audio = np.pad(audio, (0, size - len(audio)))
        cases.append({"AUDIO": audio[np.newaxis]})
    return cases
