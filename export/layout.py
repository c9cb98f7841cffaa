"""Into the repository: config.pbtxt from the saved graph, labels, the version folder; built apart, then moved in whole.

A server that polls sees a model as it was or as it is: its folder is exchanged in one step of the file system.
"""

import ctypes
import hashlib
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from tutti.core import dtypes
from tutti.core.types import Shape
from tutti.export.errors import ExportError
from tutti.repository import config
from tutti.repository.model_config import TensorSpec

STEPS = Path(__file__).parent / "steps"
# With a sum of what follows, by which an edited one is known.
_HEADER = "# Written by `tutti export` ({}); what was edited is put beside by the next.\n"
_WRITTEN = re.compile(r"# Written by `tutti export` \((\w+)\).*\n")
_MAX_QUEUED = 16_384
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


@dataclass(frozen=True, slots=True)
class Warmup:
    """A request that is executed when the model is loaded: shapes of its inputs, without the batch axis."""

    batch_size: int
    shapes: Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Link:
    """A step of an ensemble: its model's tensors -> the ensemble's."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """One model to publish. `files` go into the version folder, by name; `labels` are the first output's class names.

    One with `links` is an ensemble.
    """

    name: str
    backend: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    files: Mapping[str, Path]
    max_batch_size: int = 32
    parameters: Mapping[str, str] = field(default_factory=dict)
    labels: Sequence[str] = ()
    links: Sequence[Link] = ()
    warmups: Sequence[Warmup] = ()
    preferred: Sequence[int] = ()
    filename: str = ""
    kind: str = "KIND_AUTO"

    def config_text(self) -> str:
        """config.pbtxt. Raises ConfigError if the server would refuse it."""
        proto = pb.ModelConfig(name=self.name, max_batch_size=self.max_batch_size)
        if self.links:
            proto.platform = "ensemble"
        else:
            proto.backend = self.backend
        if self.filename:
            proto.default_model_filename = self.filename
        proto.input.extend(_tensor(pb.ModelInput, spec) for spec in self.inputs)
        proto.output.extend(_tensor(pb.ModelOutput, spec) for spec in self.outputs)
        if self.labels:
            proto.output[0].label_filename = "labels.txt"
        for link in self.links:
            proto.ensemble_scheduling.step.add(
                model_name=link.model, model_version=-1, input_map=link.inputs, output_map=link.outputs
            )
        if not self.links:
            proto.version_policy.latest.num_versions = 1
            proto.instance_group.add(count=1, kind=pb.ModelInstanceGroup.Kind.Value(self.kind))
            if self.max_batch_size:
                batching = proto.dynamic_batching
                batching.preferred_batch_size.extend(self.preferred)
                batching.max_queue_delay_microseconds = 0  # a batch forms while the one before it is executed
                batching.default_queue_policy.max_queue_size = _MAX_QUEUED
        for number, warmup in enumerate(self.warmups):
            self._add_warmup(proto.model_warmup.add(), number, warmup)
        # The steps that come with the export are known to be well-behaved: a process of their own would only cost time.
        parameters = {"tutti.isolate": "no"} if self.backend == "python" else {}
        for key, value in sorted({**parameters, **self.parameters}.items()):
            proto.parameters[key].string_value = value
        body: str = text_format.MessageToString(proto)
        text = _HEADER.format(_sum(body)) + body
        config.parse(text, self.name)
        return text

    def _add_warmup(self, proto: Any, number: int, warmup: Warmup) -> None:
        proto.name = f"bucket_{number}"
        proto.batch_size = warmup.batch_size
        for spec in self.inputs:
            warmed = proto.inputs[spec.name]
            warmed.data_type = pb.DataType.Value(dtypes.to_config(spec.datatype))
            warmed.dims.extend(warmup.shapes[spec.name])
            warmed.zero_data = True


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_edited(text: str) -> bool:
    """Whether a configuration of ours is no longer as it was written; of older exports nobody knows."""
    match = _WRITTEN.match(text)
    return match is not None and _sum(text[match.end() :]) != match[1]


def put_beside(path: Path) -> Path:
    """Give a file the first free name that says that it was there before."""
    names = (f"{path.name}.before{f'-{number}' if number > 1 else ''}" for number in itertools.count(1))
    place = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.rename(place)
    return place


def _tensor(kind: Any, spec: TensorSpec) -> Any:
    return kind(name=spec.name, data_type=pb.DataType.Value(dtypes.to_config(spec.datatype)), dims=spec.dims)


def step_file(name: str) -> Path:
    """The model.py of one of the python steps that come with the export scripts."""
    return STEPS / f"{name}.py"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Staging:
    """Models on their way into a repository: in a folder beside it, on the same file system."""

    def __init__(self, repository: Path) -> None:
        """Folders that runs which were killed have left are removed."""
        self._repository = repository
        place = repository.absolute().parent
        prefix = f".{repository.absolute().name}.export-"
        place.mkdir(parents=True, exist_ok=True)
        for left in place.glob(f"{prefix}*"):
            if not _is_alive(left.name.removeprefix(prefix)):
                shutil.rmtree(left, ignore_errors=True)
        self.folder = place / f"{prefix}{os.getpid()}"

    def __enter__(self) -> "Staging":
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, entries: Iterable[Entry], version: int = 1) -> list[Path]:
        """Build every entry, or none if one is wrong; returns the model folders here.

        Other versions that the repository has of a model are kept, and a configuration that was edited is, beside.
        """
        prepared = [(entry, entry.config_text()) for entry in entries]
        for entry, _ in prepared:
            missing = [str(path) for path in entry.files.values() if not path.is_file()]
            if missing:
                raise ExportError(f"model '{entry.name}': missing files {missing}")
        return [self._add(entry, text, version) for entry, text in prepared]

    def _add(self, entry: Entry, text: str, version: int) -> Path:
        folder, old = self.folder / entry.name, self._repository / entry.name
        if old.is_dir():
            shutil.copytree(old, folder, copy_function=_link)
        place = folder / str(version)
        for stale in place.glob("[!.]*") if place.is_dir() else ():
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        place.mkdir(parents=True, exist_ok=True)
        for name, source in entry.files.items():
            shutil.copyfile(source, place / name)
        if entry.labels:
            _write(folder / "labels.txt", "".join(f"{label}\n" for label in entry.labels))
        path = folder / "config.pbtxt"
        if path.is_file() and is_edited(path.read_text(encoding="utf-8", errors="replace")):
            put_beside(path)
        _write(path, text)
        return folder

    def publish(self) -> list[Path]:
        """Move every model into the repository, in the order in which they were added."""
        self._repository.mkdir(parents=True, exist_ok=True)
        published = []
        for folder in sorted(self.folder.iterdir(), key=lambda version: version.stat().st_ctime_ns):
            _flush(folder)
            place = self._repository / folder.name
            _move(folder, place)
            published.append(place)
        _flush_folder(self._repository)
        return published


def publish(repository: Path, entries: Iterable[Entry], version: int = 1) -> list[Path]:
    """Write every entry, or none if one is wrong; returns the model folders."""
    with Staging(repository) as staging:
        staging.add(entries, version)
        return staging.publish()


def _link(source: str, target: str) -> None:
    """Files are replaced, never written to: versions that stay need no copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)  # it may be a link to what the repository has
    path.write_text(text, encoding="utf-8")


def _flush(folder: Path) -> None:
    """To the disk, before anybody may see it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _flush_folder(path)


def _flush_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _move(new: Path, place: Path) -> None:
    """`new` takes the place of what is there, in one step where the system can."""
    if not place.exists():
        new.rename(place)
        return
    if _exchange(new, place):
        shutil.rmtree(new)
        return
    old = new.with_name(f".old-{new.name}")
    place.rename(old)
    new.rename(place)
    shutil.rmtree(old)


def _exchange(first: Path, other: Path) -> bool:
    """Whether the system has exchanged two folders: Linux can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_HERE, os.fsencode(first), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ValueError:
        return True  # not one of ours
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
