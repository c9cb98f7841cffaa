"""Limits of variable dimensions: what is longer is refused before anything executes, and what is not is answered."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from tests.models import Repository, onnx_gather
from tests.serving import engine_over, infer, serving
from tutti.core.errors import ConfigError, InvalidArgument
from tutti.core.types import Answer, InferRequest, InferResponse, Shape, Tensor
from tutti.repository import config
from tutti.repository.length_limits import MaxDims
from tutti.serving import model

TWO = """
backend: "python" max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, 3, -1 ] }, { name: "y" data_type: TYPE_STRING dims: -1 },
        { name: "z" data_type: TYPE_FP32 dims: 2 } ]
output { name: "out" data_type: TYPE_FP32 dims: -1 }
"""
GATHER = """
backend: "onnxruntime" max_batch_size: 8
input { name: "ids" data_type: TYPE_INT64 dims: -1 }
output { name: "y" data_type: TYPE_FP32 dims: -1 }
dynamic_batching { max_queue_delay_microseconds: 20000 }
"""


def limited(text: str, limits: Any, **more: str) -> str:
    """A configuration with limits, as text or as what becomes JSON."""
    given = {"tutti.max_dims": limits if isinstance(limits, str) else json.dumps(limits), **more}
    shown = [
        f"parameters {{ key: {json.dumps(k)} value {{ string_value: {json.dumps(v)} }} }}" for k, v in given.items()
    ]
    return "\n".join([text, *shown])


def ids(*shape: int, name: str = "gather") -> InferRequest:
    return InferRequest(name, {"ids": Tensor.of("ids", np.ones(shape, np.int64))})


def refused(answer: Answer, what: str) -> bool:
    assert isinstance(answer, InvalidArgument), answer
    return answer.message == what


# The parameter


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        ({}, {}),
        ({"x": [7, 8]}, {"x": (7, None, 8)}),
        ({"y": [7]}, {"y": (7,)}),
        ({"y": 7, "x": [1, 2**40]}, {"y": (7,), "x": (1, None, 2**40)}),
    ],
)
def test_limits_are_read_from_the_configuration(limits: Any, sizes: Any) -> None:
    assert config.parse(limited(TWO, limits), "m").max_dims == MaxDims(sizes)


def test_without_the_parameter_there_are_none() -> None:
    assert config.parse(TWO, "m").max_dims == MaxDims()


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"y": ' + "9" * 5000 + "}", "expected JSON"),
        ("[7]", r'expected an object, as \{"input_ids": \[512\]\}'),
        ("7", "expected an object"),
        ('{"y": 7, "y": 7}', "'y' appears more than once"),
        ({"nope": 7}, r"expected one of \['x', 'y', 'z'\], got 'nope'"),
        ({"out": 7}, "got 'out'"),
        ({"x": 7}, r"expected a size for each, and it has 2 variable dimensions: \[-1, 3, -1\], got 7"),
        ({"x": [7]}, "it has 2 variable dimensions"),
        ({"x": [7, 3, 7]}, "it has 2 variable dimensions"),
        ({"y": []}, "it has 1 variable dimensions"),
        ({"z": []}, "it has 0 variable dimensions"),
        ({"z": 2}, "it has 0 variable dimensions"),
        ({"y": 0}, "input 'y': expected sizes of at least 1, got 0"),
        ({"y": [-1]}, "expected sizes of at least 1"),
        ({"y": True}, "expected sizes of at least 1"),
        ({"y": [7.0]}, "expected sizes of at least 1"),
        ({"y": "7"}, "expected sizes of at least 1"),
        ({"y": None}, "expected sizes of at least 1"),
        ({"y": {"0": 7}}, "expected sizes of at least 1"),
        ({"x": [[7], [7]]}, "expected sizes of at least 1"),
    ],
)
def test_wrong_limits_are_refused_with_their_path(limits: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^model 'm': parameters.tutti.max_dims: .*{says}"):
        config.parse(limited(TWO, limits), "m")


@pytest.mark.parametrize(("buckets", "is_fine"), [("4, 8", True), ("9, 4", False), ("4, 8, 16", False)])
def test_padding_makes_nothing_longer_than_that(buckets: str, is_fine: bool) -> None:
    text = limited(GATHER, {"ids": 8}, **{"tutti.buckets.ids": buckets})
    if is_fine:
        assert config.parse(text, "m").padding.inputs
        return
    with pytest.raises(ConfigError, match=r"max_dims: input 'ids' takes at most 8, and is padded to (9|16)$"):
        config.parse(text, "m")


@pytest.mark.parametrize(("length", "is_fine"), [(8, True), (9, False)])
def test_a_warm_up_is_no_longer_than_that(length: int, is_fine: bool) -> None:
    item = f'inputs {{ key: "ids" value {{ data_type: TYPE_INT64 dims: {length} zero_data: true }} }}'
    text = limited(GATHER + f'model_warmup {{ name: "w" batch_size: 8 {item} }}', {"ids": 8})
    if is_fine:
        config.parse(text, "m")
        return
    with pytest.raises(ConfigError, match=r"'ids' takes at most 8 in dims\[0\], and model_warmup 'w' has \[9\]"):
        config.parse(text, "m")


# The check


def tensors(x: Shape, y: int) -> InferRequest:
    rows = x[0]
    return InferRequest(
        "m",
        {
            "x": Tensor("x", "FP32", x, b""),
            "y": Tensor("y", "BYTES", (rows, y), b""),
            "z": Tensor("z", "FP32", (rows, 2), b""),
        },
    )


@pytest.mark.parametrize(
    ("x", "y", "what"),
    [
        ((1, 7, 3, 8), 5, ""),
        ((8, 0, 3, 1), 5, ""),
        ((1, 8, 3, 8), 5, "input 'x': expected at most 7 in dimension 1 of its shape, got 8: [1, 8, 3, 8]"),
        ((2, 7, 3, 9), 5, "input 'x': expected at most 8 in dimension 3 of its shape, got 9: [2, 7, 3, 9]"),
        ((8, 1, 3, 1), 6, "input 'y': expected at most 5 in dimension 1 of its shape, got 6: [8, 6]"),
        (
            (1, 2**50, 3, 1),
            5,
            f"input 'x': expected at most 7 in dimension 1 of its shape, got {2**50}: [1, {2**50}, 3, 1]",
        ),
        ((1, 8, 4, 8), 5, "Expected [-1,-1,3,-1], got [1,8,4,8]"),
    ],
)
def test_what_is_longer_is_refused_naming_all_of_it(x: Shape, y: int, what: str) -> None:
    own = config.parse(limited(TWO, {"x": [7, 8], "y": 5}), "m")
    if not what:
        assert model.check_request(own, frozenset(["out"]), tensors(x, y))[0] == x[0]
        return
    with pytest.raises(InvalidArgument) as refusal:
        model.check_request(own, frozenset(["out"]), tensors(x, y))
    assert what in refusal.value.message and "model 'm'" in refusal.value.message


def test_without_a_batch_axis_dimensions_are_counted_from_the_first() -> None:
    text = limited(GATHER.replace("max_batch_size: 8", "max_batch_size: 0").partition("dynamic")[0], {"ids": 4})
    with pytest.raises(InvalidArgument, match=r"expected at most 4 in dimension 0 of its shape, got 5: \[5\]"):
        model.check_request(config.parse(text, "m"), frozenset("y"), ids(5))


def test_as_random_shapes_say() -> None:
    rng = np.random.default_rng(0)
    own = config.parse(limited(TWO, {"x": [7, 8], "y": 5}), "m")
    passed = 0
    for _ in range(2000):
        rows, first, second, y = (int(n) for n in rng.integers(1, (9, 10, 11, 8)))
        try:
            model.check_request(own, frozenset(["out"]), tensors((rows, first, 3, second), y))
        except InvalidArgument:
            assert first > 7 or second > 8 or y > 5
        else:
            assert first <= 7 and second <= 8 and y <= 5
            passed += 1
    assert 500 < passed < 1500, "some of both"


# Served


def test_a_shape_that_is_known_is_not_looked_at_again(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    repository.add("gather", limited(GATHER, {"ids": 4}), {"model.onnx": onnx_gather()})
    looked: list[Shape] = []
    excess = MaxDims.excess
    monkeypatch.setattr(MaxDims, "excess", lambda self, name, body: (looked.append(body), excess(self, name, body))[1])
    with engine_over(repository.root) as engine:
        answers = infer(engine, [ids(1, 4) for _ in range(50)])
    assert all(isinstance(answer, InferResponse) for answer in answers)
    assert looked == [(4,)]


def test_python_models_are_not_asked_for_more(repository: Repository) -> None:
    repository.add_python(
        "count",
        limited(
            """
            backend: "python" max_batch_size: 8
            input { name: "x" data_type: TYPE_FP32 dims: -1 }
            output { name: "n" data_type: TYPE_FP32 dims: 1 }
            """,
            {"x": 3},
        ),
        """
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("n", np.full((len(x), 1), x.shape[1], np.float32))])
        """,
    )
    requests = [InferRequest("count", {"x": Tensor.of("x", np.ones((2, n), np.float32))}) for n in (1, 3, 4, 0)]
    with engine_over(repository.root) as engine:
        short, longest, longer, empty = infer(engine, requests)
    for answer, n in ((short, 1), (longest, 3), (empty, 0)):
        assert isinstance(answer, InferResponse), answer
        assert answer.tensor("n").array().tolist() == [[n], [n]]
    assert refused(longer, "model 'count': input 'x': expected at most 3 in dimension 1 of its shape, got 4: [2, 4]")


@pytest.mark.parametrize("limits", [{}, {"IDS": 5}])
def test_steps_of_ensembles_and_ensembles_themselves_have_limits(repository: Repository, limits: Any) -> None:
    repository.add("gather", limited(GATHER, {"ids": 4}), {"model.onnx": onnx_gather()})
    chain = """
    platform: "ensemble" max_batch_size: 8
    input { name: "IDS" data_type: TYPE_INT64 dims: -1 }
    output { name: "Y" data_type: TYPE_FP32 dims: -1 }
    ensemble_scheduling { step { model_name: "gather" input_map { key: "ids" value: "IDS" }
      output_map { key: "y" value: "Y" } } }
    """
    repository.add("chain", limited(chain, limits), {})
    lengths = [4, 5, 1, 9, 4]
    requests = [InferRequest("chain", {"IDS": Tensor.of("IDS", np.ones((2, n), np.int64))}) for n in lengths]
    with engine_over(repository.root) as engine:
        answers = infer(engine, requests)
    for answer, n in zip(answers, lengths, strict=True):
        if n <= 4:
            assert isinstance(answer, InferResponse), answer
            assert answer.tensor("Y").array().tolist() == [[10.0] * n] * 2
        elif n <= 5 or not limits:
            assert isinstance(answer, InvalidArgument)
            assert (
                f"model 'gather': input 'ids': expected at most 4 in dimension 1 of its shape, got {n}"
                in answer.message
            )
        else:
            assert refused(
                answer, f"model 'chain': input 'IDS': expected at most 5 in dimension 1 of its shape, got {n}: [2, {n}]"
            )


def test_over_the_wire_it_is_an_invalid_argument_and_metadata_says_what_it_did(
    repository: Repository, tmp_path: Path
) -> None:
    repository.add("gather", limited(GATHER, {"ids": [4]}), {"model.onnx": onnx_gather()})
    repository.add("free", GATHER, {"model.onnx": onnx_gather()})
    what = "model 'gather': input 'ids': expected at most 4 in dimension 1 of its shape, got 5: [1, 5]"
    with serving(repository.root, tmp_path / "log") as served:

        def get(path: str, body: Any = None) -> tuple[int, Any]:
            data = None if body is None else json.dumps(body).encode()
            try:
                request = urllib.request.Request(f"http://{served.http}/v2/models/{path}", data)
                with urllib.request.urlopen(request, timeout=20) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, json.load(error)

        def ask(length: int) -> tuple[int, Any]:
            tensor = {"name": "ids", "datatype": "INT64", "shape": [1, length], "data": [3] * length}
            return get("gather/infer", {"inputs": [tensor]})

        assert ask(4)[1]["outputs"][0]["data"] == [30] * 4
        assert ask(5) == (400, {"error": what})
        assert get("gather") == (200, {**get("free")[1], "name": "gather"})
        assert get("gather")[1]["inputs"][0]["shape"] == [-1, -1]
        shown, free = get("gather/config")[1], get("free/config")[1]
        assert shown.pop("parameters") == {"tutti.max_dims": {"string_value": '{"ids": [4]}'}}
        assert shown["input"] == free["input"]
        with InferenceServerClient(served.grpc) as client:
            given = InferInput("ids", [1, 5], "INT64")
            given.set_data_from_numpy(np.ones((1, 5), np.int64))
            with pytest.raises(InferenceServerException, match="expected at most 4 in dimension 1") as refusal:
                client.infer("gather", [given])
            assert refusal.value.status() == "StatusCode.INVALID_ARGUMENT"
