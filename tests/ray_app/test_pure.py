"""What of the Ray application needs no Ray: messages, placement, and the pools' status and choice."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from ray_app.engine import MIN_HOP_ROWS, hop_policy
from ray_app.options import Options
from ray_app.placement import plan_pools
from ray_app.pools import Pool, PoolStatus, ReplicaState, choose
from tests.serving import Gather
from tutti import config, wire
from tutti.batching import BatchingPolicy
from tutti.errors import ConfigError, InvalidArgument
from tutti.types import Call, InferRequest, InferResponse, Tensor


def test_batches_survive_the_wire() -> None:
    texts = np.array([[b"a"], ["ü".encode()]], dtype=object)
    requests = [
        InferRequest(
            "m", {"x": Tensor.of("x", np.full((n, 2), n, np.float32)), "t": Tensor.of("t", texts)}, "2", f"id{n}"
        )
        for n in (1, 3)
    ]
    sink = Gather(2)
    calls = [Call(request, sink) for request in requests]
    calls[1].deadline_ns = 1500
    there = wire.unpack_calls(pickle.loads(pickle.dumps(wire.pack_calls(calls, 1000))), sink, 9000)
    assert [call.deadline_ns for call in there] == [0, 9500], "the time left travels, not a clock's reading"
    for sent, got in zip(requests, [call.request for call in there], strict=True):
        assert (got.model_name, got.model_version, got.id) == ("m", "2", sent.id)
        np.testing.assert_array_equal(got.inputs["x"].array(), sent.inputs["x"].array())
        assert got.inputs["t"].array().tolist() == texts.tolist()


def test_answers_survive_the_wire_errors_among_them() -> None:
    answers = [
        InferResponse("m", "1", [Tensor.of("y", np.arange(4, dtype=np.int64))], {"p": 1}),
        InvalidArgument("no"),
        InferResponse("m", "1", [Tensor.of("y", np.zeros((0, 2), np.float32))]),
    ]
    first, error, empty = wire.unpack_answers(pickle.loads(pickle.dumps(wire.pack_answers(answers))))
    assert isinstance(first, InferResponse)
    assert first.tensor("y").array().tolist() == [0, 1, 2, 3]
    assert first.parameters == {"p": 1}
    assert isinstance(error, InvalidArgument)
    assert isinstance(empty, InferResponse)
    assert empty.tensor("y").array().shape == (0, 2)


@pytest.mark.parametrize(
    ("gpus", "wanted", "cpus", "pools"),
    [
        (0, None, 1, [("cpu", 1)]),
        (2, None, 1, [("gpu", 2), ("cpu", 1)]),
        (4, 1, 0, [("gpu", 1)]),
        (2, 0, 3, [("cpu", 3)]),
    ],
)
def test_pools(gpus: float, wanted: int | None, cpus: int, pools: list[tuple[str, int]]) -> None:
    assert [(pool.name, pool.replicas) for pool in plan_pools(gpus, wanted, cpus)] == pools


@pytest.mark.parametrize(("gpus", "wanted", "cpus"), [(0, None, 0), (1, 2, 1), (1, -1, 1), (1, 1, -1)])
def test_impossible_pools_are_refused(gpus: float, wanted: int | None, cpus: int) -> None:
    with pytest.raises(ConfigError):
        plan_pools(gpus, wanted, cpus)


def test_paths_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trace = ["triton,file=trace.json", "rate=1", "opentelemetry,url=http://h/x"]
    options = Options(model_repository="models", api_key_file=Path("keys"), log_file="log", trace_config=trace)
    made = options.with_absolute_paths()
    assert made.model_repository == str(tmp_path / "models")
    assert (made.api_key_file, made.log_file) == (tmp_path / "keys", str(tmp_path / "log"))
    assert made.trace_config == [f"triton,file={tmp_path / 'trace.json'}", "rate=1", "opentelemetry,url=http://h/x"]
    assert made.http_server_cert is None


def test_calls_wait_for_a_hop_by_the_models_priorities() -> None:
    text = """
    backend: "onnxruntime" max_batch_size: 8
    input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }
    """
    assert hop_policy(config.parse(text, "m")) == BatchingPolicy(MIN_HOP_ROWS)
    made = hop_policy(
        config.parse(
            text
            + """
            dynamic_batching {
              preferred_batch_size: 4 max_queue_delay_microseconds: 9 priority_levels: 2 default_priority_level: 1
              default_queue_policy { default_timeout_microseconds: 5 }
            }
            """,
            "m",
        )
    )
    assert (made.max_batch_size, made.preferred_batch_sizes, made.max_queue_delay_ns) == (MIN_HOP_ROWS, (), 0)
    assert (made.priority_levels, made.default_priority_level, made.queue.timeout_ns) == (2, 1, 5000)


REPLICA = ReplicaState("r", frozenset({"m/1"}))


def pools() -> tuple[Pool, Pool]:
    gpu, cpu = (Pool(PoolStatus(name), None, None) for name in ("gpu", "cpu"))
    return gpu, cpu


def test_the_first_pool_that_is_up_takes_the_batch() -> None:
    gpu, cpu = both = pools()
    assert choose(both, []) is None
    cpu.status.saw([REPLICA])
    assert choose(both, []) is cpu
    gpu.status.saw([REPLICA])
    assert choose(both, []) is gpu
    gpu.status.saw([])
    assert choose(both, []) is cpu


def test_a_batch_that_was_lost_goes_elsewhere_if_it_can() -> None:
    gpu, cpu = both = pools()
    gpu.status.saw([REPLICA])
    cpu.status.saw([REPLICA])
    assert choose(both, [gpu]) is cpu
    cpu.status.failed()
    assert choose(both, [gpu]) is gpu
    gpu.status.failed()
    assert choose(both, [gpu]) is None


def test_one_missed_probe_is_chance_two_are_down() -> None:
    status = PoolStatus("gpu")
    status.saw([REPLICA])
    status.missed()
    assert status.is_up
    status.missed()
    assert not status.is_up
    status.saw([REPLICA])
    assert status.has_model("m/1")
    assert not status.has_model("m/2")
