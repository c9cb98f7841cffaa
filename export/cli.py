"""`tutti export audio|text|vision SOURCE`: export one model into a repository, or say why not and exit non-zero."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tutti.console.arguments import Parser, positive, whole
from tutti.console.help_format import Help, examples
from tutti.console.progress import Work
from tutti.core import extras
from tutti.core.errors import TuttiError
from tutti.core.temporary_folders import Folder
from tutti.export import families, refusals
from tutti.export.names import VARIANTS

if TYPE_CHECKING:
    from tutti.export.pipeline import Options, Outcome

_log = logging.getLogger(__name__)

_SOURCE = "hub id, local folder or file, package:NAME/PATH, or config:TYPE[,key=value] (random weights)"
_BACKENDS = {"onnx": "onnxruntime", "tensorrt": "tensorrt", "torch": "pytorch"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one export; returns the exit status: 0 only if everything was verified and published."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    wrong = refusals.wrong(options)
    if wrong:
        print(f"tutti export: {wrong}", file=sys.stderr)
        return 2
    try:
        with Folder("export") as work:
            return _export(options, work)
    except ModuleNotFoundError as error:
        advice = extras.install("export") if extras.missing("export") else "the model, or its tokenizer, needs it"
        print(f"tutti export: '{error.name}' is not installed: {advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tutti export: nothing was published: it was interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # what libraries raise on models that nobody here has seen
        return _refused(options, error)


def _refused(options: argparse.Namespace, error: Exception) -> int:
    """Say in a sentence why nothing was published, and on the page; where it went wrong is for who works on this."""
    from tutti.export.errors import ParityError

    _log.debug("the export failed", exc_info=error)
    why = str(error)
    if not isinstance(error, TuttiError):
        why = f"{options.source!r} is not covered, or something is wrong with it: {_short(error)}"
    if not isinstance(error, ParityError):
        _page_of(options, why)
    print(f"tutti export: nothing was published: {why}", file=sys.stderr)
    return 1


def _short(error: Exception) -> str:
    """The exception's class and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _page_of(options: argparse.Namespace, why: str) -> None:
    """The page of an export that was refused before anything was built."""
    from tutti.export import sources

    try:
        source = sources.resolve(options.source)  # before seconds of imports
        from tutti.export.graphs import Check
        from tutti.export.pipeline import Outcome

        outcome = Outcome(options.name, source, _options(options), checks=[Check("source", False, why)])
        outcome.provenance = source.provenance
        print(f"tutti export: report: {_report(outcome, options)}", file=sys.stderr)
    except (TuttiError, OSError) as error:
        print(f"tutti export: no report: {error}", file=sys.stderr)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tutti export",
        description="Export a PyTorch model into a model repository, verified end to end.",
        epilog=examples(
            "tutti export text sentence-transformers/all-MiniLM-L6-v2 --name minilm",
            "tutti export audio openai/whisper-tiny --name speech",
            "tutti export vision ./my-resnet --labels cat,dog --variants fp16,int8",
        ),
        formatter_class=Help,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for family in families.registered().values():
        command = kinds.add_parser(
            family.name, help=family.covers, description=f"Export {family.covers}.", epilog=examples(*family.examples),
            usage=f"tutti export {family.name} SOURCE [flags]    (tutti export {family.name} --help lists them)",
            formatter_class=Help,
        )  # fmt: skip
        _add_places(command, family.default_name)
        _add_variants(command)
        _add_trials(command)
        family.add_arguments(command)
    return parser


def _add_places(command: argparse.ArgumentParser, name: str) -> None:
    """Of what, where to, and under which names."""
    command.add_argument("source", metavar="SOURCE", help=_SOURCE)
    command.add_argument(
        "--name", default=name, metavar="NAME", help="prefix of the published models (default: %(default)s)"
    )
    command.add_argument(
        "--repository", type=Path, default=Path("model_repository"), metavar="FOLDER",
        help="where to publish; made where there is none (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--version", type=whole(1, 10**17), default=1, metavar="N", help="of the models (default: %(default)s)"
    )
    command.add_argument(
        "--ensemble", metavar="NAME", help="name of the ensemble over all of it (default: NAME_ensemble; '': none)"
    )


def _add_variants(command: argparse.ArgumentParser) -> None:
    """What is built of it, and for what."""
    command.add_argument(
        "--variants", type=lambda text: text.split(","), default=["fp32"], metavar="VARIANT[,VARIANT]",
        help="fp32,fp16,int8,torch,torch-fp16,torch-bf16,tensorrt: what is built, each verified (default: fp32)",
    )  # fmt: skip
    command.add_argument("--format", choices=_BACKENDS, default="onnx", help="what is served (default: %(default)s)")
    command.add_argument(
        "--cpu",
        choices=("fp32", "int8"),
        default="fp32",
        help="variant served on processors (default: %(default)s)",
    )
    command.add_argument(
        "--gpu", choices=("fp32", "fp16", "bf16"),
        help="precision served on GPUs; bf16 with --format torch (default: fp16 if built, else bf16)",
    )  # fmt: skip
    command.add_argument(
        "--compute-capability",
        default="",
        metavar="SM",
        help="build the plan for this GPU, as SM89 (default: this one)",
    )


