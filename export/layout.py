"""Into the repository: config.pbtxt from the saved graph, labels, and the version folder, renamed into place whole."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from export.errors import ExportError
from tutti import config, dtypes
from tutti.config import TensorSpec

STEPS = Path(__file__).parent / "steps"
_HEADER = "# Written by `tutti export`.\n"


@dataclass(frozen=True, slots=True)
class Entry:
    """One model to publish. `files` go into the version folder, by name; `labels` are one output's class names."""

    name: str
    backend: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    files: Mapping[str, Path]
    max_batch_size: int = 32
    parameters: Mapping[str, str] = field(default_factory=dict)
    labels: Sequence[str] = ()
    platform: str = ""

    def config_text(self) -> str:
        """config.pbtxt. Raises ConfigError if the server would refuse it."""
        proto = pb.ModelConfig(name=self.name, max_batch_size=self.max_batch_size)
        if self.platform:
            proto.platform = self.platform
        else:
            proto.backend = self.backend
        proto.input.extend(_tensor(pb.ModelInput, spec) for spec in self.inputs)
        proto.output.extend(_tensor(pb.ModelOutput, spec) for spec in self.outputs)
        if self.labels:
            proto.output[0].label_filename = "labels.txt"
        if self.max_batch_size:
            proto.dynamic_batching.SetInParent()
        for key, value in sorted(self.parameters.items()):
            proto.parameters[key].string_value = value
        text: str = _HEADER + text_format.MessageToString(proto)
        config.parse(text, self.name)
        return text


def _tensor(kind: Any, spec: TensorSpec) -> Any:
    return kind(name=spec.name, data_type=pb.DataType.Value(dtypes.to_config(spec.datatype)), dims=spec.dims)


def step_file(name: str) -> Path:
    """The model.py of one of the python steps that come with the export scripts."""
    return STEPS / f"{name}.py"


def publish(repository: Path, entries: Iterable[Entry], version: int = 1) -> list[Path]:
    """Write every entry, or none if one is wrong; returns the model folders."""
    prepared = [(entry, entry.config_text()) for entry in entries]
    for entry, _ in prepared:
        missing = [str(path) for path in entry.files.values() if not path.is_file()]
        if missing:
            raise ExportError(f"model '{entry.name}': missing files {missing}")
    return [_publish(repository, entry, text, version) for entry, text in prepared]


def _publish(repository: Path, entry: Entry, text: str, version: int) -> Path:
    folder = repository / entry.name
    folder.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".build-", dir=folder))
    try:
        building.chmod(0o755)
        for name, source in entry.files.items():
            shutil.copyfile(source, building / name)
        _replace_folder(building, folder / str(version))
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if entry.labels:
        _replace_file(folder / "labels.txt", "".join(f"{label}\n" for label in entry.labels))
    _replace_file(folder / "config.pbtxt", text)
    return folder


def _replace_folder(new: Path, place: Path) -> None:
    old = place.with_name(f".old-{place.name}")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _replace_file(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
