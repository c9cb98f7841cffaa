"""What the demo asks the server, and what it expects: every answer is checked, and a line of a table is printed."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.utils import InferenceServerException

from demo.client import Arrays, Client, Item, as_bytes, load_items
from tutti.console.progress import Work
from tutti.core.errors import reason
from tutti.export import digits

LABELLED = Path("export/data/moderation.tsv")
BOUNDARY_S = 0.15
TOLERANCE = 1e-4
BATCH = 32


class NoAnswer(Exception):
    """The server did not answer. The message says what it was asked, and what its client said."""


class Checks:
    """What was expected and what came; the exit status."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def expect(self, is_right: bool, what: str) -> None:
        if not is_right:
            self.failures.append(what)


def ask(client: Client, model: str, inputs: Mapping[str, np.ndarray[Any, Any]]) -> tuple[Arrays, str]:
    """As the client's. Raises NoAnswer where no answer comes."""
    try:
        return client.infer(model, inputs)
    except Exception as error:  # each transport has kinds of its own
        said = error.message() if isinstance(error, InferenceServerException) else None
        why = (said or reason(error)).partition("\n")[0][:200]
        raise NoAnswer(f"'{model}', asked over {client.protocol}, gave no answer ({why})") from error


def boundaries_found(known: Sequence[Sequence[float]], found: np.ndarray[Any, Any]) -> int:
    """How many of the known starts and ends have a found one of the same kind within BOUNDARY_S."""
    pairs = [(float(start), float(end)) for start, end in found if start >= 0]
    return sum(
        any(abs(pair[side] - segment[side]) <= BOUNDARY_S for pair in pairs) for segment in known for side in (0, 1)
    )


def same(a: Arrays, b: Arrays) -> bool:
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and np.abs(a[name] - b[name]).max(initial=0.0) <= TOLERANCE for name in a
    )


def run_items(clients: list[Client], labels: list[str], checks: Checks) -> list[tuple[Item, Arrays]]:
    """Every item over both protocols: one line of the table each."""
    print(f"\n{'item':<13} {'speech segments':<16} {'text says':<18} {'picture shows':<14} {'moderation':<10} answers")
    answered = []
    for item in load_items():
        (over_http, pool), (over_grpc, _) = (ask(client, "content_intelligence", item.inputs()) for client in clients)
        segments = over_http["SEGMENTS"][0]
        scores = over_http["LABEL_SCORES"][0]
        label = labels[int(scores.argmax())] if scores.any() else labels[0]  # the gate saw no need for a closer look
        digit = int(over_http["IMAGE_SCORES"][0].argmax())
        equal = same(over_http, over_grpc)
        checks.expect(equal, f"{item.name}: HTTP and gRPC answers differ")
        checks.expect(len(segments) == len(item.segments_s), f"{item.name}: {len(segments)} segments of speech")
        checks.expect(label == item.label, f"{item.name}: text label {label}, expected {item.label}")
        checks.expect(digit == item.digit, f"{item.name}: digit {digit}, expected {item.digit}")
        speech_s = float((segments[:, 1] - segments[:, 0]).sum())
        text = f"{label} {scores.max():.2f}" if scores.any() else f"{label} (gate)"
        picture = f"{digit} ({over_http['IMAGE_SCORES'][0].max():.2f})"
        score = float(over_http["MODERATION_SCORE"][0, 0])
        agreement = "http = grpc" if equal else "DIFFERENT"
        shown = f"{len(segments)} of {len(item.segments_s)}, {speech_s:.1f} s"
        levels = over_http["SEGMENT_LEVELS"][0]
        checks.expect(len(levels) == len(segments), f"{item.name}: {len(levels)} levels of {len(segments)} segments")
        print(f"{item.name:<13} {shown:<16} {text:<18} {picture:<14} {score:<10.3f} {agreement}, {pool} pool")
        answered.append((item, over_http))
    for name, output in (("TEXT", "TEXT_RISK"), ("IMAGE", "IMAGE_SCORES"), ("AUDIO", "SEGMENT_LEVELS")):
        alone, _ = ask(clients[0], "content_intelligence", {name: item.inputs()[name]})
        others = {"TEXT_RISK", "IMAGE_SCORES", "SEGMENT_LEVELS"} - {output}
        checks.expect(output in alone and not others & alone.keys(), f"{item.name}: {name} alone: {sorted(alone)}")
        print(f"{item.name}, its {name} alone: moderation {float(alone['MODERATION_SCORE'][0, 0]):.3f}")
    return answered


def check_quality(
    clients: list[Client], answered: list[tuple[Item, Arrays]], labels: list[str], checks: Checks
) -> None:
    """Held-out quality, through the server."""
    clips = {tuple(map(tuple, item.segments_s)): answer["SEGMENTS"][0] for item, answer in answered}
    known = sum(2 * len(segments) for segments in clips)
    found = sum(boundaries_found(segments, got) for segments, got in clips.items())
    with Work("held-out quality", 2) as progress:
        progress.step("texts")
        texts, expected = held_out_texts()
        models = ("text_tokenizer", "text_encoder", "text_classifier")
        embedded = in_batches(clients[1], models, as_bytes(texts), "TEXT", progress)
        progress.step("digits")
        _, _, pictures, numbers = digits.load()
        files = as_bytes([digits.to_png(picture) for picture in pictures])
        scored = in_batches(clients[0], ("image_decoder", "image_classifier"), files, "IMAGE", progress)
    text_right = sum(labels[int(scores.argmax())] == label for scores, label in zip(embedded, expected, strict=True))
    digits_right = sum(int(scores.argmax()) == number for scores, number in zip(scored, numbers, strict=True))
    print(f"\n{'held-out quality':<44} {'right':>11}  {'share':>6}  required")
    for what, right, total, required in (
        (f"speech boundaries within {BOUNDARY_S:g} s", found, known, 0.90),
        ("text labels (test split, 4 classes)", text_right, len(texts), 0.90),
        ("digits (held-out fifth of scikit-learn's)", digits_right, len(numbers), 0.97),
    ):
        share = right / total
        print(f"{what:<44} {right:>4} of {total:<4} {share:>6.3f}  {required:.2f}")
        checks.expect(share >= required, f"{what}: {share:.3f}, required is {required}")


def held_out_texts() -> tuple[list[bytes], list[str]]:
    with LABELLED.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row["split"] == "test"]
    return [row["text"].encode() for row in rows], [row["label"] for row in rows]


def in_batches(
    client: Client, models: Sequence[str], rows: np.ndarray[Any, Any], name: str, progress: Work
) -> list[np.ndarray[Any, Any]]:
    """Rows through one model after another, BATCH at a time; the last model's only output, row by row."""
    results: list[np.ndarray[Any, Any]] = []
    for at in range(0, len(rows), BATCH):
        progress.at(at / len(rows))
        outputs: Arrays = {name: rows[at : at + BATCH]}
        for model in models:
            outputs, _ = ask(client, model, outputs)
        (only,) = outputs.values()
        results.extend(only)
    return results
