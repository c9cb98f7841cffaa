"""Bounds of integer inputs: what is out of range never reaches a model, and what is in range always does."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models import Repository, onnx_gather
from tests.serving import engine_over, infer, serving
from tutti.backends.joined import JoinedBackend
from tutti.core.dtypes import NUMPY, Array
from tutti.core.errors import ConfigError, InvalidArgument
from tutti.core.types import Answer, Call, InferRequest, InferResponse, Tensor
from tutti.repository import config, model_config
from tutti.repository.value_bounds import Bounds, Range

INTEGERS = [name for name in NUMPY if name.startswith(("INT", "UINT"))]
GATHER = """
backend: "onnxruntime" max_batch_size: 8
input {{ name: "ids" data_type: TYPE_INT64 dims: -1 {flags} }}
output {{ name: "y" data_type: TYPE_FP32 dims: -1 }}
{extra}
{parameters}
"""
TOGETHER = "dynamic_batching { max_queue_delay_microseconds: 20000 }"


def gather(bounds: Any, extra: str = TOGETHER, flags: str = "", **more: str) -> str:
    """A table of four numbers, and what to say of it; `bounds` as text, or as what becomes JSON."""
    given = {"tutti.bounds": bounds if isinstance(bounds, str) else json.dumps(bounds), **more}
    shown = "\n".join(
        f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}"
        for key, value in given.items()
    )
    return GATHER.format(flags=flags, extra=extra, parameters=shown)


def ids(values: Any) -> InferRequest:
    return InferRequest("gather", {"ids": Tensor.of("ids", np.array(values, dtype=np.int64))})


def refused(answer: Answer, *words: str) -> bool:
    assert isinstance(answer, InvalidArgument), answer
    return all(word in answer.message for word in words)


def looked_up(answer: Answer) -> Any:
    assert isinstance(answer, InferResponse), answer
    return answer.tensor("y").array().tolist()


# The check itself


def ranges(rng: np.random.Generator, datatype: str) -> tuple[int, int]:
    """Often at the ends of the datatype, at 0, or of one value."""
    limits = np.iinfo(NUMPY[datatype])
    special = [limits.min, limits.max, 0, 1, limits.max - 1, limits.min + 1, limits.max // 2, 30_521, -1]
    drawn = [int(rng.choice([-1, 1])) * int(rng.integers(0, 2**63)) >> int(rng.integers(0, 63)) for _ in range(2)]
    chosen = [special[rng.integers(len(special))] if rng.random() < 0.6 else one for one in drawn]
    low, high = sorted(min(max(value, int(limits.min)), int(limits.max)) for value in chosen)
    return (0, high) if high >= 0 and rng.random() < 0.4 else (low, high)


def inside(rng: np.random.Generator, low: int, high: int, count: int) -> list[int]:
    """Values in range, the ends among them."""
    steps = rng.integers(0, high - low, count, np.uint64, endpoint=True)
    values = [low + int(step) for step in steps]
    return [(low, high)[rng.integers(2)] if rng.random() < 0.1 else value for value in values]


def outside(rng: np.random.Generator, low: int, high: int, datatype: str) -> int | None:
    """A value of the datatype that is not in range, most often beside it or an extreme; None where all are."""
    limits = np.iinfo(NUMPY[datatype])
    edges = [
        low - 1,
        high + 1,
        int(limits.min),
        int(limits.max),
        -1,
        2**40,
        -(2**40),
        2**31,
        2**63,
        *rng.integers(-9, 9, 4),
    ]
    possible = [int(value) for value in edges if limits.min <= value <= limits.max and not low <= value <= high]
    return possible[rng.integers(len(possible))] if possible else None


def laid_out(rng: np.random.Generator, array: Array) -> Iterator[Array]:
    """The values in memory of several kinds."""
    rows = array.reshape(-1, 16)
    yield array
    yield rows
    yield np.repeat(rows, 2, axis=1)[:, ::2]
    yield np.asfortranarray(rows)
    yield rows.reshape(-1, 4, 4)[::-1].transpose(0, 2, 1)
    still = rows.copy()
    still.setflags(write=False)
    yield still


def verdict(bounds: Bounds, array: Array) -> str:
    try:
        bounds.check("x", array)
    except InvalidArgument as error:
        return error.message
    return ""


def told(low: int, high: int, array: Array) -> str:
    """As `verdict`, value by value."""
    for at in np.ndindex(array.shape):
        value = int(array[at])
        if not low <= value <= high:
            return f"input 'x': expected values from {low} to {high}, got {value} at {list(at)}"
    return ""


def test_a_million_values_are_judged_as_plain_python_judges_them() -> None:
    rng = np.random.default_rng(0)
    seen = passed = 0
    for turn in range(1200):
        datatype = INTEGERS[turn % len(INTEGERS)]
        low, high = ranges(rng, datatype)
        values = inside(rng, low, high, 160)
        bad = outside(rng, low, high, datatype) if turn % 3 else None
        if bad is not None:
            values[rng.integers(len(values))] = bad
        bounds = Bounds({"x": Range(datatype, low, high)})
        flat = np.array(values, NUMPY[datatype])
        assert flat.tolist() == values, "nothing was cut off on the way"
        for array in laid_out(rng, flat):
            assert verdict(bounds, array) == told(low, high, array), (datatype, low, high)
            seen += array.size
            passed += bad is None
    assert seen > 1_000_000
    assert 2000 < passed < 5000, "some of both"


def test_every_value_of_small_datatypes_against_every_kind_of_range() -> None:
    for datatype in ("INT8", "UINT8"):
        limits = np.iinfo(NUMPY[datatype])
        every = [np.array([value], NUMPY[datatype]) for value in range(limits.min, limits.max + 1)]
        for low in range(limits.min, limits.max + 1, 17):
            for high in range(low, limits.max + 1, 13):
                limit = Range(datatype, low, high)
                assert [limit.holds(one) for one in every] == [low <= int(one[0]) <= high for one in every]


@pytest.mark.parametrize("shape", [(0,), (0, 7), (3, 0), (0, 0, 0)])
@pytest.mark.parametrize("datatype", INTEGERS)
def test_what_is_empty_is_in_range(datatype: str, shape: tuple[int, ...]) -> None:
    Bounds({"x": Range(datatype, 1, 2)}).check("x", np.zeros(shape, NUMPY[datatype]))


def test_arrays_of_another_datatype_or_byte_order_are_judged_by_their_values() -> None:
    bounds = Bounds({"x": Range("INT64", 0, 30_521)})
    for dtype in (">i8", np.int32, np.int16, np.int8, np.float64):
        bounds.check("x", np.array([0, 100], dtype))
        with pytest.raises(InvalidArgument, match=r"got -1(\.0)? at \[1\]"):
            bounds.check("x", np.array([0, -1], dtype))
    with pytest.raises(InvalidArgument, match="got nan"):
        bounds.check("x", np.array([np.nan]))


def test_inputs_without_bounds_and_inputs_that_are_not_there_are_left_alone() -> None:
    bounds = Bounds({"x": Range("INT32", 0, 3), "gone": Range("INT32", 0, 3)})
    bounds.check_all({"y": np.array([99]), "x": np.array([3], np.int32)})
    with pytest.raises(InvalidArgument, match=r"input 'x': expected values from 0 to 3, got 4 at \[0, 1\]"):
        bounds.check_all({"y": np.array([99]), "x": np.array([[3, 4]], np.int32)})


# The parameter


def test_bounds_are_read_from_the_configuration() -> None:
    model = config.parse(gather({"ids": [0, 3]}), "m")
    assert model.bounds == Bounds({"ids": Range("INT64", 0, 3)})
    assert config.parse(gather({}), "m").bounds == config.parse(gather({}).partition("parameters")[0], "m").bounds


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"ids": [0, ' + "9" * 5000 + "]}", "expected JSON"),
        ("[0, 3]", "expected an object"),
        ("3", "expected an object"),
        ('{"ids": [0, 3], "ids": [0, 3]}', "'ids' appears more than once"),
        ({"nope": [0, 3]}, r"expected one of \['ids'\], got 'nope'"),
        ({"y": [0, 3]}, "got 'y'"),
        ({"ids": [0]}, "expected the lowest and the highest value"),
        ({"ids": 3}, "expected the lowest and the highest value"),
        ({"ids": [0, 3, 4]}, "expected the lowest and the highest value"),
        ({"ids": {"0": 3}}, "expected the lowest and the highest value"),
        ({"ids": [0.0, 3]}, "expected the lowest and the highest value"),
        ({"ids": [False, True]}, "expected the lowest and the highest value"),
        ({"ids": [None, 3]}, "expected the lowest and the highest value"),
        ('{"ids": [0, NaN]}', "expected the lowest and the highest value"),
        ({"ids": [4, 3]}, "the lowest value 4 is above the highest 3"),
        ({"ids": [0, 2**63]}, "INT64 has values from -9223372036854775808 to 9223372036854775807"),
    ],
)
def test_wrong_bounds_are_refused_with_their_path(bounds: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^model 'm': parameters.tutti.bounds: .*{says}"):
        config.parse(gather(bounds), "m")


@pytest.mark.parametrize("data_type", ["TYPE_FP32", "TYPE_BOOL", "TYPE_STRING", "TYPE_BF16"])
def test_only_integers_have_bounds(data_type: str) -> None:
    with pytest.raises(ConfigError, match="input 'ids': expected integers"):
        config.parse(gather({"ids": [0, 1]}).replace("TYPE_INT64", data_type), "m")


@pytest.mark.parametrize("backend", ['backend: "python"', "ensemble_scheduling { step { model_name: 'a' } }"])
def test_bounds_that_nobody_would_look_at_are_refused(backend: str) -> None:
    text = gather({"ids": [0, 3]}, extra="").replace('backend: "onnxruntime"', backend)
    with pytest.raises(ConfigError, match="only backends that join a batch look at it"):
        config.parse(text, "m")


@pytest.mark.parametrize(("value", "is_fine"), [("0", True), ("3", True), ("4", False), ("-1", False)])
def test_what_padding_fills_in_must_be_in_range(value: str, is_fine: bool) -> None:
    text = gather({"ids": [0, 3]}, **{"tutti.buckets.ids": "4", "tutti.pad_value.ids": value})
    if is_fine:
        assert config.parse(text, "m").bounds.ranges["ids"].high == 3
        return
    with pytest.raises(ConfigError, match=f"tutti.bounds: input 'ids' takes 0 to 3, and is padded with {value}"):
        config.parse(text, "m")


@pytest.mark.parametrize(("pair", "is_fine"), [([0, 1], True), ([0, 0], False), ([1, 1], False)])
def test_a_mask_that_is_filled_in_must_be_in_range(pair: list[int], is_fine: bool) -> None:
    flags = '} input { name: "mask" data_type: TYPE_INT64 dims: -1 optional: true'
    text = gather({"mask": pair}, flags=flags, **{"tutti.buckets.ids": "4", "tutti.mask.ids": "mask"})
    if is_fine:
        config.parse(text, "m")
        return
    with pytest.raises(ConfigError, match=r"input 'mask' takes . to ., and is padded with [01]$"):
        config.parse(text, "m")


# In a batch


class Recording(JoinedBackend):
    """As on a device, whose turns it counts: keeps what it was asked to execute."""

    def __init__(self, model: model_config.ModelConfig) -> None:
        super().__init__(model, "1")
        self.feeds: list[Array] = []
        self._engine = self._pipeline = self  # type: ignore[assignment]
        self.turns = 0

    def turn(self, pipeline: object) -> "Recording":
        self.turns += 1
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> Sequence[Array]:
        self.feeds.append(feed["ids"].copy())
        return [feed["ids"].astype(np.float32)]


class Nobody:
    def settle(self, calls: Sequence[Call]) -> None:
        raise AssertionError("backends hand answers back")


def test_nothing_out_of_range_gets_to_a_device() -> None:
    backend = Recording(config.parse(gather({"ids": [0, 3]}), "m"))
    rng = np.random.default_rng(1)
    for _ in range(200):
        batch = [rng.integers(-1, 5, (1, 3)) for _ in range(4)]
        backend.feeds, backend.turns = [], 0
        answers = backend.execute([Call(ids(one), Nobody()) for one in batch])
        good = [one for one in batch if one.min() >= 0 and one.max() <= 3]
        assert backend.turns == len(backend.feeds) == bool(good), "one for all the others, and none for culprits"
        assert np.array_equal(np.concatenate([*backend.feeds, batch[0][:0]]), np.concatenate([*good, batch[0][:0]]))
        for one, answer in zip(batch, answers, strict=True):
            is_good = one.min() >= 0 and one.max() <= 3
            assert looked_up(answer) == one.tolist() if is_good else refused(answer, "model 'm': input 'ids'")  # type: ignore[arg-type]


def one_spoilt(at: int, count: int = 64, rows: int = 2, length: int = 3) -> tuple[list[InferRequest], list[Array]]:
    """`count` requests of which one has an id that is no row, in its last place."""
    rng = np.random.default_rng(at)
    arrays = [rng.integers(0, 4, (rows, length)) for _ in range(count)]
    arrays[at][-1, -1] = 4
    return [ids(array) for array in arrays], arrays


@pytest.mark.parametrize("at", [0, 31, 63])
def test_of_64_with_one_culprit_63_are_one_execution(at: int) -> None:
    backend = Recording(config.parse(gather({"ids": [0, 3]}), "m"))
    requests, arrays = one_spoilt(at)
    answers = backend.execute([Call(request, Nobody()) for request in requests])
    assert len(backend.feeds) == 1
    assert np.array_equal(backend.feeds[0], np.concatenate([*arrays[:at], *arrays[at + 1 :]]))
    assert refused(answers[at], "model 'm': input 'ids': expected values from 0 to 3, got 4 at [1, 2]")  # type: ignore[arg-type]
    for number, (answer, array) in enumerate(zip(answers, arrays, strict=True)):
        assert number == at or looked_up(answer) == array.tolist()  # type: ignore[arg-type]


def test_where_all_are_at_fault_nothing_is_executed() -> None:
    backend = Recording(config.parse(gather({"ids": [0, 3]}), "m"))
    answers = backend.execute([Call(ids([[0, 4 + number]]), Nobody()) for number in range(5)])
    assert not backend.feeds
    for number, answer in enumerate(answers):
        assert refused(answer, f"got {4 + number} at [0, 1]")  # type: ignore[arg-type]


class Picky(Recording):
    """Fails on what holds a 2, and does not say in which row."""

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> Sequence[Array]:
        made = super().run(names, feed)
        if (feed["ids"] == 2).any():
            raise InvalidArgument("a two")
        return made


def test_a_culprit_that_nobody_knows_is_found_by_executing_one_by_one() -> None:
    backend = Picky(config.parse(gather({"ids": [0, 3]}), "m"))
    good, unknown, bad, also = backend.execute([Call(ids([[n]]), Nobody()) for n in (1, 2, 9, 3)])
    assert [feed.tolist() for feed in backend.feeds] == [[[1], [2], [3]], [[1]], [[2]], [[3]]]
    assert (looked_up(good), looked_up(also)) == ([[1]], [[3]])  # type: ignore[arg-type]
    assert refused(unknown, "a two") and refused(bad, "got 9 at [0, 0]")  # type: ignore[arg-type]


def test_text_that_does_not_decode_costs_its_mates_nothing() -> None:
    text = gather({}).replace("TYPE_INT64", "TYPE_STRING")
    backend = Texts(config.parse(text, "m"))
    good = [Tensor("ids", "BYTES", (1, 1), b"\x01\0\0\0" + letter) for letter in (b"a", b"b")]
    bad = Tensor("ids", "BYTES", (1, 1), b"\x09\0\0\0x")
    requests = [InferRequest("m", {"ids": tensor}) for tensor in (good[0], bad, good[1])]
    first, other, last = backend.execute([Call(request, Nobody()) for request in requests])
    assert [feed.tolist() for feed in backend.feeds] == [[[b"a"], [b"b"]]]
    assert isinstance(first, InferResponse) and isinstance(last, InferResponse)
    assert refused(other, "model 'm': tensor 'ids'")  # type: ignore[arg-type]


class Texts(Recording):
    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> Sequence[Array]:
        self.feeds.append(feed["ids"].copy())
        return [np.zeros(feed["ids"].shape, np.float32)]


def test_rows_that_reach_a_step_as_one_request_are_told_apart(repository: Repository) -> None:
    """An ensemble's rows of several requests travel as one: what fails is asked again by request, together."""
    repository.add("gather", gather({"ids": [0, 3]}), {"model.onnx": onnx_gather()})
    repository.add(
        "chain",
        """
        platform: "ensemble" max_batch_size: 8
        input { name: "IDS" data_type: TYPE_INT64 dims: -1 }
        output { name: "Y" data_type: TYPE_FP32 dims: -1 }
        ensemble_scheduling { step { model_name: "gather" input_map { key: "ids" value: "IDS" }
          output_map { key: "y" value: "Y" } } }
        """,
        {},
    )
    arrays = [[[n % 4, 1]] for n in range(8)]
    arrays[5] = [[1, 4]]
    with engine_over(repository.root) as engine:
        given = [InferRequest("chain", {"IDS": Tensor.of("IDS", np.array(one, np.int64))}) for one in arrays]
        answers = infer(engine, given)
    for number, (answer, array) in enumerate(zip(answers, arrays, strict=True)):
        if number == 5:
            assert refused(answer, "model 'gather': input 'ids': expected values from 0 to 3, got 4 at [0, 1]")
        else:
            assert isinstance(answer, InferResponse), answer
            assert answer.tensor("Y").array().tolist() == [[10.0 * n for n in array[0]]]


