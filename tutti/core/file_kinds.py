"""What a file is that is not what its name says, by its first bytes. Knows no model.

A download that failed leaves a page, an error, or nothing; a clone without Git LFS leaves pointers.
"""

import re
import zipfile
from pathlib import Path

from tutti.core import files

_ENOUGH_BYTES = 1024
# What torch.export.save puts into its archive, now and before.
OF_EXPORTED = ("models/model.json", "serialized_exported_program.json")
EXPORT_IT = (
    "load it into its module in Python, and save what torch.export.export(module, example) gives with "
    "torch.export.save as .pt2"
)
_ZIP = "a zip archive"
_POINTER = "a pointer of Git LFS"
_LFS = b"version https://git-lfs.github.com/spec/"
# What no model begins with. The order matters: the first that fits is told.
_STRANGERS: tuple[tuple[str, str], ...] = (
    (r"\s*<(!doctype html|html|head|body)", "a page of HTML, as a download that failed leaves it"),
    (r"\s*<\?xml", "XML, as an object store's errors are"),
    (r"\x89PNG\r\n", "a picture (PNG)"),
    (r"\xff\xd8\xff", "a picture (JPEG)"),
    (r"GIF8", "a picture (GIF)"),
    (r"%PDF-", "a PDF"),
    (r"RIFF.{4}WAVE", "a sound (WAV)"),
    (r"\x1f\x8b", "packed with gzip, as .tar.gz files are: unpack it"),
    (r"BZh[1-9]", "packed with bzip2: unpack it"),
    (r"\xfd7zXZ\x00", "packed with xz: unpack it"),
    (r"(\xff\xfe|\xfe\xff)", "a text in UTF-16"),
    (r".{257}ustar", "a tar archive: unpack it"),
    (r"\x93NUMPY", "an array of NumPy's"),
    (r"\x89HDF\r\n", "HDF5, as Keras has weights: convert it to ONNX"),
    (r".{4}TFL3", "a model of TensorFlow Lite's: convert it to ONNX"),
    (r"GGUF", "a model of llama.cpp's (GGUF), for which there is no backend here"),
    (r".{8}\{\s*\"", "weights without a program (safetensors)"),
    (r"PK\x03\x04", _ZIP),
    (r"\x80[\x02-\x05].", "a pickle of Python's"),
    (r"\x7fELF", "a program or a library (ELF)"),
)
_MAY_BE_MODELS = ("", "a text", _ZIP, "a pickle of Python's", "a program or a library (ELF)")
_PATTERNS = tuple(
    (re.compile(pattern.encode("latin-1"), re.DOTALL | re.IGNORECASE), what) for pattern, what in _STRANGERS
)


def said(head: bytes) -> str:
    """What begins so, as part of a sentence; "" where that is not known."""
    if not head:
        return "empty"
    if head.startswith(_LFS):
        return f"{_POINTER} and not the file: 'git lfs pull' fetches it"
    if not head.strip(b"\0"):
        return "nothing but zeros, as a file is that was not written to the end"
    for pattern, kind in _PATTERNS:
        if pattern.match(head):
            return kind
    return "a text" if _is_text(head) else ""


def of(path: Path) -> str:
    """The same of a file; why it cannot be read, where it cannot."""
    try:
        kind = said(files.read_head(path, _ENOUGH_BYTES))
    except OSError as error:
        return error.strerror or str(error)
    return f"{kind} that was cut off" if kind == _ZIP and not zipfile.is_zipfile(path) else kind


def mistaken_for_model(path: Path) -> str:
    """The same of what no backend loads; "" for what may be a model, as zip archives, pickles and texts are.

    What is missing the backend tells itself; a program may be empty.
    """
    is_told = path.is_file() and (path.suffix != ".py" or path.stat().st_size > 0)
    kind = of(path) if is_told else ""
    return "" if kind in _MAY_BE_MODELS else kind


def unfetched(path: Path) -> str:
    """That a file of any kind was not fetched, to stand after its name; "" where it was, or is missing."""
    kind = of(path) if path.is_file() else ""
    return f"is {kind}" if kind.startswith(_POINTER) else ""


def mistaken_for_program(path: Path) -> str:
    """Why PyTorch cannot execute a file, to stand after its name, as far as its archive tells; "" where it may."""
    names = zipped(path)
    has_program = any(name.endswith((*OF_EXPORTED, "constants.pkl")) for name in names)
    if not has_program and any(name.endswith("data.pkl") for name in names):
        return f"holds weights without a program, as torch.save makes it: {EXPORT_IT}"
    if names:  # as packages of AOTInductor are: PyTorch knows
        return ""
    return f"is {of(path) or 'something else'}: expected what torch.export.save or torch.jit.save made"


def zipped(path: Path) -> list[str]:
    """The names of an archive's files; none of what is no archive."""
    try:
        files.read_head(path, 1)  # a FIFO would wait
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return []


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # cut in the middle of a character
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character.isspace() for character in text)
