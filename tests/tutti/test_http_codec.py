"""Infer requests and responses over HTTP, as bytes."""

import json

import numpy as np
import pytest

from tutti.core.errors import InferError, InvalidArgument
from tutti.core.types import Columns, InferResponse, Tensor
from tutti.frontends.http import codec as http_codec
from tutti.frontends.http.codec import HeaderCache
from tutti.frontends.v2 import json_values
from tutti.frontends.v2.json_request import BINARY_REPLY, JSON_REPLY, ReplyFormat
from tutti.repository import config, model_config


def body(header: dict, binary: bytes = b"") -> tuple[bytes, int]:
    head = json.dumps(header).encode()
    return head + binary, len(head)


def x(**fields: object) -> dict:
    return {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", **fields}]}


def test_json_data_may_be_nested_or_flat() -> None:
    for data in ([1, 2.5], [[1, 2.5]]):
        request, reply = http_codec.decode("m", "", body(x(data=data))[0], None)
        np.testing.assert_array_equal(request.inputs["x"].array(), np.float32([[1, 2.5]]))
        assert reply == JSON_REPLY


@pytest.mark.parametrize(
    ("key", "good", "wrong"),
    [
        ("priority", [0, 3, 2**63], ["high", -1, True, 1.5]),
        ("timeout", [0, 5_000_000], ["1s", True, 2.5]),
        ("sequence_id", [7, 2**64 - 1, "a"], [True, 1.5]),
        ("sequence_start", [True, False], [1, "true"]),
        ("sequence_end", [True, False], [0, "x"]),
    ],
)
def test_parameters_of_the_servers_own_have_their_types(key: str, good: list, wrong: list) -> None:
    """One of another type says nothing to the server: it would be passed over without a word."""
    for value in good:
        request, _ = http_codec.decode("m", "", body({**x(data=[1, 2]), "parameters": {key: value}})[0], None)
        assert request.parameters == {key: value}
    for value in wrong:
        with pytest.raises(InvalidArgument, match=f"model 'm': invalid value type for '{key}' parameter, expected"):
            http_codec.decode("m", "", body({**x(data=[1, 2]), "parameters": {key: value}})[0], None)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_whether_an_output_is_binary_is_a_boolean(value: object) -> None:
    header = {**x(data=[1, 2]), "outputs": [{"name": "y", "parameters": {"binary_data": value}}]}
    with pytest.raises(InvalidArgument, match="output 'y': 'binary_data': expected true or false"):
        http_codec.decode("m", "", body(header)[0], None)


def test_binary_data_is_a_view_of_the_body() -> None:
    raw = np.float32([[1, 2]]).tobytes()
    payload, length = body(x(parameters={"binary_data_size": 8}), raw)
    request, _ = http_codec.decode("m", "3", payload, length)
    assert isinstance(request.inputs["x"].data, memoryview)
    assert request.inputs["x"].array().tolist() == [[1, 2]]
    assert request.model_version == "3"


def test_a_repeated_header_is_parsed_once_and_answers_alike() -> None:
    header = x(parameters={"binary_data_size": 8})
    header["outputs"] = [{"name": "y", "parameters": {"binary_data": True}}]
    header["parameters"] = {"priority": 1}
    cache = HeaderCache()
    for values in ([1, 2], [3, 4], [5, 6]):
        payload, length = body(header, np.float32(values).tobytes())
        request, reply = http_codec.decode("m", "1", payload, length, cache)
        plain, plain_reply = http_codec.decode("m", "1", payload, length)
        assert request.inputs["x"].array().tolist() == [values]
        assert (request.outputs, request.parameters) == (plain.outputs, plain.parameters)
        assert (reply.default_is_binary, reply.binary) == (plain_reply.default_is_binary, plain_reply.binary)
        request.parameters.clear()  # a request's own: the next one must not see it
    assert cache.find(payload, length) is not None


def test_headers_of_one_length_are_told_apart() -> None:
    cache = HeaderCache()
    sent = [body(x(parameters={"binary_data_size": 8}) | {"parameters": {"n": n}}, b"\0" * 8) for n in range(3)]
    assert len({length for _, length in sent}) == 1
    for turn in (0, 0, 1, 1, 2, 0, 2, 1, 0):
        request, _ = http_codec.decode("m", "", *sent[turn], cache)
        assert request.parameters == {"n": turn}
        held, length = sent[turn]
        assert cache.find(memoryview(held), length) is cache.find(held, length) is not None
        assert cache.find(held + b"\0", length) is cache.find(held[:-1], length) is None


def test_a_repeated_header_with_other_data_is_checked_again() -> None:
    cache = HeaderCache()
    payload, length = body(x(parameters={"binary_data_size": 8}), b"\0" * 8)
    http_codec.decode("m", "", payload, length, cache)
    for wrong, says in ((payload[:-1], "only 7 are left"), (payload + b"\0", "left over")):
        with pytest.raises(InvalidArgument, match=says):
            http_codec.decode("m", "", wrong, length, cache)


def test_headers_that_cannot_repeat_are_not_kept() -> None:
    cache = HeaderCache()
    with_id = {**x(parameters={"binary_data_size": 8}), "id": "7"}
    for header, data in ((with_id, b"\0" * 8), (x(data=[1, 2]), b"")):
        payload, length = body(header, data)
        http_codec.decode("m", "", payload, length, cache)
        assert cache.find(payload, length) is None
    for number in range(HeaderCache.MAX_HEADERS + 10):
        payload, length = body({**x(parameters={"binary_data_size": 8}), "parameters": {"n": number}}, b"\0" * 8)
        http_codec.decode("m", "", payload, length, cache)
    assert len(cache._known) <= HeaderCache.MAX_HEADERS


def test_outputs_and_their_form() -> None:
    header = x(data=[1, 2])
    header["outputs"] = [{"name": "a", "parameters": {"binary_data": True}}, {"name": "b"}]
    header["parameters"] = {"binary_data_output": True, "priority": 2}
    header["id"] = "seven"
    request, reply = http_codec.decode("m", "", body(header)[0], None)
    assert request.outputs == ("a", "b")
    assert (reply.is_binary("a"), reply.is_binary("b"), reply.is_binary("c")) == (True, False, True)
    assert request.parameters == {"priority": 2}
    assert request.id == "seven"


@pytest.mark.parametrize(
    ("header", "binary", "says"),
    [
        (x(), b"", "one of 'data', 'binary_data_size' and"),
        (x(data=[1, 2], parameters={"binary_data_size": 8}), b"\0" * 8, "one of 'data'"),
        (x(data=[1, 2, 3]), b"", "expected 2 elements"),
        (x(data=["a", "b"]), b"", "expected FP32 elements"),
        (x(data=json.loads("[" * 900 + "]" * 900)), b"", "JSON nesting depth exceeds maximum allowed limit (100)"),
        (x(data=[True, False]), b"", "attempt to access JSON non-number as double: expected FP32 elements"),
        (x(data=[1, 2], shape=[-1, 2]), b"", "'shape'"),
        (x(data=[1, 2], shape=["1", 2]), b"", "'shape'"),
        (x(data=[1, 2], shape=[2**40, 2**40]), b"", "causes total element count to exceed maximum size of"),
        (x(data=[1, 2], datatype="FLOAT"), b"", "'datatype'"),
        (x(data=[1, 2], datatype="FP16"), b"", "must be binary"),
        (x(data=[1, 300], datatype="UINT8"), b"", "does not fit UINT8"),
        (x(data=[1.5, 2], datatype="INT32"), b"", "attempt to access JSON non-signed-integer as signed-integer"),
        (x(parameters={"binary_data_size": 8}), b"\0" * 7, "only 7 are left"),
        (x(parameters={"binary_data_size": 7}), b"\0" * 7, "expected 8 bytes"),
        (x(parameters={"binary_data_size": -8}), b"", "'binary_data_size'"),
        (x(parameters={"binary_data_size": 8}), b"\0" * 9, "left over"),
        ({"inputs": [x(data=[1, 2])["inputs"][0]] * 2}, b"", "more than once"),
        ({"inputs": 3}, b"", "'inputs'"),
        ({**x(data=[1, 2]), "id": 5}, b"", "'id'"),
        ({**x(data=[1, 2]), "outputs": [{"name": "y"}] * 2000}, b"", "at most 1024 outputs"),
        ({**x(data=[1, 2]), "parameters": []}, b"", "'parameters'"),
    ],
)
def test_mistakes_are_named(header: dict, binary: bytes, says: str) -> None:
    payload, length = body(header, binary)
    with pytest.raises(InferError, match="model 'm'") as caught:
        http_codec.decode("m", "", payload, length)
    assert says in caught.value.message


def test_data_may_be_nested_deeper_than_its_shape() -> None:
    payload, length = body(x(data=json.loads("[" * 90 + "1, 2" + "]" * 90)))
    assert http_codec.decode("m", "", payload, length)[0].inputs["x"].array().tolist() == [[1, 2]]


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"\xff", b"{}{}"])
def test_bodies_that_are_no_request(payload: bytes) -> None:
    with pytest.raises(InvalidArgument):
        http_codec.decode("m", "", payload, None)


