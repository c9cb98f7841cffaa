"""The backends there are: a record for each, which holds what is known of it before its library is imported.

A backend is a module with a `load`, and a record. Those of tutti are the table at the end of this file. Those of other
distributions are entry points of the group `tutti.backends`, whose values are records: they are looked up once, when a
configuration first names a backend that is not in the table. Knows no library and no model.
"""

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tutti.core import file_kinds, files
from tutti.core.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "tutti.backends"
GpuUse = Literal["asked", "preferred", "required"]
"""On which GPUs instances are placed whose group says nothing: on none, on those that are there, or it has to."""


@dataclass(frozen=True, slots=True)
class BackendRecord:
    """What a repository, a planner and a server know of a backend. Its `module` is imported when a model is loaded.

    The module has `load(folder, version, infer) -> list[Backend]`, one for each instance; and
    `complete(proto, path)`, if `completes` is given, which fills in what a ModelConfig message leaves out and the
    file of the newest version tells.
    """

    name: str
    module: str
    # What it loads where a configuration names no file, the usual one first. Without any it needs no file.
    filenames: tuple[str, ...] = ()
    # By which a configuration may name it instead, and what metadata shows; by default metadata shows the name.
    platform: str = ""
    # Whether a configuration is shown with the platform where it names the backend: as in Triton, for ONNX alone.
    shows_platform: bool = False
    # A batch's requests are executed as one, row for row. Others get a batch as a list of requests.
    joins_rows: bool = False
    gpus: GpuUse = "asked"
    # Whether `complete` has anything to say of this message and file. A model of such a backend needs no config.pbtxt.
    completes: Callable[[Any, Path], bool] | None = None
    # Those that it reads of a configuration's parameters; one that ends in "." stands for all that begin so. Others
    # are refused, but for tutti's own. None: its models read what they like.
    parameters: tuple[str, ...] | None = None
    # Why it cannot load a file, to stand after the file's name; "" where it may. Asked before the library is imported.
    mistaken: Callable[[Path], str] = file_kinds.unfetched
    # Suffixes of files that are models of this backend -> the name they should have.
    suffixes: Mapping[str, str] = field(default_factory=dict)
    # Modules that may be missing -> the extra of its distribution that brings them.
    extras: Mapping[str, str] = field(default_factory=dict)
    # A model may make its outputs of nothing.
    needs_inputs: bool = True
    # Takes KIND_MODEL: the model itself chooses its devices.
    chooses_devices: bool = False


def find(name: str, model: str) -> BackendRecord | None:
    """The backend of this name; None where there is none. `model` is the one that names it.

    Raises ConfigError naming model, distribution and exception where an installed distribution's is broken.
    """
    if name in BUILT_IN or not name:
        return BUILT_IN.get(name)
    points = _entry_points().get(name)
    if points is None:
        return None
    record = _loaded(name)
    if isinstance(record, str):
        raise ConfigError(f"model '{model}': backend: '{name}': {record}")
    return record


def known(name: str, model: str) -> BackendRecord:
    """As `find`; raises ConfigError with those there are where there is none."""
    record = find(name, model)
    if record is None:
        raise ConfigError(f"model '{model}': backend: '{name}' is not one of {_choice(name)}")
    return record


def of_platform(platform: str) -> BackendRecord | None:
    """The backend of tutti's that a configuration names by its platform."""
    return next((record for record in BUILT_IN.values() if platform and record.platform == platform), None)


def installed() -> dict[str, str]:
    """Names of other distributions' backends -> the distributions, with versions."""
    return {name: _distributions(points) for name, points in sorted(_entry_points().items()) if name not in BUILT_IN}


def shadowed() -> dict[str, str]:
    """The same of those that nobody can name, since tutti has one of the name."""
    return {name: _distributions(points) for name, points in sorted(_entry_points().items()) if name in BUILT_IN}


def broken(name: str) -> str:
    """Why an installed backend cannot be used; "" where it can."""
    record = _loaded(name)
    return record if isinstance(record, str) else ""


def distribution(name: str) -> str:
    """The distribution that an installed backend is of; "" for tutti's own."""
    points = () if name in BUILT_IN else _entry_points().get(name, ())
    return next((point.dist.name for point in points if point.dist is not None), "")


