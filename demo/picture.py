"""The demo's picture: each item's waveform with its speech, its sentence and image with their scores."""

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from PIL import Image

from demo.client import Arrays, Item

RATE = 16_000
FRAME_S = 512 / RATE
# Inches: of the picture, of an item, and of what is above them all.
WIDTH, HEIGHT, HEAD = 5.2, 3.2, 0.8
INK, MUTED, SPEECH, KNOWN, FLAG = "#1f2430", "#8a90a2", "#2f9e7c", "#e4572e", "#c8102e"


def draw(answered: list[tuple[Item, Arrays]], labels: list[str], path: Path) -> None:
    """Write the picture as PNG, as wide as a telephone: each item's speech, and below it what else was found."""
    plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#d5d8e0"})
    figure = plt.figure(figsize=(WIDTH, HEIGHT * len(answered) + HEAD), facecolor="white", layout="constrained")
    head, *parts = figure.subfigures(len(answered) + 1, 1, height_ratios=[HEAD, *[HEIGHT] * len(answered)])
    head.suptitle("content_intelligence: speech, text and picture\nof each item in one request", fontweight="bold")
    head.legend(
        handles=[Patch(color=SPEECH, alpha=0.35, label="speech found"), Patch(color=KNOWN, label="known boundary")],
        loc="lower center", frameon=False, ncols=2,
    )  # fmt: skip
    for part, (item, answer) in zip(parts, answered, strict=True):
        grid = part.add_gridspec(2, 3, width_ratios=(3.0, 1.0, 1.4), height_ratios=(1.2, 1.0))
        _draw_speech(part.add_subplot(grid[0, :]), item, answer)
        _draw_labels(part.add_subplot(grid[1, 0]), item, answer["LABEL_SCORES"][0], labels)
        _draw_image(part.add_subplot(grid[1, 1]), item, answer["IMAGE_SCORES"][0])
        _draw_score(part.add_subplot(grid[1, 2]), float(answer["MODERATION_SCORE"][0, 0]))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plain(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_yticks([])


def _draw_speech(axes: Any, item: Item, answer: Arrays) -> None:
    seconds = np.arange(len(item.audio)) / RATE
    axes.plot(seconds[::40], item.audio[::40], color=MUTED, linewidth=0.4)
    for start, end in answer["SEGMENTS"][0]:
        axes.axvspan(start, end, color=SPEECH, alpha=0.22, linewidth=0)
    for boundary in np.ravel(item.segments_s):
        axes.axvline(boundary, color=KNOWN, linewidth=0.9)
    probabilities = answer["SPEECH_PROBS"][0]
    axes.plot(np.arange(len(probabilities)) * FRAME_S, probabilities * 0.95, color=SPEECH, linewidth=1.0)
    axes.set(xlim=(0, seconds[-1]), ylim=(-0.7, 1.05))
    axes.set_xlabel("seconds", loc="right", labelpad=1)
    axes.set_title(item.name, loc="left", fontweight="bold", fontsize=11)
    _plain(axes)


def _draw_labels(axes: Any, item: Item, scores: Any, labels: list[str]) -> None:
    best = int(np.argmax(scores))
    colors = [(SPEECH if name == "safe" else FLAG) if i == best else "#d5d8e0" for i, name in enumerate(labels)]
    axes.barh(range(len(labels)), scores, color=colors, height=0.62)
    for index, name in enumerate(labels):
        axes.text(1.02, index, f"{name} {scores[index]:.2f}", va="center", color=INK if index == best else MUTED)
    axes.set(xlim=(0, 2.1), ylim=(len(labels) - 0.5, -0.5), xticks=[])
    words = item.text.split()
    half = len(words) // 2 + 1
    axes.set_title(f"“{' '.join(words[:half])}\n{' '.join(words[half:])}”", loc="left", fontsize=10, style="italic")
    _plain(axes)
    axes.spines["bottom"].set_visible(False)


def _draw_image(axes: Any, item: Item, scores: Any) -> None:
    with Image.open(io.BytesIO(item.image)) as image:
        axes.imshow(image, cmap="gray", interpolation="nearest")
    axes.set_title(f"digit {int(np.argmax(scores))}\n{np.max(scores):.2f}", fontsize=10)
    axes.axis("off")


def _draw_score(axes: Any, score: float) -> None:
    axes.barh([0], [1], color="#eef0f4", height=0.34)
    axes.barh([0], [score], color=FLAG if score >= 0.5 else SPEECH, height=0.34)
    axes.text(0.0, -0.42, f"{score:.2f}", fontsize=18, fontweight="bold", va="center")
    axes.set_title("moderation score", loc="left", fontsize=10)
    axes.set(xlim=(0, 1), ylim=(0.4, -0.75), xticks=[])
    _plain(axes)
    axes.spines["bottom"].set_visible(False)