@pytest.mark.parametrize("name", ["triton_enable_empty_final_response", "triton_x", "triton_"])
def test_names_of_tritons_own_are_no_parameters(name: str) -> None:
    """Of a stream one of them is: over HTTP there is none."""
    payload, length = body({**x(data=[1, 2]), "parameters": {name: True}})
    with pytest.raises(InvalidArgument, match=f"model 'm': parameter keys starting with 'triton_'.*got '{name}'"):
        http_codec.decode("m", "", payload, length)


def test_a_header_longer_than_the_body_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="Inference-Header-Content-Length"):
        http_codec.decode("m", "", b"{}", 3)


def test_responses_as_json_binary_and_mixed() -> None:
    response = InferResponse(
        "m", "1", [Tensor.of("a", np.float32([[1, 2]])), Tensor.of("b", np.array([[b"hi"]], dtype=object))]
    )
    length, pieces = http_codec.encode(response, "id1", JSON_REPLY)
    encoded = b"".join(pieces)
    shown = json.loads(encoded)
    assert length is None
    assert shown["id"] == "id1"
    assert [output["data"] for output in shown["outputs"]] == [[1.0, 2.0], ["hi"]]
    length, pieces = http_codec.encode(response, "", BINARY_REPLY)
    encoded = b"".join(pieces)
    assert length is not None
    shown = json.loads(encoded[:length])
    assert "id" not in shown
    assert [output["parameters"]["binary_data_size"] for output in shown["outputs"]] == [8, 6]
    assert encoded[length:] == np.float32([1, 2]).tobytes() + b"\x02\x00\x00\x00hi"
    length, pieces = http_codec.encode(response, "", ReplyFormat(False, {"b": True}))
    encoded = b"".join(pieces)
    assert encoded.endswith(b"hi")