def _add_trials(command: argparse.ArgumentParser) -> None:
    """What it is tried on, and what is told of that."""
    command.add_argument(
        "--samples", type=Path, metavar="PATH",
        help="your own data to verify on: a text file, or a folder of files (default: made up)",
    )  # fmt: skip
    command.add_argument(
        "--profile", action="store_true", help="measure latencies, and configure by them (default: not)"
    )
    command.add_argument(
        "--latency-goal-ms", type=positive, default=50.0, metavar="MS", help="for --profile (default: %(default)g)"
    )
    command.add_argument("--report", type=Path, metavar="FILE", help="the page about it (default: NAME.export.html)")
    command.add_argument("--dry-run", action="store_true", help="show what would be done (default: do it)")
    command.add_argument(
        "--force", action="store_true",
        help="do it also where nothing has changed since the last time (default: not)",
    )  # fmt: skip


def _export(options: argparse.Namespace, work: Path) -> int:
    from tutti.export.errors import ParityError

    label = f"{options.kind} '{options.name}'"
    try:
        with Work(label) as progress:
            outcome = _made(options, work, label, progress)
    except ParityError as error:
        from tutti.export import pipeline

        stopped = pipeline.stopped(error)
        if stopped is not None:
            print(f"tutti export: report: {_report(stopped, options)}", file=sys.stderr)
        raise
    if isinstance(outcome, list):
        print("\n".join(outcome))
    else:
        _tell(outcome, label, options)
    return 0


def _made(options: argparse.Namespace, work: Path, label: str, progress: Work) -> "Outcome | list[str]":
    """What came of it, or lines for a person where nothing was to be done. Raises ParityError."""
    progress.step("load what it needs; small models take about a minute in all")
    from tutti.export import sources

    source = sources.resolve(options.source)  # before seconds of imports
    from tutti.export import commands, manifest, pipeline

    settings = _options(options)
    if "tensorrt" in settings.variants:
        from tutti.export import tensorrt

        tensorrt.load_library()  # fail before minutes of work
    inputs = {name: value for name, value in vars(options).items() if name not in _NO_INPUTS}
    key = manifest.key(source, inputs)
    known = [] if options.force or options.dry_run else manifest.unchanged(options.repository, key, options.version)
    if known:
        unchanged = f"nothing has changed: {', '.join(known)} in {options.repository} (--force does it again)"
        return [f"{label}: {unchanged}", *commands.following(options.repository, known)]
    ensemble = f"{options.name}_ensemble" if options.ensemble is None else options.ensemble
    product = families.registered()[options.kind].build(options, source, ensemble, work, progress)
    if options.dry_run:
        return [f"{label}: {source.provenance}", *pipeline.plan_lines(product, settings, options.repository)]
    return pipeline.run(product, source, options.name, options.repository, settings, work, key, progress)


# What changes nothing in what is made.
_NO_INPUTS = frozenset({"source", "repository", "report", "dry_run", "force"})


def _options(options: argparse.Namespace) -> "Options":
    from tutti.export.pipeline import Options

    variants = list(dict.fromkeys(["fp32", *options.variants]))
    if options.format != "onnx" and options.format not in variants:
        variants.append(options.format)
    if options.cpu not in variants:
        variants.insert(1, options.cpu)
    gpu = _gpu(options, variants)
    if gpu not in variants:
        variants.insert(1, gpu)
    ordered = tuple(variant for variant in VARIANTS if variant in variants)
    return Options(
        ordered, _BACKENDS[options.format], options.cpu, gpu, options.compute_capability, options.version,
        options.profile, options.latency_goal_ms,
    )  # fmt: skip


def _gpu(options: argparse.Namespace, variants: Sequence[str]) -> str:
    """The variant that is served on GPUs."""
    if options.format != "torch":
        return options.gpu or ("fp16" if "fp16" in variants else "fp32")
    named = {"fp32": "torch", "fp16": "torch-fp16", "bf16": "torch-bf16"}
    narrow = [variant for variant in ("torch-fp16", "torch-bf16") if variant in variants]
    return named[options.gpu] if options.gpu else (narrow or ["torch"])[0]


def _report(outcome: "Outcome", options: argparse.Namespace) -> Path:
    from tutti.export import report

    path: Path = options.report or Path(f"{options.name}.export.html")
    report.write(outcome, path)
    return path


def _tell(outcome: "Outcome", label: str, options: argparse.Namespace) -> None:
    from tutti.export import commands

    for result in outcome.results:
        for comparison in result.comparisons:
            if comparison.cases:
                print(f"{label}: {comparison.graph} {comparison.variant}: equal to {result.reference}: {comparison}")
            else:
                built = f"built, not executed here: {comparison.precision} ({comparison.note})"
                print(f"{label}: {comparison.graph} {comparison.variant}: {built}")
        for variant, why in result.left_out.items():
            print(f"{label}: {result.graph.name} {variant}: left out: {why}")
    for check in outcome.checks:
        if "/" not in check.what:  # of single files there are many, and the report has them
            print(f"{label}: {check.what}: {check.why}")
    if outcome.accuracy is not None:
        print(f"{label}: held-out accuracy {outcome.accuracy:.3f}")
    if options.report is not None or outcome.measured:
        print(f"{label}: report: {_report(outcome, options)}")
    names = [path.name for path in outcome.published]
    print(f"{label}: published in {options.repository}: {', '.join(names)} ({outcome.seconds:.1f} s)")
    print("\n".join(commands.following(options.repository, names)))


if __name__ == "__main__":
    sys.exit(main())
