"""What an export was made of and with: manifest.json in every version folder, and the key by which a rerun is told."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tutti.export import layout
from tutti.export.sources import Source
from tutti.export.variants import Built

NAME = "manifest.json"
_LIBRARIES = (
    "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy", "tokenizers", "tensorrt",
    "tensorrt-rtx-cu13-libs",
)  # fmt: skip


def libraries() -> dict[str, str]:
    """Versions of what an export is made with."""
    files = {}
    for name in _LIBRARIES:
        try:
            files[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return files


def key(source: Source, options: Mapping[str, Any]) -> str:
    """Of equal inputs: the source's content, the options, the libraries, and these scripts themselves."""
    facts = {
        "source": source.content(),
        "options": {name: str(value) for name, value in sorted(options.items())},
        "libraries": libraries(),
        "scripts": _scripts(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _scripts() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def describe(
    source: Source,
    own_key: str,
    models: Sequence[str],
    built: Sequence[Built],
    files: Mapping[str, Path],
    provenance: str,
    reference: str,
) -> str:
    """manifest.json of one model; `models` are all of the export."""
    manifest = {
        "key": own_key,
        "models": list(models),
        "source": {"given": source.given, "revision": source.revision(), "content": source.content()},
        "provenance": provenance,
        "libraries": libraries(),
        "reference": reference,
        "files": {name: {"sha256": layout.sha256(path), "bytes": path.stat().st_size} for name, path in files.items()},
        "variants": {variant.variant: _variant(variant) for variant in built},
    }
    return json.dumps(manifest, indent=1) + "\n"


def _variant(built: Built) -> dict[str, Any]:
    facts = asdict(built.comparison)
    return {name: facts[name] for name in facts if name not in ("graph", "variant", "worst", "failures")}


def unchanged(repository: Path, own_key: str, version: int) -> list[str]:
    """The models of an export with this key, if all of them are as it left them; none otherwise."""
    wanted: list[str] = []
    names: set[str] = set()
    for path in repository.glob(f"*/{version}/{NAME}"):
        manifest = json.loads(path.read_text())
        if manifest.get("key") == own_key and all(
            _is_as_told(path.parent / name, told) for name, told in manifest["files"].items()
        ):
            wanted = manifest["models"]
            names.add(path.parents[1].name)
    return wanted if wanted and names.issuperset(wanted) else []


def _is_as_told(file: Path, told: Mapping[str, Any]) -> bool:
    return file.is_file() and layout.sha256(file) == told["sha256"]
