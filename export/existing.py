"""What a folder of a model has already: its configuration, which a person may have edited, and its other versions.

Says how a model differs from a configuration, and why it cannot go by it.
"""

from collections.abc import Sequence
from pathlib import Path

from tutti.core.errors import ConfigError
from tutti.export.draft import Draft, Field, Shape
from tutti.repository import config
from tutti.repository.model_config import TensorSpec


def differences(path: Path, draft: Draft) -> list[str]:
    """Where the model's tensors are not those of a configuration, or another backend is meant; none where it is none.

    Sizes that are free on either side fit all.
    """
    try:
        known = config.load(path)
    except ConfigError:
        return []
    problems = []
    if known.backend and known.backend != draft.backend:
        problems.append(f"backend: '{known.backend}' there, the file is of '{draft.backend}'")
    is_batched = (known.max_batch_size > 0) == (draft.max_batch_size > 0)
    for kind, there, fields in (("input", known.inputs, draft.inputs), ("output", known.outputs, draft.outputs)):
        problems += _of_tensors(kind, there, fields, is_batched)
    return problems


def _of_tensors(kind: str, there: Sequence[TensorSpec], fields: Sequence[Field], is_batched: bool) -> list[str]:
    known, tensors = {tensor.name: tensor for tensor in there}, {one.name: one for one in fields}
    problems = [f"{kind} '{name}': the file has none" for name in known if name not in tensors]
    if kind == "input":  # outputs may be left out
        problems += [f"{kind} '{name}': the configuration has none" for name in tensors if name not in known]
    for name in sorted(tensors.keys() & known.keys()):
        old, new = known[name], tensors[name]
        if old.datatype != new.datatype or (is_batched and not _fit(old.model_dims, new.dims)):
            there_is, it_has = list(old.model_dims), list(new.dims)
            problems.append(f"{kind} '{name}': {old.datatype} {there_is} there, {new.datatype} {it_has} in the file")
    return problems


def _fit(old: Shape, new: Shape) -> bool:
    return len(old) == len(new) and all(a == b or -1 in (a, b) for a, b in zip(old, new, strict=True))


def other_versions(target: Path, version: int) -> list[str]:
    """Those that go by the same configuration."""
    names = [
        folder.name
        for folder in target.iterdir()
        if folder.is_dir() and folder.name.isascii() and folder.name.isdecimal()
    ]
    return sorted((name for name in names if int(name) != version), key=int)


def refusal(target: Path, why: str, others: Sequence[str], version: int) -> str:
    """Why a model cannot be a version beside others, and what to do."""
    problem = f"'{target}/config.pbtxt' stays as it is, and version {version} does not fit it: {why}"
    if others:
        some = f"version {others[0]} goes" if len(others) == 1 else f"versions {', '.join(others)} go"
        return f"{problem}; {some} by it: --name gives the new one a model of its own"
    return f"{problem}; --force writes another and puts that beside, --name gives another model"
