"""ModelInfer messages, against the protobuf library's own reading of them."""

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from tutti.core.errors import InferError
from tutti.core.types import Columns, InferResponse, Tensor
from tutti.frontends.grpc import codec as grpc_codec

TENSOR = pb.ModelInferRequest.InferInputTensor


def message(*inputs: object, raw: tuple[bytes, ...] = (), **fields: object) -> bytes:
    return pb.ModelInferRequest(model_name="m", inputs=inputs, raw_input_contents=raw, **fields).SerializeToString()


def test_raw_and_typed_contents() -> None:
    x = TENSOR(name="x", datatype="FP32", shape=[1, 2])
    request = grpc_codec.decode(message(x, raw=(np.float32([1, 2]).tobytes(),), id="7", model_version="2"))
    assert request.inputs["x"].array().tolist() == [[1, 2]]
    assert (request.id, request.model_version) == ("7", "2")
    x.contents.fp32_contents.extend([3, 4])
    assert grpc_codec.decode(message(x)).inputs["x"].array().tolist() == [[3, 4]]
    small = TENSOR(name="x", datatype="INT8", shape=[2], contents=pb.InferTensorContents(int_contents=[-1, 2]))
    assert grpc_codec.decode(message(small)).inputs["x"].array().dtype == np.int8


def test_parameters_keep_their_types() -> None:
    sent = pb.ModelInferRequest(model_name="m")
    sent.parameters["a"].int64_param = 5
    sent.parameters["b"].string_param = "s"
    sent.parameters["c"].bool_param = True
    sent.parameters["d"].double_param = 0.5
    request = grpc_codec.decode(sent.SerializeToString())
    assert request.parameters == {"a": 5, "b": "s", "c": True, "d": 0.5}


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        ("priority", "string_param", "x"),
        ("priority", "int64_param", -1),
        ("timeout", "bool_param", True),
        ("sequence_id", "double_param", 1.0),
        ("sequence_start", "int64_param", 1),
        ("sequence_end", "string_param", "x"),
        ("any", None, None),
    ],
)
def test_parameters_of_another_type_are_refused(key: str, field: str | None, value: object) -> None:
    sent = pb.ModelInferRequest(model_name="m")
    sent.parameters[key].CopyFrom(pb.InferParameter(**({field: value} if field is not None else {})))
    with pytest.raises(InferError, match=f"invalid value type for '{key}' parameter, expected"):
        grpc_codec.decode(sent.SerializeToString())


def contents(**fields: object) -> object:
    return pb.InferTensorContents(**fields)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"\xff\xff", "not a ModelInferRequest"),
        (message(TENSOR(name="x", datatype="FP32", shape=[2]), raw=(b"\0" * 4,)), "expected 8 bytes"),
        (message(TENSOR(name="x", datatype="FP32", shape=[2]), raw=(b"\0" * 8, b"")), "raw_input_contents"),
        (message(TENSOR(name="x", datatype="FP9", shape=[2])), "datatype"),
        (message(TENSOR(name="x", datatype="FP32", shape=[-2]), raw=(b"",)), "'shape'"),
        (message(TENSOR(name="x", datatype="FP16", shape=[1])), "raw_input_contents"),
        (
            message(
                TENSOR(name="x", datatype="FP32", shape=[1], contents=contents(fp32_contents=[1])), raw=(b"\0" * 4,)
            ),
            "both contents and raw",
        ),
        (message(TENSOR(name="x", datatype="FP32", shape=[1], contents=contents(int_contents=[1]))), "fp32_contents"),
        (message(TENSOR(name="x", datatype="FP32", shape=[3], contents=contents(fp32_contents=[1]))), "expected 3"),
        (message(TENSOR(name="x", datatype="INT8", shape=[1], contents=contents(int_contents=[300]))), "does not fit"),
        (message(*[TENSOR(name="x", datatype="FP32", shape=[0])] * 2, raw=(b"", b"")), "more than once"),
    ],
)
def test_mistakes_are_named(payload: bytes, says: str) -> None:
    with pytest.raises(InferError) as caught:
        grpc_codec.decode(payload)
    assert says in caught.value.message


