"""`tutti init`: from one model's file to a repository that serves it, proved by asking it.

The configuration is written for people: it says what each field does, and what was inferred. A checkpoint of Hugging
Face's is `tutti export`'s, which knows its tokenizer and verifies it; here it is only passed on.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tutti.console.arguments import Parser, shown, whole
from tutti.console.help_format import Help, examples
from tutti.console.progress import Work
from tutti.core import extras, file_kinds, paths
from tutti.core.errors import ConfigError, TuttiError, reason
from tutti.export import asking, existing, initial, layout, served
from tutti.export.draft import Draft
from tutti.export.errors import ExportError, first_line
from tutti.export.served import Staged
from tutti.repository import config, folders

# A model that is asked with zeros of these sizes where its dims are free; the first that works proves it.
_FREE_SIZES = (1, 8, 32, 224)
# Rows of a batch, to see that they are joined and taken apart.
_ROWS = 3
_EXTRAS = {"torch": "pytorch", "sklearn": "sklearn", "skl2onnx": "sklearn", "joblib": "sklearn", "onnx": "sklearn"}
# Names of files that say nothing of the model in them.
_NAMELESS = frozenset(["model", "best", "last", "checkpoint", "pytorch_model", "net", "network", "export", "exported"])


@dataclass(frozen=True, slots=True)
class Proof:
    """What a model was asked and answered, and a command for a shell that asks it."""

    told: str
    command: str


def main(arguments: Sequence[str]) -> int:
    """Make the repository, or say why not; returns the exit status: 0 only where the model has answered."""
    options = make_parser().parse_args(arguments)
    try:
        return _init(options)
    except (TuttiError, ExportError) as error:
        print(f"tutti init: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        advice = extras.install(extra) if extra else "the pickle is of it"
        print(f"tutti init: '{error.name}' is not installed: {advice}", file=sys.stderr)
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        print(f"tutti init: {where}{reason(error)}", file=sys.stderr)
    except Exception as error:  # what libraries raise on models that nobody here has seen
        problem = f"'{options.source}' is not covered, or something is wrong with it"
        print(f"tutti init: {problem}: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
    return 1


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tutti init",
        description="Make a repository of a model: write its configuration, load it, and ask it. A pickle executes "
        "what is in it: give your own only.",
        epilog=examples(
            "tutti init models classifier.onnx",
            "tutti init models net.pt --name pets --input x:FP32:3,224,224",
        ),
        formatter_class=Help,
    )
    parser.add_argument("repository", type=Path, help="the folder of models; made where there is none")
    parser.add_argument(
        "source",
        type=Path,
        help="an ONNX file, PyTorch's .pt2 or .pt, a pickle of scikit-learn's, or a checkpoint",
    )
    parser.add_argument("--name", metavar="NAME", help="of the model (default: the file's)")
    parser.add_argument(
        "--version", type=whole(1, 10**17), default=1, metavar="N", help="of the model (default: %(default)s)"
    )
    _add_serving(parser)
    return parser


def _add_serving(parser: argparse.ArgumentParser) -> None:
    """How it is to be served, and what may be written over."""
    parser.add_argument(
        "--max-batch-size",
        type=whole(0),
        metavar="ROWS",
        help="rows that are joined; 0 for none (default: 8 where a batch works)",
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME:TYPE:DIMS",
        help="of TorchScript, which does not tell, as x:FP32:3,224,224, without the batch; repeat for more (default: "
        "what the file tells)",
    )
    parser.add_argument(
        "--python",
        action="store_true",
        help="serve a pickle as it is, with scikit-learn, and not as ONNX (default: only where ONNX answers otherwise)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="write over a version that is there; its configuration stays where it fits, or is put beside (default: "
        "refuse to)",
    )


def _init(options: argparse.Namespace) -> int:
    source: Path = options.source
    if not source.is_dir() and not source.is_file():
        hint = f": {file_kinds.of(source)}" if os.path.lexists(source) else paths.meant(source)
        raise ExportError(f"no file {shown(source)}{hint}")
    name = _name_of(source) if options.name is None else options.name
    if not folders.is_name(name):
        raise ExportError(f"--name: expected what a folder can be called, got {shown(name)}")
    paths.check_writable(options.repository)
    target = options.repository / name
    kept = _kept(target, options)
    if source.is_dir() and (source / "config.json").is_file():
        return _export(source, name, options)
    with tempfile.TemporaryDirectory(prefix="tutti-init-") as work:
        with Work(f"tutti init: {name}") as progress:
            draft, proof, why_not = _proved(source, name, Path(work), options, kept, progress)
        moved = _publish(Path(work) / "models" / name, target, bool(kept) and not why_not)
    _tell(draft, proof, target, options)
    if moved is not None:
        print(f"{target}/config.pbtxt is a new one, the old one is beside it as {moved.name}: {why_not}")
    elif kept:
        print(f"{target}/config.pbtxt is as it was: change it there")
        print("the newest version is served, all with: version_policy { all { } }")
    if options.name is None and source.name.partition(".")[0].lower() in _NAMELESS:
        print(f"it is called '{name}' after its folder: --name gives another")
    return 0


def _kept(target: Path, options: argparse.Namespace) -> list[Path]:
    """The files beside the versions, as the configuration: they may have been edited, and versions go by them.

    Raises ExportError where something would be written over.
    """
    if not target.exists():
        return []
    version = target / str(options.version)
    if not (target / "config.pbtxt").is_file():
        if options.force:
            return []
        raise ExportError(f"'{target}' exists, and has no config.pbtxt; --force writes over it, --name gives another")
    if version.exists() and not options.force:
        ways = "--force writes over it, --version adds another, --name gives another model"
        raise ExportError(f"'{version}' exists; {ways}")
    return [path for path in target.iterdir() if path.is_file()]


def _name_of(source: Path) -> str:
    stem = source.stem if source.is_file() else source.name
    if initial.is_packed_pickle(source):
        stem = Path(stem).stem
    if stem.lower() in _NAMELESS:
        stem = source.resolve().parent.name
    return re.sub(r"[^\w.+-]", "_", stem).strip("._-") or "model"


def _export(source: Path, name: str, options: argparse.Namespace) -> int:
    """Let `tutti export` do it, which verifies the whole pipeline."""
    from tutti.export import cli

    for flag, value in (
        ("--input", options.input),
        ("--max-batch-size", options.max_batch_size),
        ("--python", options.python),
    ):
        if value:
            raise ExportError(f"{flag} is of files, and '{source}' is a checkpoint: its configuration says that")
    kind = initial.checkpoint_kind(source)
    print(f"'{source}' is a checkpoint: tutti export {kind} {source} --name {name} --repository {options.repository}")
    arguments = [
        kind,
        str(source),
        "--name",
        name,
        "--repository",
        str(options.repository),
        "--version",
        str(options.version),
    ]
    return cli.main(arguments)


def _proved(
    source: Path, name: str, work: Path, options: argparse.Namespace, kept: Sequence[Path], progress: Work
) -> tuple[Draft, Proof, str]:
    """What is to be published, how it was proved, and why not with the configuration that is there.

    Without a batch where it fails with one.
    """
    progress.step(f"read {source}", total=2)
    in_python = options.python or (initial.is_pickle(source) and _backend_before(kept) == "python")
    draft = initial.read(source, name, work, options.input, options.max_batch_size, in_python)
    progress.step("load it and ask it")
    why_not = ""
    if kept:
        target = kept[0].parent
        try:
            return *_proved_as_before(draft, name, work, options, kept), ""
        except (ExportError, ConfigError) as error:
            why_not = "; ".join([*existing.differences(target / "config.pbtxt", draft), str(error)])
        others = existing.other_versions(target, options.version)
        if not options.force or others:
            raise ExportError(existing.refusal(target, why_not, others, options.version))
    try:
        return draft, _prove(draft, name, work, options.version, []), why_not
    except ExportError as error:
        other = _otherwise(draft, error, options.max_batch_size)
        if other is None:
            raise
        return other, _prove(other, name, work, options.version, []), why_not


def _backend_before(kept: Sequence[Path]) -> str:
    """Of the model that is there; "" where there is none, or none that can be read."""
    try:
        return config.load(kept[0].parent / "config.pbtxt").backend if kept else ""
    except ConfigError:
        return ""


def _proved_as_before(
    draft: Draft, name: str, work: Path, options: argparse.Namespace, kept: Sequence[Path]
) -> tuple[Draft, Proof]:
    """With the files beside the versions as they are. Raises ExportError, or ConfigError, where they do not fit."""
    before = config.load(kept[0].parent / "config.pbtxt")
    if draft.backend != before.backend:
        raise ExportError(
            f"{draft.backend} serves it ({'; '.join(draft.notes)}), and the configuration is of {before.backend}"
        )
    if options.max_batch_size not in (None, before.max_batch_size):
        raise ExportError(
            f"--max-batch-size {options.max_batch_size}: the configuration that is there has {before.max_batch_size}"
        )
    draft = _as_before(draft, before.max_batch_size)
    return draft, _prove(draft, name, work, options.version, kept)


def _as_before(draft: Draft, most: int) -> Draft:
    is_alone = draft.max_batch_size and not most
    return draft.unbatched("as before") if is_alone else replace(draft, max_batch_size=most)


def _otherwise(draft: Draft, error: ExportError, most: int | None) -> Draft | None:
    """The model as it may be served where it fails like this: in Python, or each request alone."""
    if draft.otherwise is not None:
        other = draft.otherwise(str(error))
        return other if most is None else _as_before(other, most)
    if not draft.max_batch_size or most is not None:
        return None
    return draft.unbatched(f"with {_ROWS} rows at a time it fails: {error}")


def _prove(draft: Draft, name: str, work: Path, version: int, kept: Sequence[Path]) -> Proof:
    """Write the model into work/models, load it and ask it. Raises ExportError."""
    folder = work / "models" / name
    shutil.rmtree(folder, ignore_errors=True)
    draft.write(folder, version)
    for path in kept:
        shutil.copy(path, folder)
    with served.staged(work / "models") as models:
        failures = []
        for size in _FREE_SIZES if draft.has_free_sizes else _FREE_SIZES[:1]:
            try:
                return Proof(_asked(models, draft, name, size), asking.command(name, draft.example(size, 1), draft))
            except ExportError as error:
                failures.append(error)
        raise failures[0]


def _asked(models: Staged, draft: Draft, name: str, size: int) -> str:
    models.ask(name, draft.example(size, 1))  # the first request pays for what is made at the first
    start = time.monotonic()
    answer = models.ask(name, draft.example(size, 1))
    took_ms = 1e3 * (time.monotonic() - start)
    shapes = ", ".join(f"{output} {list(array.shape)}" for output, array in answer.items())
    told = [f"asked with {draft.asked_with}, it answered in {took_ms:.1f} ms: {shapes}"]
    if draft.max_batch_size >= _ROWS:
        models.ask(name, draft.example(size, _ROWS))
        told.append(f"and with {_ROWS} rows")
    if draft.check is not None:
        told.append(draft.check(draft, partial(models.ask, name)))
    return "; ".join(told)


def _publish(model: Path, target: Path, keeps_files: bool) -> Path | None:
    """Put the model where it belongs: a server that polls never sees half of it. Other versions stay.

    Where `keeps_files` the version alone, and all beside it stays as it is. Returns where an old configuration is now.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    moved: Path | None = None
    with tempfile.TemporaryDirectory(prefix=".tutti-init-", dir=target.parent) as folder:
        staged = Path(folder) / "model"
        shutil.copytree(model, staged)
        if not target.exists():
            staged.rename(target)
            return None
        if not keeps_files and (target / "config.pbtxt").is_file():
            moved = layout.put_beside(target / "config.pbtxt")
        for new in staged.iterdir():
            if keeps_files and new.is_file():
                continue
            place = target / new.name
            if place.is_dir():
                place.rename(Path(folder) / "old")
            new.rename(place)
    return moved


def _tell(draft: Draft, proof: Proof, target: Path, options: argparse.Namespace) -> None:
    print(f"{options.source} -> {target}/{options.version}/{draft.filename} ({draft.backend})")
    for label, fields in (("input", draft.inputs), ("output", draft.outputs)):
        for field in fields:
            print(f"  {label:6} {field.name}  {field.datatype}  {list(field.dims) or [1]}")
    print(f"  batch  {f'up to {draft.max_batch_size} rows' if draft.max_batch_size else 'none'}")
    for note in draft.notes:
        print(f"  note: {note}")
    print(f"{proof.told}\n\nserve it:  tutti serve {options.repository}\nask it:    {proof.command}")
