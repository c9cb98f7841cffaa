"""Whisper: one repository entry that transcribes, its encoder and decoder exported with a cache of keys and values.

The encoder's graph takes samples: the log-mel spectrogram is a convolution in it. It ends in the keys and values that
the decoder's layers look at, so that these are made once for each clip. The decoder's graph takes any number of tokens.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from tutti.export import layout
from tutti.export.checkpoint import named
from tutti.export.errors import ExportError, first_line
from tutti.export.features import LogMel, kernel
from tutti.export.graphs import Arrays, Check, Graph, Product, with_arguments
from tutti.export.sound import AUDIO_FILE, decoder_step, from_int16, in_int16, published, to_int16
from tutti.export.variants import Result
from tutti.repository import length_limits
from tutti.repository.model_config import TensorSpec

MAX_BATCH_SIZE = 16
_CLIPS_CHECKED = 4


def _heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[batch, length, width] -> [batch, heads, length, width / heads]."""
    return x.unflatten(2, (count, -1)).transpose(1, 2)


class Encoder(torch.nn.Module):
    """AUDIO [batch, samples] FP32 -> for each layer of the decoder the keys and values of the clip."""

    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__()
        window = np.hanning(extractor.n_fft + 1)[:-1]
        self.mel = LogMel(
            kernel(window, extractor.n_fft), extractor.hop_length, extractor.mel_filters, 1e-10, "log10",
            extractor.n_fft // 2,
        )  # fmt: skip
        self.encoder = model.model.encoder
        self.cross = torch.nn.ModuleList(layer.encoder_attn for layer in model.model.decoder.layers)
        self._count = model.config.decoder_attention_heads

    def forward(self, AUDIO: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: N803 - the tensor's name
        mel = self.mel(AUDIO)[:, :-1].transpose(1, 2)
        mel = torch.maximum(mel, mel.amax(dim=(1, 2), keepdim=True) - 8.0)
        hidden = self.encoder(((mel + 4.0) / 4.0).to(self.encoder.dtype)).last_hidden_state
        keys = []
        for attention in self.cross:
            keys += [_heads(attention.k_proj(hidden), self._count), _heads(attention.v_proj(hidden), self._count)]
        return tuple(keys)


class Decoder(torch.nn.Module):
    """ids [batch, n] INT64 after a cache -> logits of the last [batch, vocabulary], and the cache with all of them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = model.model.decoder
        self.head = model.proj_out
        self._count = model.config.decoder_attention_heads
        self._layers = len(self.decoder.layers)
        # Of each layer's past and cross keys and values, in the order of the arguments.
        names = [f"past_{kind}_{layer}" for layer in range(self._layers) for kind in ("key", "value")]
        self.past_names = names
        self.cross_names = [name.replace("past", "cross") for name in names]

    def forward(self, ids: torch.Tensor, *caches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`given` are the cache of `past_names`, then that of `cross_names`."""
        past, cross = caches[: len(self.past_names)], caches[len(self.past_names) :]
        before, length = past[0].shape[2], ids.shape[1]
        positions = torch.arange(length) + before
        x = self.decoder.embed_tokens(ids) * getattr(self.decoder, "embed_scale", 1.0)
        x = x + F.embedding(positions, self.decoder.embed_positions.weight)
        later = torch.arange(before + length).unsqueeze(0) > positions.unsqueeze(1)
        mask = torch.zeros(length, before + length, dtype=x.dtype).masked_fill(later, torch.finfo(x.dtype).min)
        cache = []
        for number, layer in enumerate(self.decoder.layers):
            hidden = layer.self_attn_layer_norm(x)
            attention = layer.self_attn
            key = torch.cat([past[2 * number], _heads(attention.k_proj(hidden), self._count)], dim=2)
            value = torch.cat([past[2 * number + 1], _heads(attention.v_proj(hidden), self._count)], dim=2)
            cache += [key, value]
            x = x + self._attend(attention, hidden, key, value, mask)
            hidden = layer.encoder_attn_layer_norm(x)
            x = x + self._attend(layer.encoder_attn, hidden, cross[2 * number], cross[2 * number + 1], None)
            x = x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
        return (self.head(self.decoder.layer_norm(x[:, -1])), *cache)

    def _attend(
        self, attention: Any, hidden: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        query = _heads(attention.q_proj(hidden) * attention.scaling, self._count)
        weights = query @ key.transpose(2, 3)
        if mask is not None:
            weights = weights + mask
        mixed = (weights.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return attention.out_proj(mixed)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Speech:
    """A loaded checkpoint."""

    model: Any
    extractor: Any
    tokenizer: Any

    @property
    def samples(self) -> int:
        return int(self.extractor.n_samples)


def load(location: str) -> Speech:
    """From a hub id or a local folder."""
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    try:
        model, seen = WhisperForConditionalGeneration.from_pretrained(
            location, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        if seen["missing_keys"]:
            lacking = named(sorted(seen["missing_keys"]))
            raise ExportError(f"'{location}': its files lack {lacking}, and random numbers would stand there")
        return Speech(
            model.eval(), WhisperFeatureExtractor.from_pretrained(location), AutoTokenizer.from_pretrained(location)
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ExportError(f"transformers cannot load '{location}': {first_line(error)}") from None


def rules(speech: Speech, language: str, task: str) -> dict[str, Any]:
    """decoding.json: what generation_config says, as plain numbers. Raises ExportError for an unknown language."""
    config, model = speech.model.generation_config, speech.model.config
    prompt = [int(config.decoder_start_token_id or model.decoder_start_token_id)]
    known = dict(getattr(config, "lang_to_id", None) or {})
    languages: list[int] = []
    if getattr(config, "is_multilingual", False) and known:
        token = f"<|{language}|>"
        if language and token not in known:
            names = ", ".join(sorted(name.strip("<|>") for name in known))
            raise ExportError(f"--language: expected one of {names}, got '{language}'")
        languages = [] if language else sorted(known.values())
        prompt.append(int(known[token]) if language else languages[0])
        prompt.append(int(config.task_to_id[task]))
    elif language or task != "transcribe":
        raise ExportError(
            f"this checkpoint knows one language only: expected no --language or --task, got '{language or task}'"
        )
    silent = getattr(config, "no_timestamps_token_id", None)
    if silent is not None:
        prompt.append(int(silent))
    # As transformers counts: the prompt is not of the length that is configured, but is of the model's.
    most = int(config.max_length or model.max_target_positions)
    most = min(most + min(model.max_target_positions // 2 - 1, len(prompt)), model.max_target_positions)
    end = config.eos_token_id if config.eos_token_id is not None else model.eos_token_id
    return {
        "samples": speech.samples,
        "prompt": prompt,
        "languages": languages,
        "end": int(end[0] if isinstance(end, list) else end),
        "pad": int(config.pad_token_id if config.pad_token_id is not None else model.pad_token_id),
        "suppress": sorted(int(token) for token in config.suppress_tokens or []),
        "suppress_first": sorted(int(token) for token in config.begin_suppress_tokens or []),
        "max_length": most,
        "heads": int(model.decoder_attention_heads),
        "head_width": int(model.d_model // model.decoder_attention_heads),
    }


def clips(samples: int, count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """[count, samples] FP32: seeded tones and noise whose loudness changes, as speech's does."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / 16_000
    cases = []
    for _ in range(count):
        tones = sum(np.sin(2 * np.pi * rng.uniform(80, 3000) * time) for _ in range(4)) / 8
        loudness = np.abs(np.sin(2 * np.pi * rng.uniform(0.2, 3) * time))
        cases.append((tones + rng.normal(size=samples) * 0.05) * loudness)
    return np.stack(cases).astype(np.float32)


def product(
    location: str, provenance: str, name: str, ensemble: str, work: Path, language: str, task: str, datatype: str
) -> Product:
    """NAME, which transcribes; NAME_decoder, which reads audio files; and the ensemble of both."""
    speech = load(location)
    encoder, decoder = Encoder(speech.model, speech.extractor).eval(), Decoder(speech.model).eval()
    said = rules(speech, language, task)
    (work / "decoding.json").write_text(json.dumps(said))
    speech.tokenizer.backend_tokenizer.save(str(work / "tokenizer.json"))
    hears = _encoder_graph(encoder, decoder, name, speech)
    hears = in_int16(hears) if datatype == "INT16" else hears
    graphs = [hears, _decoder_graph(decoder, name, speech, said)]
    audio = TensorSpec("AUDIO", datatype, (-1,))
    text, tokens = TensorSpec("TEXT", "BYTES", (1,)), TensorSpec("TOKENS", "INT32", (-1,))
    transcribes = layout.Entry(
        name, "python", [audio], [text, tokens],
        {
            "model.py": layout.step_file("whisper"),
            "tokenizer.json": work / "tokenizer.json",
            "decoding.json": work / "decoding.json",
        },
        MAX_BATCH_SIZE,
        {length_limits.PARAMETER: json.dumps({"AUDIO": [speech.samples]})},
    )  # fmt: skip
    reads = decoder_step(name, speech.extractor.sampling_rate, speech.samples, datatype=datatype)
    whole = layout.Entry(
        ensemble, "", [AUDIO_FILE], [text, tokens], {}, MAX_BATCH_SIZE,
        links=[
            layout.Link(f"{name}_decoder", {"AUDIO_FILE": "AUDIO_FILE"}, {"AUDIO": "audio"}),
            layout.Link(name, {"AUDIO": "audio"}, {"TEXT": "TEXT", "TOKENS": "TOKENS"}),
        ],
    )  # fmt: skip

    def transcripts(results: Mapping[str, Result]) -> Check:
        return _check_transcripts(speech, said, results, name, language, task, datatype)

    def ids(results: Mapping[str, Result]) -> Check:
        return check_tokens(said, results[f"{name}.decoder"])

    make = (lambda _: whole) if ensemble else None
    return Product(graphs, [reads, transcribes], make, provenance, [ids, transcripts])


def _encoder_graph(encoder: Encoder, decoder: Decoder, name: str, speech: Speech) -> Graph:
    samples = speech.samples
    cases = [{"AUDIO": clips(samples, count, seed)} for seed, count in enumerate((1, 2, 3))]
    silent = np.zeros((1, samples), np.float32)
    return Graph(
        f"{name}.encoder",
        encoder,
        {"AUDIO": torch.from_numpy(clips(samples, 2))},
        tuple(decoder.cross_names),
        {"AUDIO": {0: "batch"}},
        [*cases, {"AUDIO": silent}],
        {"AUDIO": ((1, samples), (4, samples), (MAX_BATCH_SIZE, samples))},
        wide=frozenset({"AUDIO"}),
        host=name,
    )


def _decoder_graph(decoder: Decoder, name: str, speech: Speech, said: Mapping[str, Any]) -> Graph:
    heads, width, config = said["heads"], said["head_width"], speech.model.config
    rng = np.random.default_rng(0)

    def case(rows: int, before: int, length: int) -> Arrays:
        inputs: dict[str, Any] = {"ids": rng.integers(0, config.vocab_size, (rows, length))}
        for names, size in ((decoder.past_names, before), (decoder.cross_names, config.max_source_positions)):
            inputs.update({name: rng.normal(size=(rows, heads, size, width)).astype(np.float32) for name in names})
        return inputs

    example = {key: torch.from_numpy(np.asarray(array)) for key, array in case(2, 3, 2).items()}
    axes: dict[str, dict[int, str]] = {"ids": {0: "batch", 1: "length"}}
    axes |= {past: {0: "batch", 2: "before"} for past in decoder.past_names}
    axes |= {cross: {0: "batch"} for cross in decoder.cross_names}
    sizes = config.max_source_positions
    profile: dict[str, Any] = {"ids": ((1, 1), (4, 1), (MAX_BATCH_SIZE, 4))}
    last = said["max_length"]
    for cross in decoder.past_names:
        profile[cross] = ((1, heads, 0, width), (4, heads, last // 2, width), (MAX_BATCH_SIZE, heads, last, width))
    for cross in decoder.cross_names:
        profile[cross] = tuple((rows, heads, sizes, width) for rows in (1, 4, MAX_BATCH_SIZE))
    return Graph(
        f"{name}.decoder",
        with_arguments(decoder, list(example)),
        example,
        ("logits", *(past.replace("past", "present") for past in decoder.past_names)),
        axes,
        [case(1, 0, 3), case(2, 0, 1), case(2, 5, 1), case(3, 20, 2), case(1, config.max_target_positions - 1, 1)],
        profile,
        decision="logits",
        host=name,
    )


def generated(
    speech: Speech, audio: np.ndarray[Any, Any], said: Mapping[str, Any], language: str, task: str
) -> list[list[int]]:
    """transformers' own greedy tokens for clips, without the prompt and from the end on."""
    features = speech.extractor(list(audio), sampling_rate=speech.extractor.sampling_rate, return_tensors="pt")
    more: dict[str, Any] = {}
    if getattr(speech.model.generation_config, "is_multilingual", False):
        more = {"task": task, "language": language or None}
    with torch.inference_mode():
        generated = speech.model.generate(
            features.input_features, num_beams=1, do_sample=False, return_timestamps=False, **more
        )
    prompt = len(said["prompt"])
    rows = []
    for row in generated.tolist():
        if row[:1] == said["prompt"][:1]:  # some versions give the prompt back
            row = row[prompt:]
        rows.append(row[: row.index(said["end"])] if said["end"] in row else row)
    return [[token for token in row if token != said["pad"] or said["pad"] == said["end"]] for row in rows]


def check_tokens(said: Mapping[str, Any], decoder: Result) -> Check:
    """No id gets to the decoder that is no row of its table: neither one that it answers, nor one of decoding.json.

    The published code gives it no others, and so need not look.
    """
    subject = f"{decoder.graph.name}: ids"
    if "ids" not in decoder.bounds:
        return Check(subject, False, "the graph does not say how many rows its table has")
    _, high = decoder.bounds["ids"]
    special = [*said["prompt"], *said["languages"], said["end"], said["pad"]]
    answers = decoder.expected[0]["logits"].shape[-1]
    if max(answers - 1, *special) > high or min(special) < 0:
        return Check(
            subject, False, f"expected 0 to {high}, decoding.json has {special}, and the decoder answers {answers}"
        )
    return Check(
        subject, True, f"{answers} answers and {len(special)} tokens of decoding.json are among the {high + 1}"
    )


def _check_transcripts(
    speech: Speech,
    said: Mapping[str, Any],
    results: Mapping[str, Result],
    name: str,
    language: str,
    task: str,
    datatype: str,
) -> Check:
    """The published code over the exported graphs gives transformers' tokens."""
    subject = f"{name}: tokens"
    folder = results[f"{name}.encoder"].built["fp32"].path.parent.parent / f"{name}.together"
    folder.mkdir(exist_ok=True)
    for part in ("encoder", "decoder"):
        link = folder / f"{part}.onnx"
        link.unlink(missing_ok=True)
        link.symlink_to(results[f"{name}.{part}"].built["fp32"].path)
    audio = clips(said["samples"], _CLIPS_CHECKED, seed=7)
    if datatype == "INT16":
        audio = to_int16(audio)
    expected = generated(speech, audio if datatype == "FP32" else from_int16(audio), said, language, task)
    got = published("whisper").Greedy(folder, dict(said)).tokens(audio)
    for number, (right, tokens) in enumerate(zip(expected, got, strict=True)):
        if right != tokens:
            position = next(
                (i for i, (a, b) in enumerate(zip(right, tokens, strict=False)) if a != b), min(len(right), len(tokens))
            )
            return Check(
                subject,
                False,
                f"clip {number} differs from transformers.generate at token {position}: expected "
                f"{right[position : position + 5]}, got {tokens[position : position + 5]}",
            )
    return Check(
        subject, True, f"equal to transformers.generate on {len(audio)} clips, {sum(map(len, expected))} tokens"
    )
