"""Text is not bytes: what ONNX graphs and JSON can carry comes out as it went in, the rest is an error."""

import numpy as np
import pytest

from tests.models import Repository, onnx_text
from tests.serving import engine_over, infer
from tutti.core.errors import InvalidArgument
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.frontends.http import codec as http_codec
from tutti.frontends.v2 import json_values
from tutti.frontends.v2.json_request import ReplyFormat

TEXTS = ["plain", "Besançon", "中文", "", "tail\0", " a\0b ", "\N{GRINNING FACE}", "e\u0301"]
NO_TEXT = [b"\xff", b"ok\xc3", b"\xed\xa0\x80"]


def request(*elements: bytes, is_raw: bool = False) -> InferRequest:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    tensor = Tensor.of("x", array)
    if is_raw:
        tensor = Tensor("x", "BYTES", tensor.shape, tensor.raw())
    return InferRequest("text", {"x": tensor})


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize("size", [0, 16])
def test_text_passes_an_onnx_graph_unchanged(repository: Repository, size: int, is_raw: bool) -> None:
    """Alone and joined; what is no text fails alone."""
    dims = "[ 1 ] reshape { shape: [ ] }" if size else "-1"
    repository.add(
        "text",
        f"""
        backend: "onnxruntime" max_batch_size: {size} {"dynamic_batching {}" if size else ""}
        input {{ name: "x" data_type: TYPE_STRING dims: {dims} }}
        output {{ name: "y" data_type: TYPE_STRING dims: {dims} }}
        """,
        {"model.onnx": onnx_text()},
    )
    sent = [[text.encode()] for text in TEXTS] + [[text.encode() for text in TEXTS]]
    requests = [request(*elements, is_raw=is_raw) for elements in sent]
    wrong = [request(element, is_raw=is_raw) for element in NO_TEXT]
    if size:
        for one in (*requests, *wrong):
            tensor = one.inputs["x"]
            one.inputs["x"] = Tensor("x", "BYTES", (tensor.shape[0], 1), tensor.array()[:, np.newaxis])
    with engine_over(repository.root) as engine:
        answers = infer(engine, [*requests, *wrong])
    for elements, answer in zip(sent, answers, strict=False):
        assert isinstance(answer, InferResponse), answer
        made = answer.tensor("y")
        assert made.raw() == Tensor.of("y", np.array(elements, dtype=object)).raw()
        assert made.array().reshape(-1).tolist() == elements  # bytes, whatever onnxruntime makes of them
        assert json_values.texts("text", "y", made.array().reshape(-1)) == [element.decode() for element in elements]
    for answer in answers[len(sent) :]:
        assert isinstance(answer, InvalidArgument)
        assert "input 'x': onnxruntime takes text in UTF-8 only" in str(answer)


@pytest.mark.parametrize("element", NO_TEXT)
def test_bytes_that_json_cannot_carry_are_an_error(element: bytes) -> None:
    """And go as they are where the client asks for binary data."""
    array = np.array([b"ok", element], dtype=object)
    answer = InferResponse("m", "1", [Tensor.of("y", array)])
    with pytest.raises(InvalidArgument, match="output 'y': element 1 is no UTF-8, and JSON cannot carry it"):
        http_codec.encode(answer, "", ReplyFormat())
    length, pieces = http_codec.encode(answer, "", ReplyFormat(default_is_binary=True))
    assert length is not None
    assert b"".join(map(bytes, pieces)).endswith(element)