def test_the_culprit_is_refused_and_its_mates_are_answered(repository: Repository) -> None:
    repository.add("gather", gather({"ids": [0, 3]}), {"model.onnx": onnx_gather()})
    with engine_over(repository.root) as engine:
        good, bad, low, other = infer(engine, [ids([[1, 2]]), ids([[1, 0], [1, 2**40]]), ids([[-1, 0]]), ids([[3, 0]])])
    assert looked_up(good) == [[10, 20]]
    assert looked_up(other) == [[30, 0]]
    assert refused(bad, "model 'gather': input 'ids': expected values from 0 to 3, got 1099511627776 at [1, 1]")
    assert refused(low, "got -1 at [0, 0]"), "the graph itself would count from the end"


def test_padded_requests_are_refused_alone(repository: Repository) -> None:
    parameters = {"tutti.buckets.ids": "4, 8", "tutti.pad_value.ids": "3", "tutti.unpad.y": "ids"}
    repository.add("gather", gather({"ids": [0, 3]}, **parameters), {"model.onnx": onnx_gather()})
    with engine_over(repository.root) as engine:
        good, bad, other = infer(engine, [ids([[1]]), ids([[0, 0, 4]]), ids([[3, 2]])])
    assert (looked_up(good), looked_up(other)) == ([[10]], [[30, 20]])
    assert refused(bad, "input 'ids'", "got 4 at [0, 2]")


