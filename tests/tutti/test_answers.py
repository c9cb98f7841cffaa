"""Answers that wait for their reader: how many, and how large."""

import asyncio

import numpy as np
import pytest

from tutti.core.errors import Unavailable
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.frontends import awaited_answers as module
from tutti.frontends.awaited_answers import Answers


def response(size: int, datatype: str) -> InferResponse:
    """One answer of `size` bytes."""
    array = np.array([b"x" * size], object) if datatype == "BYTES" else np.zeros(size, np.uint8)
    return InferResponse("m", "1", [Tensor("y", datatype, array.shape, array)])


@pytest.mark.parametrize("datatype", ["UINT8", "BYTES"])
def test_a_reader_may_fall_behind_by_so_many_bytes(monkeypatch: pytest.MonkeyPatch, datatype: str) -> None:
    monkeypatch.setattr(module, "MAX_UNREAD_BYTES", 1000)

    async def stream() -> None:
        answers = Answers()
        call = answers.call(InferRequest("m", {}))
        assert call.emit is not None
        for _ in range(20):  # one that is read is not held any more
            call.emit(response(600, datatype))
            await answers.get()
        call.emit(response(5000, datatype))  # a single one may be of any size
        await answers.get()
        call.emit(response(600, datatype))
        with pytest.raises(Unavailable, match="does not take its answers"):
            call.emit(response(600, datatype))
        assert call.is_cancelled
        call.emit(response(300, datatype))

    asyncio.run(stream())
