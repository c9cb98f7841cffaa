"""`tutti export audio|text|vision SOURCE`: export one model into a repository, or say why not and exit non-zero."""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tutti.errors import TuttiError

_SOURCE = "hub id, local folder or file, package:NAME/PATH, or config:TYPE[,key=value] (random weights)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one export; returns the exit status: 0 only if the graph was verified and published."""
    options = make_parser().parse_args(arguments)
    if options.format == "onnx" and options.compute_capability:
        print("tutti export: --compute-capability needs --format tensorrt", file=sys.stderr)
        return 2
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="tutti-export-") as work:
            reports, accuracy = _export(options, Path(work))
    except TuttiError as error:
        print(f"tutti export: nothing was published: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"tutti export: '{error.name}' is not installed: pip install 'tutti[export]'", file=sys.stderr)
        return 1
    for report in reports:
        print(f"{options.kind} '{options.name}': equal to PyTorch: {report}")
    if accuracy is not None:
        print(f"{options.kind} '{options.name}': held-out accuracy {accuracy:.3f}")
    print(f"{options.kind} '{options.name}': published in {options.repository} ({time.monotonic() - started:.1f} s)")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tutti export", description="Export a PyTorch model into a model repository.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, text, name in (
        ("audio", "speech detection (Silero VAD)", "speech"),
        ("text", "a sentence encoder, and a classifier on top", "text"),
        ("vision", "an image classifier", "image"),
    ):
        command = kinds.add_parser(kind, help=text)
        command.add_argument("source", metavar="SOURCE", help=_SOURCE)
        command.add_argument("--name", default=name, help="prefix of the published models (default: %(default)s)")
        command.add_argument("--repository", type=Path, default=Path("model_repository"))
        command.add_argument("--format", choices=("onnx", "tensorrt"), default="onnx")
        command.add_argument("--compute-capability", default="", help="build the plan for this GPU, as SM89")
        if kind == "text":
            command.add_argument("--labelled", type=Path, help="tab-separated label, split, text: train a classifier")
        if kind == "vision":
            command.add_argument("--train", choices=("digits",), help="train here, in under a minute")
            command.add_argument("--image-size", type=int, help="height and width (default: the checkpoint's)")
    return parser


def _export(options: argparse.Namespace, work: Path) -> tuple[list[object], float | None]:
    from export import sources
    from export.formats import Format

    source = sources.resolve(options.source)
    format = Format(options.format, options.compute_capability)
    if format.name == "tensorrt":
        from export import tensorrt

        tensorrt.load_library()  # fail before minutes of work
    common = (source, options.repository, options.name, format, work)
    if options.kind == "audio":
        from export import audio

        return list(audio.export(*common)), None
    if options.kind == "text":
        from export import text

        reports, accuracy = text.export(*common, options.labelled)
    else:
        from export import vision

        reports, accuracy = vision.export(*common, options.train, options.image_size)
    return list(reports), accuracy


if __name__ == "__main__":
    sys.exit(main())