def test_ragged_requests_are_refused_alone(repository: Repository) -> None:
    extra = TOGETHER + '\nbatch_output { target_name: "y" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "ids" }'
    text = gather({"ids": [0, 3]}, extra, "allow_ragged_batch: true")
    repository.add("gather", text, {"model.onnx": flat_gather()})
    with engine_over(repository.root) as engine:
        good, bad, other = infer(engine, [ids([[1]]), ids([[0, 0, 4]]), ids([[3, 2]])])
    assert (looked_up(good), looked_up(other)) == ([[10]], [[30, 20]])
    assert refused(bad, "input 'ids'", "got 4 at [0, 2]"), "where it stands in the request, not in the batch"


def flat_gather() -> bytes:
    import onnx

    model = onnx.load_from_string(onnx_gather())
    for value in (*model.graph.input, *model.graph.output):
        del value.type.tensor_type.shape.dim[1:]
    return bytes(model.SerializeToString())


def test_large_requests_that_run_one_by_one_are_refused_alone(repository: Repository) -> None:
    repository.add("gather", gather({"ids": [0, 3]}), {"model.onnx": onnx_gather()})
    large = np.tile([0, 1, 2, 3], 20_000)[np.newaxis]
    bad = large.copy()
    bad[0, -1] = 2**62
    with engine_over(repository.root) as engine:
        for _ in range(12):  # together, and one by one, as each has proved to be
            answers = infer(engine, [ids(large), ids(bad), ids(large)])
            assert refused(answers[1], f"got {2**62} at [0, 79999]")
            for answer in (answers[0], answers[2]):
                assert looked_up(answer)[0][-4:] == [0, 10, 20, 30]


