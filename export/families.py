"""Families of models that can be exported: each says its flags, what of them cannot be, and what is built of them.

`tutti export` is made of what is registered here. Light: help and usage need no library of a family's.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tutti.console.arguments import shown, whole
from tutti.console.progress import Work

if TYPE_CHECKING:
    from tutti.export.graphs import Product
    from tutti.export.sources import Source

Build = Callable[[argparse.Namespace, "Source", str, Path, Work], "Product"]
"""(options, source, name of the ensemble or "", a folder to work in, progress) -> what is to be published."""


@dataclass(frozen=True, slots=True)
class Family:
    """One of them, and the name that its models begin with where no other is given."""

    name: str
    covers: str
    default_name: str
    examples: tuple[str, ...]
    build: Build
    # Adds the flags that are its own to those that all have.
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda command: None
    # What of its flags cannot be, with the flag; told before anything is imported.
    mistakes: Callable[[argparse.Namespace], Iterator[str]] = lambda options: iter(())
    # Whether --samples is a file of texts, and not a folder of files.
    takes_texts: bool = False


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make it a command of `tutti export`. Raises ValueError for a name that is taken."""
    if family.name in _FAMILIES:
        raise ValueError(f"there is a family '{family.name}' already")
    _FAMILIES[family.name] = family


def unregister(name: str) -> None:
    """Take it away again."""
    del _FAMILIES[name]


def registered() -> Mapping[str, Family]:
    """By name, in the order in which they came."""
    return _FAMILIES


def _add_audio(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--language", default="", metavar="CODE", help="Whisper: of the speech (default: told by the model)"
    )
    command.add_argument(
        "--task", choices=("transcribe", "translate"), default="transcribe",
        help="Whisper: translate writes English (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--input-type", choices=("fp32", "int16"), default="fp32",
        help="how samples come: int16 is half of the bytes (default: %(default)s)",
    )  # fmt: skip


def _audio_mistakes(options: argparse.Namespace) -> Iterator[str]:
    if options.input_type == "int16" and "tensorrt" in (*options.variants, options.format):
        yield "--input-type int16: TensorRT has no whole numbers of 16 bits: expected fp32 for plans"


def _build_audio(options: argparse.Namespace, source: "Source", ensemble: str, work: Path, progress: Work) -> "Product":
    from tutti.export import audio

    progress.say(f"read {options.source}")
    return audio.product(
        source, options.name, ensemble, work, options.language, options.task, options.samples,
        options.input_type.upper(),
    )  # fmt: skip


def _add_text(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--task", choices=("auto", "embedding", "classification", "ranking", "token-classification"),
        default="auto", help="ranking: of pairs of texts (default: what the checkpoint's architecture says)",
    )  # fmt: skip
    command.add_argument(
        "--prompt", metavar="NAME", help="of the checkpoint's, by name; '' for none (default: its own)"
    )
    command.add_argument(
        "--labelled", type=Path, metavar="FILE",
        help="tab-separated label, split, text: train a classifier (default: none)",
    )  # fmt: skip


def _build_text(options: argparse.Namespace, source: "Source", ensemble: str, work: Path, progress: Work) -> "Product":
    from tutti.export import text

    progress.say(f"read {options.source}")
    return text.product(
        source, options.name, ensemble, work, options.task, options.labelled, options.samples, options.prompt,
        progress.say,
    )  # fmt: skip


def _add_vision(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--task", choices=("auto", "classification", "embedding"), default="auto",
        help="what is served of it (default: what the checkpoint's architecture says)",
    )  # fmt: skip
    command.add_argument(
        "--input-type", choices=("uint8", "fp32"), default="uint8",
        help="how PIXELS come: as bytes, or normalised as the processor does it (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--input-layout", choices=("chw", "hwc"), default="chw",
        help="hwc: colours last, as pictures are decoded (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--labels", metavar="NAME[,NAME]", help="zero-shot classes, of CLIP and SigLIP (default: none)"
    )
    command.add_argument(
        "--template", default="a photo of a {}.", metavar="TEXT",
        help="the text for a zero-shot class (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--train", choices=("digits",), help="train here, in under a minute (default: as the checkpoint is)"
    )
    command.add_argument(
        "--image-size",
        type=whole(1, 8192),
        metavar="PIXELS",
        help="height and width (default: the checkpoint's)",
    )


def _vision_mistakes(options: argparse.Namespace) -> Iterator[str]:
    if (options.input_type, options.input_layout) == ("fp32", "hwc"):
        yield "--input-layout hwc needs --input-type uint8: processors make FP32 pictures with the colours first"
    if options.labels is not None:
        labels = [label.strip() for label in options.labels.split(",")]
        if len(labels) < 2 or not all(labels) or len(set(labels)) < len(labels):
            yield f"--labels: expected two or more, each of its own, separated by commas, got {shown(options.labels)}"
    try:
        is_fine = options.template.format("LABEL") != options.template.format("OTHER")
    except (IndexError, KeyError, ValueError, AttributeError):
        is_fine = False
    if not is_fine:
        yield f"--template: expected a text with {{}} for the label, got {shown(options.template)}"


def _build_vision(
    options: argparse.Namespace, source: "Source", ensemble: str, work: Path, progress: Work
) -> "Product":
    from tutti.export import pixels, vision

    progress.say(f"read {options.source}" + (f", and train it on {options.train}" if options.train else ""))
    return vision.product(
        source, options.name, ensemble, work, options.task, options.labels, options.template, options.train,
        options.image_size, options.samples, pixels.Form(options.input_type, options.input_layout),
    )  # fmt: skip


register(
    Family(
        "audio",
        "Whisper, AST, wav2vec 2.0, WavLM, CLAP, Silero VAD",
        "speech",
        (
            "tutti export audio openai/whisper-tiny --name speech --language en",
            "tutti export audio ./my-wav2vec2 --samples ./recordings --variants fp16",
        ),
        _build_audio,
        _add_audio,
        _audio_mistakes,
    )
)
register(
    Family(
        "text",
        "embeddings and classifiers of BERT's kind, with their tokenizers",
        "text",
        (
            "tutti export text sentence-transformers/all-MiniLM-L6-v2 --name minilm",
            "tutti export text ./my-bert --labelled labels.tsv --profile --latency-goal-ms 20",
        ),
        _build_text,
        _add_text,
        takes_texts=True,
    )
)
register(
    Family(
        "vision",
        "image classifiers, image embeddings and zero-shot classification",
        "image",
        (
            "tutti export vision microsoft/resnet-18 --name pets",
            "tutti export vision openai/clip-vit-base-patch32 --labels cat,dog --dry-run",
        ),
        _build_vision,
        _add_vision,
        _vision_mistakes,
    )
)
