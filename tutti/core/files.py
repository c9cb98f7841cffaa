"""The small files of a model's folder, as whoever put them there left them. Knows nothing of models.

Regular files only: opening a FIFO would wait for its writer, and a device may have no end. Bytes that are not UTF-8 are
kept: in a text they are lone surrogates, which `to_bytes` makes the same bytes again.
"""

import codecs
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

MAX_TEXT_BYTES = 16 << 20
_BYTE_ORDER_MARK = "\ufeff"


def read_bytes(path: Path, most_bytes: int | None = None) -> bytes:
    """The content of a regular file. Raises OSError for anything else, and for more than `most_bytes`."""
    content = read_head(path, -1 if most_bytes is None else most_bytes + 1)
    if most_bytes is not None and len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes} bytes")
    return content


def read_head(path: Path, count: int) -> bytes:
    """The first bytes of a regular file, all for -1. Raises OSError for anything else."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a path with a zero in it
        raise OSError(errno.EINVAL, str(error)) from None
    with os.fdopen(number, "rb") as file:
        mode = os.fstat(number).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        return file.read(count)


def read_text(path: Path) -> str:
    """A text of at most MAX_TEXT_BYTES, without its byte order mark. Raises OSError as `read_bytes` does."""
    return to_text(read_bytes(path, MAX_TEXT_BYTES)).removeprefix(_BYTE_ORDER_MARK)


def read_utf8(path: Path) -> str:
    """The same where every character counts. Raises OSError, too, for what is not UTF-8, naming the byte."""
    content = read_bytes(path, MAX_TEXT_BYTES)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise OSError(errno.EILSEQ, "it is in UTF-16; expected UTF-8")
    if b"\0" in content:
        raise OSError(errno.EILSEQ, f"byte {content.index(0)} is a zero; expected a text in UTF-8")
    try:
        return content.decode("utf-8").removeprefix(_BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        fault = f"line {line}, byte {error.start}: {content[error.start]:#04x} is no UTF-8"
        raise OSError(errno.EILSEQ, fault) from None


def to_text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    """What `to_text` was given."""
    return text.encode("utf-8", "surrogateescape")


def walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Path and status of every regular file below a folder, links followed, each folder once.

    What goes meanwhile is left out, and what cannot be read.
    """
    waiting, entered = [str(folder)], set()
    while waiting:
        try:
            with os.scandir(waiting.pop()) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            try:
                status = entry.stat()
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode):
                yield entry.path, status
            elif stat.S_ISDIR(status.st_mode) and (status.st_dev, status.st_ino) not in entered:
                entered.add((status.st_dev, status.st_ino))
                waiting.append(entry.path)