def test_a_models_sequences_keep_their_controls_and_states(repository: Repository) -> None:
    """Correlation ids and states are the server's own: they have no bounds, whatever they are."""
    repository.add(
        "gather",
        gather(
            {"ids": [0, 3]},
            """
            sequence_batching {
              control_input { name: "id" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_INT64 } }
              state { input_name: "before" output_name: "after" data_type: TYPE_INT64 dims: 1 }
            }
            """,
        ),
        {"model.onnx": counting_gather()},
    )
    with engine_over(repository.root) as engine:
        answers = []
        for number, last in enumerate((3, 4, 2)):
            given = {"sequence_id": 2**20, "sequence_start": number == 0}
            request = InferRequest("gather", ids([[last]]).inputs, parameters=given)  # type: ignore[arg-type]
            answers += infer(engine, [request])
    assert looked_up(answers[0]) == [[30 + 2**20]]
    assert refused(answers[1], "input 'ids'", "got 4 at [0, 0]")
    assert looked_up(answers[2]) == [[20 + 2**21]], "the refused request has changed no state"


def counting_gather() -> bytes:
    """after = before + id, y = table[ids] + after."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load_from_string(onnx_gather())
    for name in ("id", "before"):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", 1]))
    model.graph.output.append(helper.make_tensor_value_info("after", TensorProto.INT64, ["batch", 1]))
    model.graph.node[0].output[0] = "found"
    model.graph.node.extend(
        [
            helper.make_node("Add", ["before", "id"], ["after"]),
            helper.make_node("Cast", ["after"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["found", "float"], ["y"]),
        ]
    )
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(("pair", "is_fine"), [([0, 3], True), ([1, 3], True), ([-(2**63), 2**63 - 1], False)])
def test_random_warm_up_data_is_in_range(repository: Repository, pair: list[int], is_fine: bool) -> None:
    """Without bounds that are the table's, the graph itself fails on it."""
    item = 'inputs { key: "ids" value { data_type: TYPE_INT64 dims: 50 random_data: true } }'
    text = gather({"ids": pair}, f'{TOGETHER} model_warmup {{ name: "w" batch_size: 2 {item} }}')
    repository.add("gather", text, {"model.onnx": onnx_gather()})
    with engine_over(repository.root) as engine:
        failures = engine.failures()
    assert (not failures) is is_fine, failures


