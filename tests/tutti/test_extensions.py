"""Compression and classification, as functions."""

import gzip
import zlib

import numpy as np
import pytest

from tutti.core.errors import InvalidArgument, Unsupported
from tutti.core.types import Tensor
from tutti.frontends.http import compression
from tutti.frontends.v2.classification import classify

TEXT = b"some text, some text, some text" * 50


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_what_is_compressed_can_be_read_back(encoding: str) -> None:
    packed = compression.compress(TEXT, encoding)
    assert len(packed) < len(TEXT)
    assert compression.decompress(packed, encoding, len(TEXT)) == TEXT
    assert (gzip.decompress(packed) if encoding == "gzip" else zlib.decompress(packed)) == TEXT


@pytest.mark.parametrize(
    ("data", "encoding", "says"),
    [
        (b"not compressed", "gzip", "is not gzip"),
        (b"", "gzip", "cut off"),
        (gzip.compress(TEXT)[:-9], "gzip", "cut off"),
        (gzip.compress(TEXT) + b"more", "gzip", "4 bytes after"),
        (gzip.compress(b"\0" * 10_000_000), "gzip", "larger than 2000 bytes"),
        (zlib.compress(b"\0" * 2001), "deflate", "larger than 2000 bytes"),
        (zlib.compress(b"\0" * 2001)[:-1], "deflate", "larger than 2000 bytes"),
    ],
)
def test_broken_and_oversized_bodies_are_refused(data: bytes, encoding: str, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        compression.decompress(data, encoding, 2000)


def test_a_body_of_exactly_the_limit_passes() -> None:
    assert compression.decompress(zlib.compress(b"\0" * 2000), "deflate", 2000) == b"\0" * 2000


def test_unknown_codings_are_refused() -> None:
    with pytest.raises(Unsupported):
        compression.decompress(b"", "br", 10)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", ""),
        ("identity", ""),
        ("br", ""),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("deflate, gzip;q=0.5", "deflate"),
        ("GZIP;q=0, deflate", "deflate"),
    ],
)
def test_choice_of_the_response_coding(accept: str, chosen: str) -> None:
    assert compression.choose(accept) == chosen


def texts(tensor: Tensor) -> list:
    return tensor.array().tolist()


def test_top_classes_with_and_without_labels() -> None:
    scores = Tensor.of("y", np.float32([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]]))
    top = classify("m", scores, 2, ["a", "b"], is_batched=True)
    assert (top.datatype, top.shape) == ("BYTES", (2, 2))
    assert texts(top) == [[b"0.700000:1:b", b"0.200000:2"], [b"0.500000:0:a", b"0.250000:1:b"]]


def test_the_count_is_clamped_and_whole_numbers_stay_whole() -> None:
    top = classify("m", Tensor.of("y", np.array([3, 9], dtype=np.int64)), 5, (), is_batched=False)
    assert top.shape == (2,)
    assert texts(top) == [b"9:1", b"3:0"]


def test_text_cannot_be_classified() -> None:
    with pytest.raises(InvalidArgument, match="output 'y'"):
        classify("m", Tensor.of("y", np.array([[b"a"]], dtype=object)), 1, (), is_batched=True)