def test_a_response_reads_as_the_message_it_stands_for() -> None:
    big = np.arange(100_000, dtype=np.float32).reshape(1, -1)
    response = InferResponse(
        "m", "3", [Tensor.of("a", big), Tensor.of("b", np.array([b"hi"], dtype=object))], {"pool": "cpu", "n": 3}
    )
    for request_id in ("", "id-1"):
        read = pb.ModelInferResponse.FromString(grpc_codec.encode(response, request_id))
        assert (read.model_name, read.model_version, read.id) == ("m", "3", request_id)
        assert [(o.name, o.datatype, list(o.shape)) for o in read.outputs] == [
            ("a", "FP32", [1, 100_000]),
            ("b", "BYTES", [1]),
        ]
        assert list(read.raw_output_contents) == [big.tobytes(), b"\x02\x00\x00\x00hi"]
        assert read.parameters["pool"].string_param == "cpu"
        assert read.parameters["n"].int64_param == 3


def test_messages_that_differ_in_their_data_only_are_read_by_their_form() -> None:
    cache = grpc_codec.TemplateCache()
    x, t = TENSOR(name="x", datatype="FP32", shape=[1, 2]), TENSOR(name="t", datatype="INT8", shape=[0])
    signatures = set()
    for values in ([1, 2], [3, 4], [5, 6]):
        payload = message(x, t, raw=(np.float32(values).tobytes(), b""), model_version="1")
        read = cache.decode(payload)
        assert read.inputs["x"].array().tolist() == [values]
        assert read.inputs["t"].array().shape == (0,)
        assert (read.model_name, read.model_version) == ("m", "1")
        signatures.add(read.signature)
    assert len(signatures) == 2, "none for the first, one for the others"


def test_what_differs_in_more_than_its_data_is_read_anew() -> None:
    cache = grpc_codec.TemplateCache()
    x = TENSOR(name="x", datatype="FP32", shape=[1, 2])
    payload = message(x, raw=(bytes(8),))
    cache.decode(payload)
    for at in range(len(payload)):
        other = payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]
        try:
            expected = grpc_codec.decode(other)
        except InferError as error:
            with pytest.raises(type(error)):
                cache.decode(other)
            continue
        read = cache.decode(other)
        assert (read.model_name, read.id, list(read.inputs)) == (
            expected.model_name,
            expected.id,
            list(expected.inputs),
        )
        assert [bytes(t.raw()) for t in read.inputs.values()] == [bytes(t.raw()) for t in expected.inputs.values()]


def test_messages_with_ids_are_not_kept() -> None:
    cache = grpc_codec.TemplateCache()
    x = TENSOR(name="x", datatype="FP32", shape=[1, 2])
    for number in range(3):
        read = cache.decode(message(x, raw=(bytes(8),), id=str(number)))
        assert (read.id, read.signature) == (str(number), None)


def test_long_messages_are_not_kept() -> None:
    cache = grpc_codec.TemplateCache()
    x = TENSOR(name="x" * 9000, datatype="FP32", shape=[1, 2])
    for _ in range(3):
        assert cache.decode(message(x, raw=(bytes(8),))).signature is None


@pytest.mark.parametrize("parameters", [{}, {"tutti_pool": "gpu"}, {"n": 1}, {"n": True}])
def test_a_part_of_a_batch_reads_as_one_that_came_alone(parameters: dict[str, bool | int | float | str]) -> None:
    columns = Columns([Tensor.of("y", np.arange(6, dtype=np.float32).reshape(3, 2))])
    for others in ({}, {"n": 1.0}, parameters):  # what batch-mates have in common is made once
        first = InferResponse.of_part("m", "1", columns, 0, 2)
        first.parameters = dict(others)
        grpc_codec.encode(first, "")
    part = InferResponse.of_part("m", "1", columns, 1, 3)
    part.parameters = parameters
    made = pb.ModelInferResponse.FromString(grpc_codec.encode(part, ""))
    alone = grpc_codec.encode(InferResponse("m", "1", part.outputs, parameters), "")
    assert made == pb.ModelInferResponse.FromString(alone)