def test_warm_up_data_out_of_range_refuses_the_model(repository: Repository) -> None:
    item = 'inputs { key: "ids" value { data_type: TYPE_INT64 dims: 2 zero_data: true } }'
    text = gather({"ids": [1, 3]}, f'{TOGETHER} model_warmup {{ name: "w" {item} }}')
    repository.add("gather", text, {"model.onnx": onnx_gather()})
    with engine_over(repository.root) as engine:
        (failure,) = engine.failures()
    assert "model_warmup 'w' failed: model 'gather': input 'ids': expected values from 1 to 3, got 0" in failure


def test_over_http_it_is_a_400_that_names_model_and_tensor(repository: Repository, tmp_path: Path) -> None:
    repository.add("gather", gather({"ids": [0, 3]}), {"model.onnx": onnx_gather()})
    with serving(repository.root, tmp_path / "log") as served:
        url = f"http://{served.http}/v2/models/gather/infer"

        def ask(*values: int) -> tuple[int, Any]:
            tensor = {"name": "ids", "datatype": "INT64", "shape": [1, len(values)], "data": values}
            request = urllib.request.Request(url, json.dumps({"inputs": [tensor]}).encode())
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    return answer.status, json.load(answer)["outputs"][0]["data"]
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, json.load(error)["error"]

        assert ask(3, 0) == (200, [30, 0])
        for value in (4, -1, 2**40, -(2**63), 2**63 - 1):
            what = f"model 'gather': input 'ids': expected values from 0 to 3, got {value} at [0, 1]"
            assert ask(0, value) == (400, what)
        assert ask(2, 1) == (200, [20, 10])
