"""What is installed of what tutti can use, and the command that installs the rest.

The name `tutti` belongs to somebody else on the package index: a command that names it would install their package. So
the libraries are named themselves, as this project's own metadata has them.
"""

import re

# Both wheels install the module onnxruntime.
SWAP_ONNXRUNTIME = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
TWO_ONNXRUNTIMES = (
    "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
    f"{SWAP_ONNXRUNTIME} (or onnxruntime, to serve on the processor)"
)
_NAME = re.compile(r"[\w.-]+")
_EXTRA = re.compile(r"""extra == ["']([\w-]+)["']""")


def version(distribution: str) -> str:
    """Of what is installed under this name; "" for none."""
    import importlib.metadata as metadata  # costs more than most starts need

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def folder(distribution: str) -> str:
    """Where it is installed; "" where it is not."""
    import importlib.metadata as metadata

    try:
        return str(metadata.distribution(distribution).locate_file(""))
    except metadata.PackageNotFoundError:
        return ""


def requirements(extra: str) -> list[str]:
    """Of an extra of this project, as in its metadata; none where that is not installed, or somebody else's."""
    import importlib.metadata as metadata

    try:
        lines = metadata.requires("tutti") or []
    except metadata.PackageNotFoundError:
        return []
    split = [line.partition(";") for line in lines]
    return [text.strip() for text, _, marker in split if extra in _EXTRA.findall(marker)]


def missing(extra: str) -> list[str]:
    """Those of its requirements that are not installed."""
    return [text for text in requirements(extra) if not version(_NAME.findall(text)[0])]


def install(extra: str) -> str:
    """A command for a shell that installs what is missing of an extra.

    A requirement with extras of its own is named in any case: that it is installed does not say that they are.
    """
    absent = missing(extra)
    chosen = [text for text in requirements(extra) if text in absent or "[" in text] or requirements(extra)
    if not chosen:
        return f"pip install -e '.[{extra}]', where tutti's pyproject.toml is"
    return "pip install " + " ".join(f"'{text}'" for text in chosen)


def has_two_onnxruntimes() -> bool:
    """That both wheels of ONNX Runtime are in one folder: neither is whole then."""
    return "" != folder("onnxruntime") == folder("onnxruntime-gpu")