def raw_config(dims: str, kind: str = "TYPE_FP32", batch: int = 4) -> model_config.ModelConfig:
    return config.parse(
        f'backend: "b" max_batch_size: {batch} input {{ name: "x" data_type: {kind} dims: {dims} }}'
        ' output { name: "y" data_type: TYPE_FP32 dims: 1 }',
        "m",
    )


def test_raw_requests() -> None:
    request = http_codec.decode_raw(raw_config("[ -1, 2 ]"), "", np.arange(6, dtype=np.float32).tobytes())
    assert request.inputs["x"].shape == (1, 3, 2)
    assert request.inputs["x"].array()[0, 2, 1] == 5
    text = http_codec.decode_raw(raw_config("1", "TYPE_STRING"), "", b"hello")
    assert text.inputs["x"].array().tolist() == [[b"hello"]]
    with pytest.raises(InvalidArgument, match="does not fit"):
        http_codec.decode_raw(raw_config("3"), "", b"\0" * 8)
    with pytest.raises(InvalidArgument, match="more than one variable-sized dimension"):
        http_codec.decode_raw(raw_config("[ -1, -1 ]"), "", b"\0" * 8)


def test_one_byte_order_mark_is_passed_over_and_no_more() -> None:
    mark = b"\xef\xbb\xbf"
    assert json_values.parse_json(mark + b"[1]") == [1]
    assert json_values.parse_json(mark + b"[Infinity]") == [float("inf")]
    for text in (mark * 2 + b"[1]", mark * 100_000, mark):
        with pytest.raises(ValueError, match=r"."):
            json_values.parse_json(text)


def test_long_headers_are_not_kept() -> None:
    cache = http_codec.HeaderCache()
    for name, is_kept in (("x", True), ("x" * 9000, False)):
        tensor = {"name": name, "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}
        header = json.dumps({"inputs": [tensor]}).encode()
        for _ in range(2):
            http_codec.decode("m", "", header + bytes(4), len(header), cache)
        assert (cache.find(header + bytes(4), len(header)) is not None) == is_kept


@pytest.mark.parametrize("parameters", [{}, {"tutti_pool": "gpu"}, {"n": 1}, {"n": True}])
def test_a_part_of_a_batch_reads_as_one_that_came_alone(parameters: dict[str, bool | int | float | str]) -> None:
    columns = Columns([Tensor.of("y", np.arange(6, dtype=np.float32).reshape(3, 2))])
    for others in ({}, {"n": 1.0}, parameters):  # what batch-mates have in common is made once
        first = InferResponse.of_part("m", "1", columns, 0, 2)
        first.parameters = dict(others)
        http_codec.part_header(first, BINARY_REPLY)
    part = InferResponse.of_part("m", "1", columns, 1, 3)
    part.parameters = parameters
    made = http_codec.part_header(part, BINARY_REPLY)
    header_length, pieces = http_codec.encode(InferResponse("m", "1", part.outputs, parameters), "", BINARY_REPLY)
    assert made == (pieces[0], sum(map(len, pieces[1:])))
    assert len(made[0]) == header_length
    assert http_codec.part_header(part, JSON_REPLY) is None


def test_json_of_more_values_than_memory_is_for_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "_COUNTED_AT_ONCE", 1000)
    monkeypatch.setattr(json_values, "MAX_CONTAINERS", 50_000)
    monkeypatch.setattr(json_values, "MAX_VALUES", 60_000)
    for bomb in (b"[" + b"[]," * 50_000 + b"0]", b"[" + b"{}," * 50_000 + b"0]", b"[" + b"1," * 60_001 + b"0]"):
        with pytest.raises(ValueError, match="binary data"):
            json_values.parse_json(memoryview(bomb))
    assert len(json_values.parse_json(memoryview(b"[" + b"1," * 60_000 + b"0]"))) == 60_001