def _choice(name: str) -> str:
    """What there is in the place of a backend that there is not."""
    others = installed()
    text = ", ".join([*BUILT_IN, *(f"{other} (of {distribution})" for other, distribution in others.items())])
    near = difflib.get_close_matches(name.lower(), [*BUILT_IN, *others], 1)
    return f"{text}; did you mean '{near[0]}'?" if near else text


@functools.cache
def _entry_points() -> Mapping[str, tuple["EntryPoint", ...]]:
    """By name: the same of two distributions cannot be told apart."""
    from importlib import metadata  # costs more than most starts need

    points: dict[str, tuple[EntryPoint, ...]] = {}
    for point in metadata.entry_points(group=GROUP):
        points[point.name] = (*points.get(point.name, ()), point)
    return points


@functools.cache
def _loaded(name: str) -> BackendRecord | str:
    """The record of an entry point, or what is wrong with it."""
    points = _entry_points()[name]
    if len(points) > 1:
        return f"{_distributions(points)} are installed, and each has one of this name: uninstall all but one"
    where = f"entry point '{points[0].value}' of {_distributions(points)}"
    try:
        record = points[0].load()
    except (Exception, SystemExit) as error:  # it is not ours, and may do whatever it likes
        return f"{where} cannot be loaded: {type(error).__name__}: {error}"
    if not isinstance(record, BackendRecord):
        return f"{where} is a {type(record).__name__}: expected a BackendRecord"
    if record.name != name:
        return f"{where} is the record of '{record.name}': expected the entry point's name"
    return record


def _distributions(points: Iterable["EntryPoint"]) -> str:
    return " and ".join(f"{point.dist.name} {point.dist.version}" for point in points if point.dist is not None)


def lacks_tensors(proto: Any, path: Path) -> bool:
    """For `completes`: whether a configuration leaves out inputs or outputs."""
    return not proto.input or not proto.output


def _is_no_model(path: Path) -> str:
    mistake = file_kinds.mistaken_for_model(path)
    return f"is {mistake}" if mistake else ""


def _is_no_program(path: Path) -> str:
    return _is_no_model(path) or file_kinds.mistaken_for_program(path)


def _completes_itself(proto: Any, path: Path) -> bool:
    return b"auto_complete_config" in files.read_bytes(path)


BUILT_IN: Mapping[str, BackendRecord] = {
    record.name: record
    for record in (
        BackendRecord(
            "onnxruntime", "tutti.backends.onnxruntime", ("model.onnx",), "onnxruntime_onnx",
            shows_platform=True, joins_rows=True, gpus="preferred", completes=lacks_tensors,
            mistaken=_is_no_model, suffixes={".onnx": "model.onnx"},
            parameters=(
                "intra_op_thread_count", "inter_op_thread_count", "execution_mode", "enable_mem_arena",
                "enable_mem_pattern", "session.", "cudnn_conv_algo_search", "gpu_mem_limit", "arena_extend_strategy",
                "do_copy_in_default_stream",
            ),
        ),
        BackendRecord(
            "pytorch", "tutti.backends.pytorch", ("model.pt", "model.pt2"), "pytorch_libtorch",
            joins_rows=True, gpus="preferred", mistaken=_is_no_program,
            suffixes={".pt": "model.pt", ".pth": "model.pt", ".pt2": "model.pt2"}, extras={"torch": "pytorch"},
            parameters=("INTRA_OP_THREAD_COUNT", "INTER_OP_THREAD_COUNT", "INFERENCE_MODE"),
        ),
        BackendRecord(
            "tensorrt", "tutti.backends.tensorrt", ("model.plan",), "tensorrt_plan",
            joins_rows=True, gpus="required", mistaken=_is_no_model,
            suffixes={".plan": "model.plan", ".engine": "model.plan"},
            extras={"torch": "pytorch", "tensorrt": "tensorrt"}, parameters=(),
        ),
        BackendRecord(
            "python", "tutti.backends.python.loading", ("model.py",),
            completes=_completes_itself, mistaken=_is_no_model, needs_inputs=False, chooses_devices=True,
        ),
    )
}  # fmt: skip
