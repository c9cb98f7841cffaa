"""Tensors, datatypes, errors, and the row arithmetic of batches."""

import pickle
from collections.abc import Sequence

import numpy as np
import pytest

from tutti.core import dtypes, errors, rows
from tutti.core.errors import InvalidArgument
from tutti.core.types import Call, InferRequest, Tensor, settle


def test_bytes_survive_encoding() -> None:
    elements = [b"", b"a", "ü".encode(), b"\x00" * 300]
    assert dtypes.decode_bytes(dtypes.encode_bytes(elements), 4) == elements


@pytest.mark.parametrize(
    ("raw", "count"),
    [
        (b"\x01\x00\x00", 1),
        (b"\x05\x00\x00\x00abc", 1),
        (b"\xff\xff\xff\xffabc", 1),
        (b"\x01\x00\x00\x00a", 2),
        (b"\x01\x00\x00\x00a\x00", 1),
    ],
)
def test_broken_bytes_are_refused(raw: bytes, count: int) -> None:
    with pytest.raises(InvalidArgument):
        dtypes.decode_bytes(raw, count)


@pytest.mark.parametrize("datatype", [name for name in dtypes.NUMPY if name != "BYTES"])
def test_a_tensor_goes_to_wire_and_back(datatype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtypes.NUMPY[datatype])
    raw = Tensor("x", datatype, (2, 3), array).raw()
    back = Tensor("x", datatype, (2, 3), bytes(raw)).array()
    np.testing.assert_array_equal(back, array)


def test_a_shape_that_promises_more_than_there_is_allocates_nothing() -> None:
    with pytest.raises(InvalidArgument, match="tensor 't'"):
        Tensor("t", "BYTES", (1, 2**39), b"\x01\x00\x00\x00a").array()


def test_raw_of_a_transposed_array_is_row_major() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T
    assert bytes(Tensor.of("x", array).raw()) == np.ascontiguousarray(array).tobytes()


def request(array: np.ndarray, as_bytes: bool) -> InferRequest:
    tensor = Tensor.of("x", array)
    if as_bytes:
        tensor.data = bytes(tensor.raw())
    return InferRequest("m", {"x": tensor})


@pytest.mark.parametrize("as_bytes", [True, False])
def test_join_and_split_are_inverse(as_bytes: bool) -> None:
    parts = [np.random.default_rng(i).random((n, 3), dtype=np.float32) for i, n in enumerate((1, 4, 2))]
    joined = rows.join([request(part, as_bytes) for part in parts], "x")
    np.testing.assert_array_equal(joined, np.concatenate(parts))
    for part, tensor in zip(parts, rows.split(Tensor.of("y", joined), [1, 4, 2]), strict=True):
        assert tensor.shape == part.shape
        np.testing.assert_array_equal(tensor.array(), part)


def test_join_and_split_of_bytes() -> None:
    parts = [np.array([[b"a"]], dtype=object), np.array([[b"b"], [b"cc"]], dtype=object)]
    joined = rows.join([request(parts[0], True), request(parts[1], False)], "x")
    assert joined.tolist() == [[b"a"], [b"b"], [b"cc"]]
    assert rows.split(Tensor.of("y", joined), [1, 2])[1].array().tolist() == [[b"b"], [b"cc"]]


@pytest.mark.parametrize("kind", errors.InferError.__subclasses__())
def test_errors_survive_pickling(kind: type[errors.InferError]) -> None:
    back = pickle.loads(pickle.dumps(kind("model 'm': no")))
    assert type(back) is kind
    assert back.message == "model 'm': no"


class Elsewhere:
    """An OnDevice that is nowhere."""

    device = "cuda:0"

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape = array.shape
        self.nbytes = array.nbytes
        self.copies = 0

    def wait(self) -> None: ...

    def array(self) -> np.ndarray:
        self.copies += 1
        return self._array

    def __dlpack__(self, **options: object) -> object:
        raise BufferError

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def test_what_is_on_a_device_is_copied_once_when_it_is_wanted() -> None:
    memory = Elsewhere(np.arange(4, dtype=np.int32))
    tensor = Tensor("x", "INT32", (2, 2), memory)
    assert memory.copies == 0
    assert tensor.array().tolist() == [[0, 1], [2, 3]]
    assert bytes(tensor.raw()) == np.arange(4, dtype=np.int32).tobytes()
    assert memory.copies == 1


def test_rows_take_what_is_on_a_device() -> None:
    def parts() -> list[Tensor]:
        arrays = [np.full((1, 2), i, np.float32) for i in range(2)]
        return [Tensor("x", "FP32", (1, 2), Elsewhere(arrays[0])), Tensor("x", "FP32", (1, 2), arrays[1].tobytes())]

    for both in (parts(), parts()[::-1]):
        assert sorted(rows.concatenate(both)[:, 0].tolist()) == [0.0, 1.0]
    assert not rows.is_large([InferRequest("m", {"x": parts()[0]})])
    large = Tensor("x", "FP32", (1, 10**6), Elsewhere(np.zeros((1, 10**6), np.float32)))
    assert rows.is_large([InferRequest("m", {"x": large})])
    assert rows.reshape(parts()[0], (2,), (2, 1), is_batched=True).array().shape == (1, 2, 1)


class _Sink:
    """Keeps what it is handed, then raises where it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[Call] = []
        self._error = error

    def settle(self, calls: Sequence[Call]) -> None:
        self.calls += calls
        if self._error is not None:
            raise self._error


def test_a_sink_that_raises_keeps_no_other_from_its_calls() -> None:
    broken = RuntimeError("broken")
    sinks = [_Sink(), _Sink(broken), _Sink()]
    calls = [Call(InferRequest("m", {}), sinks[index % 3]) for index in range(6)]
    with pytest.raises(RuntimeError, match="broken") as raised:
        settle(calls)
    assert raised.value is broken
    assert [sink.calls for sink in sinks] == [calls[index::3] for index in range(3)]
