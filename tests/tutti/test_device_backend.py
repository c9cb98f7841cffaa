"""Models on a device, from requests to answers: the pytorch backend over the device engine, on a simulated GPU."""

import json
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import Gather, engine_over, infer
from tests.tutti.test_pytorch_backend import CONFIG, Subtract, ask, exported, scripted
from tutti.backends import registry
from tutti.backends.completion import open_model
from tutti.core.errors import (
    Cancelled,
    DeadlineExceeded,
    DeviceLost,
    InferError,
    Internal,
    InvalidArgument,
    OutOfMemory,
)
from tutti.core.types import Call, InferRequest, InferResponse, Tensor, now_ns
from tutti.devices import health, process_engines

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.usefixtures("simulated_gpu"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ON_GPU = " instance_group { kind: KIND_GPU }"
IDS = """
backend: "pytorch" max_batch_size: 64
input [ { name: "ids" data_type: TYPE_INT64 dims: -1 } ]
output [ { name: "vectors" data_type: TYPE_FP32 dims: [ -1, 4 ] } ]
dynamic_batching { }
instance_group { kind: KIND_GPU }
"""


# All of a test's requests are there before it begins.
HELD = "dynamic_batching { preferred_batch_size: 64 max_queue_delay_microseconds: 20000000 }"


@pytest.mark.parametrize("is_urgent", [False, True])
def test_an_instance_waits_as_eagerly_as_it_is_told(repository: Repository, is_urgent: bool) -> None:
    """`output_copy_stream` changes nothing: outputs have a stream of their own anyway."""
    cuda = f"busy_wait_events: {str(is_urgent).lower()} output_copy_stream: {str(is_urgent).lower()}"
    repository.add("m", IDS + f"optimization {{ cuda {{ {cuda} }} }}", {"model.pt": scripted(Embed())})
    with engine_over(repository.root) as engine:
        (pipeline,) = process_engines.engine_of("cuda:0").pipelines()
        assert pipeline.is_urgent == is_urgent
        (answer,) = infer(engine, [ids_request(1)])
        assert isinstance(answer, InferResponse)


class Embed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(100, 4)
        with torch.no_grad():
            self.table.weight.copy_(torch.arange(400.0).reshape(100, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


def ids_request(*ids: int, model: str = "m") -> InferRequest:
    return InferRequest(model, {"ids": Tensor.of("ids", np.array([ids], np.int64))})


def test_a_batch_on_a_device_is_joined_executed_once_and_split(repository: Repository) -> None:
    text = CONFIG.format(backend='backend: "pytorch"', a="left", b="right", y="difference", z="total")
    repository.add("m", text + ON_GPU, {"model.pt2": exported(Subtract())})
    for n, answer in enumerate(ask(repository.root, "left", "right")):
        assert answer.tensor("difference").array().tolist() == [[10.0 - n] * 3] * (n + 1)
        assert answer.tensor("total").array().tolist() == [[3 * (10.0 - n)]] * (n + 1)
    assert process_engines.engine_of("cuda:0").busy_ns >= 0
    assert not process_engines.engine_of("cuda:0").pipelines()


def test_many_requests_of_many_shapes_get_their_own_rows(repository: Repository) -> None:
    repository.add("m", IDS, {"model.pt": scripted(Embed())})
    rng = np.random.default_rng(0)
    requests = [ids_request(*rng.integers(0, 100, rng.integers(1, 9)).tolist()) for _ in range(500)]
    with engine_over(repository.root) as engine:
        answers = infer(engine, requests)
        counts = engine.model("m", "").statistics.counts
        assert counts.executions < 250
        assert counts.inferences == 500
    for request, answer in zip(requests, answers, strict=True):
        assert isinstance(answer, InferResponse)
        first = request.inputs["ids"].array()[..., np.newaxis] * 4.0
        assert np.array_equal(answer.tensor("vectors").array(), first + np.arange(4.0))


def test_an_id_out_of_bounds_does_not_reach_the_device(repository: Repository) -> None:
    bounds = json.dumps({"ids": [0, 99]}).replace('"', '\\"')
    text = IDS + f'parameters {{ key: "tutti.bounds" value {{ string_value: "{bounds}" }} }}'
    repository.add("m", text, {"model.pt": scripted(Embed())})
    with engine_over(repository.root) as engine:
        good, bad, also = infer(engine, [ids_request(1, 2), ids_request(3, 1 << 40), ids_request(5, 99)])
    assert isinstance(bad, InvalidArgument) and "input 'ids': expected values from 0 to 99" in bad.message
    for answer, first in ((good, 4.0), (also, 20.0)):
        assert isinstance(answer, InferResponse)
        assert answer.tensor("vectors").array()[0, 0, 0] == first
    assert not health.health.failures()


BOUNDED = IDS + """parameters { key: "tutti.bounds" value { string_value: '{"ids": [0, 99]}' } }"""
BUCKETS = """
    parameters { key: "tutti.buckets.ids" value { string_value: "4, 8" } }
    parameters { key: "tutti.unpad.vectors" value { string_value: "ids" } }"""


def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each execution that reaches a device, from now on."""
    from tutti.backends.on_device import DeviceBatch

    seen: list[int] = []
    launch = DeviceBatch.launch

    def counted(self: DeviceBatch, arrays: Sequence[np.ndarray], stream: object) -> object:
        seen.append(len(arrays[0]))
        return launch(self, arrays, stream)  # type: ignore[arg-type]

    monkeypatch.setattr(DeviceBatch, "launch", counted)
    return seen


@pytest.mark.parametrize("extra", ["", BUCKETS])
@pytest.mark.parametrize("at", [0, 40, 63])
def test_of_64_with_one_culprit_63_are_one_execution(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, at: int, extra: str
) -> None:
    text = BOUNDED.replace("dynamic_batching { }", HELD) + extra
    repository.add("m", text, {"model.pt": scripted(Embed())})
    given = [[n, n + 1, 99 - n] for n in range(64)]
    given[at][2] = 100
    seen = launches(monkeypatch)
    with engine_over(repository.root) as engine:
        answers = infer(engine, [ids_request(*ids) for ids in given])
        counts = engine.model("m", "").statistics.counts
        assert (counts.executions, counts.inferences, counts.fail.count) == (1, 63, 1)
    assert seen == [63]
    for number, (answer, ids) in enumerate(zip(answers, given, strict=True)):
        if number == at:
            assert isinstance(answer, InvalidArgument)
            assert answer.message == "model 'm': input 'ids': expected values from 0 to 99, got 100 at [0, 2]"
        else:
            assert isinstance(answer, InferResponse), answer
            assert answer.tensor("vectors").array()[0, :, 0].tolist() == [4.0 * i for i in ids]


@pytest.mark.parametrize("extra", ["", BUCKETS])
def test_so_they_are_where_instances_take_turns(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    """Where a rate limiter says when an instance executes, its thread waits for each batch."""
    repository.add("m", BOUNDED + extra, {"model.pt": scripted(Embed())})
    seen = launches(monkeypatch)
    (backend,) = registry.load(open_model(repository.root, "m"), 1, lambda calls: None)
    try:
        given = [ids_request(n, n + 1, 100 * (n == 5)) for n in range(9)]
        answers = backend.execute([Call(request, Gather(1)) for request in given])
        assert not callable(answers)
    finally:
        backend.close()
    assert seen == [8]
    for n, answer in enumerate(answers):
        if n == 5:
            assert isinstance(answer, InvalidArgument) and "got 100 at [0, 2]" in answer.message
        else:
            assert isinstance(answer, InferResponse), answer
            assert answer.tensor("vectors").array()[0, :, 0].tolist() == [4.0 * n, 4.0 * n + 4, 0.0]


def test_where_all_are_at_fault_nothing_is_executed(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    repository.add("m", BOUNDED, {"model.pt": scripted(Embed())})
    seen = launches(monkeypatch)
    with engine_over(repository.root) as engine:
        answers = infer(engine, [ids_request(1, 100 + n) for n in range(9)])
        (after,) = infer(engine, [ids_request(1)])
        assert engine.model("m", "").statistics.counts.executions == 1
    for n, answer in enumerate(answers):
        assert isinstance(answer, InvalidArgument) and f"got {100 + n} at [0, 1]" in answer.message
    assert isinstance(after, InferResponse) and seen == [1]


def test_a_broken_sink_of_a_culprit_does_not_end_the_device(repository: Repository) -> None:
    class Broken:
        def settle(self, calls: Sequence[Call]) -> None:
            raise RuntimeError("nobody is there")

    repository.add("m", BOUNDED, {"model.pt": scripted(Embed())})
    with engine_over(repository.root) as engine:
        engine([Call(ids_request(100), Broken())])
        (after,) = infer(engine, [ids_request(1)])
    assert isinstance(after, InferResponse)


def test_ragged_ids_are_looked_at_too(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    text = BOUNDED.replace("dims: -1", "dims: -1 allow_ragged_batch: true").replace("dims: [ -1, 4 ]", "dims: -1")
    text += 'batch_output { target_name: "vectors" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "ids" }'
    repository.add("m", text.replace("dynamic_batching { }", HELD), {"model.pt": scripted(Doubled())})
    seen = launches(monkeypatch)
    with engine_over(repository.root) as engine:
        answers = infer(engine, [ids_request(*range(n % 5 + 1)) for n in range(63)] + [ids_request(1, 2, 1 << 40)])
    assert isinstance(answers[-1], InvalidArgument) and f"got {1 << 40} at [0, 2]" in answers[-1].message
    for n, answer in enumerate(answers[:-1]):
        assert isinstance(answer, InferResponse), answer
        assert answer.tensor("vectors").array().tolist() == [[2.0 * i for i in range(n % 5 + 1)]]
    assert len(seen) == 1
    assert not health.health.failures()


class Doubled(torch.nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.to(torch.float32) * 2


def test_without_bounds_it_ends_the_device_and_everybody_is_told(repository: Repository) -> None:
    repository.add("m", IDS, {"model.pt": scripted(Embed())})
    repository.add("other", IDS, {"model.pt": scripted(Embed())})
    with engine_over(repository.root) as engine:
        (bad,) = infer(engine, [ids_request(1 << 40)])
        later = infer(engine, [ids_request(1), ids_request(1, model="other")])
    for answer in (bad, *later):
        assert isinstance(answer, DeviceLost)
        assert "cuda:0 has failed" in answer.message
    assert "device-side assert" in health.health.reason("cuda:0")


class Picky(torch.nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if bool((ids == 13).any()):
            raise ValueError("thirteen")
        return ids.unsqueeze(-1).expand(-1, -1, 4).to(torch.float32)


def test_only_the_request_that_fails_fails(repository: Repository) -> None:
    repository.add("m", IDS, {"model.pt": scripted(Picky())})
    with engine_over(repository.root) as engine:
        one, bad, two = infer(engine, [ids_request(1), ids_request(13), ids_request(2)])
    assert isinstance(bad, Internal) and "model 'm': PyTorch failed on input 'ids' INT64[1, 1]" in bad.message
    assert [a.tensor("vectors").array()[0, 0, 0] for a in (one, two) if isinstance(a, InferResponse)] == [1.0, 2.0]


class Hungry(torch.nn.Module):
    """Needs more memory than there is for more than `most` rows."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape[0] > self.most:
            raise RuntimeError("CUDA error: out of memory")
        return ids.unsqueeze(-1).expand(-1, -1, 4).to(torch.float32)


@pytest.mark.parametrize(("most", "fails"), [(3, False), (0, True)])
def test_out_of_memory_halves_the_batch_and_is_remembered(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, most: int, fails: bool
) -> None:
    from tutti.devices import errors
    from tutti.devices.simulated import SimulatedDevice

    monkeypatch.setattr(SimulatedDevice, "is_memory_error", lambda self, error: "out of memory" in str(error))
    assert errors.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    repository.add("m", IDS, {"model.pt": scripted(Hungry(most))})
    with engine_over(repository.root) as engine:
        answers = infer(engine, [ids_request(n) for n in range(24)])
        after = infer(engine, [ids_request(n) for n in range(24)])
    for n, answer in enumerate(answers + after):
        if fails:
            assert isinstance(answer, OutOfMemory)
        else:
            assert isinstance(answer, InferResponse)
            assert answer.tensor("vectors").array()[0, 0, 0] == n % 24


class Identity(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    "datatype", ["BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "FP16", "FP32", "FP64", "BF16"]
)
def test_every_datatype_goes_there_and_back(repository: Repository, datatype: str) -> None:
    text = (
        f"""backend: "pytorch" max_batch_size: 8 dynamic_batching {{ }}
    input [ {{ name: "x" data_type: TYPE_{datatype} dims: [ -1, 3 ] }} ]
    output [ {{ name: "y" data_type: TYPE_{datatype} dims: [ -1, 3 ] }} ]"""
        + ON_GPU
    )
    repository.add("m", text, {"model.pt": scripted(Identity())})
    size = {"BOOL": 1, "INT8": 1, "UINT8": 1, "INT32": 4, "FP32": 4, "INT64": 8, "FP64": 8}.get(datatype, 2)
    raws = [bytes([n % 2 for n in range(rows * 6 * size)]) for rows in (1, 2, 5)]
    requests = [
        InferRequest("m", {"x": Tensor("x", datatype, (rows, 2, 3), raw)})
        for rows, raw in zip((1, 2, 5), raws, strict=True)
    ]
    with engine_over(repository.root) as engine:
        answers = infer(engine, requests)
    for raw, answer in zip(raws, answers, strict=True):
        assert isinstance(answer, InferResponse), answer
        assert bytes(answer.tensor("y").raw()) == raw


def test_large_answers_are_views_that_stay_right(repository: Repository) -> None:
    text = (
        """backend: "pytorch" max_batch_size: 4
    input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] } ]
    output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] } ]"""
        + ON_GPU
    )
    repository.add("m", text, {"model.pt": scripted(Identity())})

    def requests(numbers: Sequence[int]) -> list[InferRequest]:
        arrays = [np.full((1, 50_000), n, np.float32) for n in numbers]
        return [InferRequest("m", {"x": Tensor.of("x", array)}) for array in arrays]

    with engine_over(repository.root) as engine:
        kept = [infer(engine, requests([n]))[0] for n in range(10)]
        infer(engine, requests(range(100, 140)))
        device_engine = process_engines.engine_of("cuda:0")
        assert device_engine.arena.owned_bytes() >= 10 * 200_000
    for n, answer in enumerate(kept):
        assert isinstance(answer, InferResponse)
        assert (answer.tensor("y").array() == n).all()
    kept.clear()
    del answer
    assert device_engine.arena.owned_bytes() == 0


def test_an_output_that_the_caller_takes_stays_on_the_device(repository: Repository) -> None:
    repository.add("m", IDS, {"model.pt": scripted(Embed())})
    text = (
        """backend: "pytorch" max_batch_size: 64 dynamic_batching { }
    input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, 4 ] } ]
    output [ { name: "y" data_type: TYPE_FP32 dims: [ -1, 4 ] } ]"""
        + ON_GPU
    )
    repository.add("next", text, {"model.pt": scripted(Identity())})
    first = [ids_request(n, n + 1) for n in range(5)]
    for request in first:
        request.device_outputs = frozenset({"vectors"})
    with engine_over(repository.root) as engine:
        made = infer(engine, first)
        tensors = []
        for answer in made:
            assert isinstance(answer, InferResponse), answer
            tensors.append(answer.tensor("vectors"))
            assert not isinstance(tensors[-1].data, np.ndarray | bytes | memoryview)
        following = [InferRequest("next", {"x": Tensor("x", "FP32", t.shape, t.data)}) for t in tensors]
        answers = infer(engine, following)
    for n, answer in enumerate(answers):
        assert not isinstance(answer, InferError), answer
        assert answer.tensor("y").array()[0, :, 0].tolist() == [n * 4.0, n * 4.0 + 4.0]


def test_padding_and_reshape_hold_on_a_device(repository: Repository) -> None:
    text = (
        IDS.replace("dims: -1 }", "dims: -1 }").replace("[ -1, 4 ] }", "[ -1, 4 ] }")
        + """
    parameters { key: "tutti.buckets.ids" value { string_value: "4, 8" } }
    parameters { key: "tutti.unpad.vectors" value { string_value: "ids" } }"""
    )
    repository.add("m", text, {"model.pt": scripted(Embed())})
    with engine_over(repository.root) as engine:
        answers = infer(engine, [ids_request(*range(1, n + 1)) for n in range(1, 9)])
        assert engine.model("m", "").statistics.counts.executions <= 3
    for n, answer in enumerate(answers, 1):
        assert isinstance(answer, InferResponse), answer
        assert answer.tensor("vectors").array()[0, :, 0].tolist() == [4.0 * i for i in range(1, n + 1)]


CHAIN = """
platform: "ensemble" max_batch_size: 64
input [ { name: "IDS" data_type: TYPE_INT64 dims: -1 } ]
output [ { name: "LAST" data_type: TYPE_FP32 dims: [ -1, 4 ] } ]
ensemble_scheduling { step [
  { model_name: "embed" input_map { key: "ids" value: "IDS" } output_map { key: "vectors" value: "A" } },
  { model_name: "same" input_map { key: "x" value: "A" } output_map { key: "y" value: "B" } },
  { model_name: "same" input_map { key: "x" value: "B" } output_map { key: "y" value: "LAST" } } ] }
"""
SAME = """backend: "pytorch" max_batch_size: 64 dynamic_batching { }
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, 4 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1, 4 ] } ]"""


@pytest.mark.parametrize("is_last_on_gpu", [True, False])
@pytest.mark.parametrize("count", [1, 7])
def test_tensors_stay_on_the_device_between_steps(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, is_last_on_gpu: bool, count: int
) -> None:
    from tutti.devices.simulated import SimulatedDevice

    copied: list[int] = []
    copy_out = SimulatedDevice.copy_out
    monkeypatch.setattr(
        SimulatedDevice, "copy_out", lambda self, source, *rest: (copied.append(1), copy_out(self, source, *rest))[1]
    )
    repository.add("embed", IDS, {"model.pt": scripted(Embed())})
    repository.add("same", SAME + (ON_GPU if is_last_on_gpu else ""), {"model.pt": scripted(Identity())})
    if not is_last_on_gpu:
        text = (repository.root / "same" / "config.pbtxt").read_text()
        (repository.root / "same" / "config.pbtxt").write_text(text + " instance_group { kind: KIND_CPU }")
    repository.add("chain", CHAIN, {})
    requests = [
        InferRequest("chain", {"IDS": Tensor.of("IDS", np.array([[n, n + 1]], np.int64))}) for n in range(count)
    ]
    with engine_over(repository.root) as engine:
        answers = infer(engine, requests)
        executed = engine.model("embed", "").statistics.counts.executions
    for n, answer in enumerate(answers):
        assert isinstance(answer, InferResponse), answer
        assert answer.tensor("LAST").array()[0, :, 0].tolist() == [n * 4.0, n * 4.0 + 4.0]
    # Only the last step's outputs leave the device, or the first one's where the others are elsewhere.
    assert len(copied) == executed


def test_what_stays_of_a_model_that_hands_its_input_on_is_kept(repository: Repository) -> None:
    repository.add("same", SAME + ON_GPU, {"model.pt": scripted(Identity())})

    def request(n: int) -> InferRequest:
        made = InferRequest("same", {"x": Tensor.of("x", np.full((1, 1, 4), n, np.float32))})
        made.device_outputs = frozenset({"y"})
        return made

    with engine_over(repository.root) as engine:
        answers = [infer(engine, [request(n)])[0] for n in range(10)]
        for n, answer in enumerate(answers):
            assert isinstance(answer, InferResponse), answer
            assert not isinstance(answer.tensor("y").data, np.ndarray)
            assert answer.tensor("y").array().tolist() == [[[n] * 4]]


class Unreadable:
    """A tensor on a device that gives nothing back."""

    device = "cuda:0"
    nbytes = 16

    def array(self) -> np.ndarray:
        raise RuntimeError("nothing comes from there")


def test_a_batch_that_cannot_be_made_is_answered_and_the_next_one_served(repository: Repository) -> None:
    text = IDS + ' parameters { key: "tutti.buckets.ids" value { string_value: "4, 8" } }'
    repository.add("m", text, {"model.pt": scripted(Embed())})
    unreadable = InferRequest("m", {"ids": Tensor("ids", "INT64", (1, 2), Unreadable())})  # type: ignore[arg-type]
    with engine_over(repository.root) as engine:
        good, bad = infer(engine, [ids_request(1, 2), unreadable])
        (after,) = infer(engine, [ids_request(1, 2)])
    assert isinstance(bad, InferError) and "nothing comes from there" in bad.message
    assert isinstance(good, InferResponse) and isinstance(after, InferResponse)


RAGGED = """
backend: "pytorch" max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: -1 allow_ragged_batch: true }
output { name: "double" data_type: TYPE_FP32 dims: -1 }
batch_input {
  kind: BATCH_ACCUMULATED_ELEMENT_COUNT target_name: "ends" data_type: TYPE_INT32 source_input: "x"
}
batch_output { target_name: "double" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "x" }
dynamic_batching { }
instance_group { kind: KIND_GPU }
"""


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


@pytest.mark.parametrize("stays", [False, True])
def test_ragged_outputs_that_would_stay_are_parts_of_their_inputs_shapes(repository: Repository, stays: bool) -> None:
    repository.add("m", RAGGED, {"model.pt": scripted(Double())})
    inputs = [np.arange(n, dtype=np.float32)[np.newaxis] + 100 * n for n in (3, 1, 7, 3)]
    requests = [InferRequest("m", {"x": Tensor.of("x", x)}) for x in inputs]
    for request in requests:
        request.device_outputs = frozenset({"double"} if stays else ())
    with engine_over(repository.root) as engine:
        answers = infer(engine, requests)
        for x, answer in zip(inputs, answers, strict=True):
            assert isinstance(answer, InferResponse), answer
            assert answer.tensor("double").array().tolist() == (x + x).tolist()


class OnHost(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones(x.shape[0], 4)


def test_outputs_that_a_module_makes_elsewhere_come_to_its_device(repository: Repository) -> None:
    from tutti.backends.completion import open_model
    from tutti.backends.torch_modules import Module

    repository.add("same", SAME, {"model.pt": b""})
    config = open_model(repository.root, "same").config
    module = Module(config, OnHost(), ["x"], "meta")
    (output,) = module({"x": torch.ones(2, 4, device="meta")}, ["y"])
    assert output.device.type == "meta" and output.shape == (2, 4)


def test_parts_of_a_padded_batch_that_failed_are_cut_to_their_own_lengths(repository: Repository) -> None:
    text = (
        IDS
        + """
    parameters { key: "tutti.buckets.ids" value { string_value: "4, 8" } }
    parameters { key: "tutti.unpad.vectors" value { string_value: "ids" } }"""
    )
    repository.add("m", text, {"model.pt": scripted(Picky())})
    with engine_over(repository.root) as engine:
        short, bad, longer = infer(engine, [ids_request(1, 2), ids_request(13, 1), ids_request(5, 6, 7)])
    assert isinstance(bad, Internal)
    for answer, numbers in ((short, [1.0, 2.0]), (longer, [5.0, 6.0, 7.0])):
        assert isinstance(answer, InferResponse), answer
        assert answer.tensor("vectors").array()[0, :, 0].tolist() == numbers


def test_times_are_of_the_hosts_clock_from_the_first_request_on(repository: Repository) -> None:
    repository.add("m", IDS, {"model.pt": scripted(Embed())})
    with engine_over(repository.root) as engine:
        before_ns = now_ns()
        infer(engine, [ids_request(1)])
        infer(engine, [ids_request(1)])
        took_ns = now_ns() - before_ns
        counts = engine.model("m", "").statistics.counts
    stages = [of.ns for of in (counts.queue, counts.compute_input, counts.compute_infer, counts.compute_output)]
    assert min(stages) >= 0 and sum(stages) <= 2 * took_ns  # two requests


@pytest.mark.parametrize(
    ("gone", "kinds"),
    [
        ("ccc", [Cancelled] * 3),
        ("ddd", [DeadlineExceeded] * 3),
        ("cdc", [Cancelled, DeadlineExceeded, Cancelled]),
        ("c", [Cancelled]),
        ("cd-", [InferResponse] * 3),
        ("-cd", [InferResponse] * 3),
    ],
)
def test_a_batch_that_nobody_waits_for_is_not_executed(repository: Repository, gone: str, kinds: list[type]) -> None:
    repository.add("m", IDS, {"model.pt": scripted(Embed())})
    with engine_over(repository.root) as engine:
        may_stage = threading.Event()
        process_engines.engine_of("cuda:0").device.post(lambda: may_stage.wait(30))
        gather = Gather(len(gone))
        calls = [Call(ids_request(n), gather) for n in range(len(gone))]
        engine(calls)
        for call, what in zip(calls, gone, strict=True):
            call.is_cancelled = what == "c"
            call.deadline_ns = 1 if what == "d" else 0
        may_stage.set()
        gather.wait()
        assert [type(call.answer) for call in calls] == kinds
        counts = engine.model("m").statistics.counts
        assert counts.executions == (kinds[0] is InferResponse)
        assert counts.fail.count == sum(kind is not InferResponse for kind in kinds)
        (after,) = infer(engine, [ids_request(1)])
        assert isinstance(after, InferResponse)
