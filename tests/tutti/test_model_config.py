"""What config.pbtxt asks for beyond batching: reshape, warm-up, response cache, priorities, timeouts, order."""

import threading

import numpy as np
import pytest

from tests.models import IN_PROCESS, Repository
from tests.serving import Gather, engine_over, infer, wait_until
from tutti.core.errors import ConfigError, InferError, Unavailable
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.serving.engine import Engine


def x(model: str, *values: float, **parameters: object) -> InferRequest:
    array = np.array([values], np.float32)
    return InferRequest(model, {"x": Tensor.of("x", array)}, parameters=dict(parameters))  # type: ignore[arg-type]


def y(answer: object) -> list[float]:
    assert isinstance(answer, InferResponse), answer
    values: list[float] = answer.tensor("y").array().reshape(-1).tolist()
    return values


def test_reshape_shows_clients_other_shapes_than_the_model_has(repository: Repository) -> None:
    from tests.models import onnx_add_one

    repository.add(
        "shaped",
        """
        backend: "onnxruntime" max_batch_size: 8
        input { name: "x" data_type: TYPE_FP32 dims: [ 2, 2 ] reshape { shape: 4 } }
        output { name: "y" data_type: TYPE_FP32 dims: [ 1, 4 ] reshape { shape: 4 } }
        dynamic_batching {}
        """,
        {"model.onnx": onnx_add_one()},
    )
    sent = [InferRequest("shaped", {"x": Tensor.of("x", np.full((n, 2, 2), n, np.float32))}) for n in (1, 3)]
    with engine_over(repository.root) as engine:
        for n, answer in zip((1, 3), infer(engine, sent), strict=True):
            assert isinstance(answer, InferResponse)
            assert answer.tensor("y").shape == (n, 1, 4)
            assert set(y(answer)) == {n + 1.0}


def add_counting(repository: Repository, extra: str) -> None:
    """y = [how many requests this instance has executed, the sum of x]."""
    repository.add_python(
        "counts",
        f"""
        backend: "python" max_batch_size: 4
        input {{ name: "x" data_type: TYPE_FP32 dims: 2 }}
        output {{ name: "y" data_type: TYPE_FP32 dims: 2 }}
        {extra} {IN_PROCESS}
        """,
        """
        self.count += 1
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        if (x < 0).any():
            raise ValueError("negative")
        y = np.array([[self.count, x.sum()]] * len(x), np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", y)])
        """,
        "self.count = 0",
    )


@pytest.mark.parametrize(
    ("data", "made"), [("zero_data: true", True), ("random_data: true", True), ('input_data_file: "two"', True)]
)
def test_warm_up_runs_before_the_model_is_ready(repository: Repository, data: str, made: bool) -> None:
    add_counting(
        repository,
        f"""
        model_warmup {{
          name: "w" batch_size: 2 count: 3
          inputs {{ key: "x" value {{ data_type: TYPE_FP32 dims: 2 {data} }} }}
        }}
        """,
    )
    folder = repository.root / "counts" / "warmup"
    folder.mkdir()
    (folder / "two").write_bytes(np.ones(2, np.float32).tobytes())
    with engine_over(repository.root) as engine:
        assert y(infer(engine, [x("counts", 1, 1)])[0]) == [4.0, 2.0]
        assert engine.model("counts").statistics.counts.success.count == 1


@pytest.mark.parametrize(("file", "says"), [(b"\x00" * 3, "expected 8 bytes"), (b"\x00\x00\x80\xbf" * 2, "negative")])
def test_a_warm_up_that_fails_refuses_the_model(repository: Repository, file: bytes, says: str) -> None:
    add_counting(
        repository,
        """
        model_warmup {
          name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: 2 input_data_file: "data" } }
        }
        """,
    )
    folder = repository.root / "counts" / "warmup"
    folder.mkdir()
    (folder / "data").write_bytes(file)
    with engine_over(repository.root) as engine:
        (failure,) = engine.failures()
        assert "model_warmup 'w'" in failure
        assert says in failure


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ("", "expected 1 inputs but got 0 inputs for model 'counts'"),
        (
            "data_type: TYPE_INT32 dims: 2",
            "inference input 'x' data-type is 'INT32', but model 'counts' expects 'FP32'",
        ),
        ("data_type: TYPE_FP32 dims: [ 2, 2 ]", "Expected [-1,2], got [1,2,2]"),
        ("data_type: TYPE_FP32 dims: 3", "Expected [-1,2], got [1,3]"),
    ],
)
def test_a_warm_up_is_checked_as_a_request(repository: Repository, inputs: str, says: str) -> None:
    given = f'inputs {{ key: "x" value {{ {inputs} zero_data: true }} }}' if inputs else ""
    add_counting(repository, f'model_warmup {{ name: "w" {given} }}')
    with engine_over(repository.root) as engine:
        (failure,) = engine.failures()
    assert "model_warmup 'w'" in failure
    assert says in failure


def test_a_warm_up_file_outside_the_folder_is_refused(repository: Repository) -> None:
    add_counting(
        repository,
        """
        model_warmup {
          name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: 2 input_data_file: "../../../secret" } }
        }
        """,
    )
    with engine_over(repository.root) as engine:
        assert "no file" in engine.failures()[0]


def test_the_response_cache_answers_what_it_has_seen(repository: Repository) -> None:
    add_counting(repository, "response_cache { enable: true }")
    with engine_over(repository.root) as engine:
        first = y(infer(engine, [x("counts", 1, 2)])[0])
        assert y(infer(engine, [x("counts", 1, 2)])[0]) == first == [1.0, 3.0]
        assert y(infer(engine, [x("counts", 2, 1)])[0]) == [2.0, 3.0]
        for _ in range(2):
            assert isinstance(infer(engine, [x("counts", -1, 0)])[0], InferError), "errors are not kept"
        counts = engine.model("counts").statistics.counts
        assert (counts.cache_hit.count, counts.cache_miss.count) == (1, 4)
        assert counts.success.count == 3


def test_the_response_cache_forgets_what_was_not_asked_for_longest() -> None:
    from tutti.serving.response_cache import ResponseCache

    cache = ResponseCache(4000)
    for n in range(10):
        cache.put(b"%d" % n, InferResponse("m", "1", [Tensor("y", "UINT8", (1000,), bytes(1000))]))
        cache.get(b"0")
    assert len(cache) == 2
    assert cache.used <= 4000
    assert cache.get(b"0") is not None
    assert cache.get(b"9") is not None
    cache.put(b"large", InferResponse("m", "1", [Tensor("y", "UINT8", (5000,), bytes(5000))]))
    assert cache.get(b"large") is None


class Busy:
    """A model that holds its only instance until told, so that what comes later waits."""

    def __init__(self, repository: Repository, extra: str) -> None:
        self.order: list[float] = []
        repository.add_python(
            "held",
            f"""
            backend: "python" max_batch_size: 1
            input {{ name: "x" data_type: TYPE_FP32 dims: 1 }}
            output {{ name: "y" data_type: TYPE_FP32 dims: 1 }}
            {extra} {IN_PROCESS}
            """,
            """
            import sys
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            sys._tutti_test(float(x[0, 0]))
            return pb_utils.InferenceResponse([pb_utils.Tensor("y", x)])
            """,
        )
        self.go = threading.Event()

    def run(self, value: float) -> None:
        if value == 0:
            self.go.wait(20)
        self.order.append(value)


@pytest.fixture
def busy(repository: Repository, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Busy:
    import sys

    made = Busy(repository, request.param)
    monkeypatch.setattr(sys, "_tutti_test", made.run, raising=False)
    return made


def hold(engine: Engine, gather: Gather) -> Call:
    call = Call(x("held", 0), gather)
    engine([call])
    wait_until(lambda: engine.model("held").pending() == 0)
    return call


@pytest.mark.parametrize("busy", ["dynamic_batching { priority_levels: 3 default_priority_level: 2 }"], indirect=True)
def test_higher_priorities_go_first(repository: Repository, busy: Busy) -> None:
    with engine_over(repository.root) as engine:
        gather = Gather(7)
        hold(engine, gather)
        for value, priority in ((1, 3), (2, 0), (3, 2), (4, 1), (5, 9), (6, 3)):
            engine([Call(x("held", value, priority=priority), gather)])
        busy.go.set()
        gather.wait()
    assert busy.order == [0, 4, 2, 3, 5, 1, 6]


TIMEOUT = "default_queue_policy { default_timeout_microseconds: 100000 allow_timeout_override: true %s }"


@pytest.mark.parametrize("busy", ["dynamic_batching { " + TIMEOUT % "" + " }"], indirect=True)
def test_what_waits_too_long_is_refused_though_the_instance_is_busy(repository: Repository, busy: Busy) -> None:
    with engine_over(repository.root) as engine:
        held, late = Gather(1), Gather(2)
        hold(engine, held)
        calls = [Call(x("held", 1), late), Call(x("held", 2, timeout=1000), late)]
        engine(calls)
        late.wait()
        assert all(isinstance(call.answer, Unavailable) and "timeout" in call.answer.message for call in calls)
        busy.go.set()
        held.wait()
    assert busy.order == [0]


@pytest.mark.parametrize("busy", ["dynamic_batching { " + TIMEOUT % "timeout_action: DELAY" + " }"], indirect=True)
def test_what_waits_too_long_may_go_last(repository: Repository, busy: Busy) -> None:
    with engine_over(repository.root) as engine:
        gather = Gather(4)
        hold(engine, gather)
        engine([Call(x("held", 1, timeout=1), gather)])
        threading.Event().wait(0.01)
        engine([Call(x("held", value), gather) for value in (2, 3)])
        busy.go.set()
        gather.wait()
    assert busy.order == [0, 2, 3, 1]


@pytest.mark.parametrize(
    "busy",
    ["dynamic_batching { priority_levels: 2 default_priority_level: 2 "
     "priority_queue_policy { key: 1 value { max_queue_size: 1 } } }"],
    indirect=True,
)  # fmt: skip
def test_a_level_may_have_a_queue_of_its_own_size(repository: Repository, busy: Busy) -> None:
    with engine_over(repository.root) as engine:
        gather = Gather(4)
        hold(engine, gather)
        calls = [Call(x("held", value, priority=level), gather) for value, level in ((1, 1), (2, 1), (3, 2))]
        engine(calls)
        busy.go.set()
        gather.wait()
        assert isinstance(calls[1].answer, Unavailable)
    assert busy.order == [0, 1, 3]


@pytest.mark.parametrize(
    "busy", ["dynamic_batching { preserve_ordering: true } instance_group { count: 2 kind: KIND_CPU }"], indirect=True
)
def test_preserve_ordering_holds_answers_back(repository: Repository, busy: Busy) -> None:
    settled: list[float] = []

    class InOrder(Gather):
        def settle(self, calls: object) -> None:
            settled.extend(y(call.answer)[0] for call in calls)  # type: ignore[attr-defined]
            super().settle(calls)  # type: ignore[arg-type]

    with engine_over(repository.root) as engine:
        gather = InOrder(3)
        hold(engine, gather)
        engine([Call(x("held", value), gather) for value in (1, 2)])
        wait_until(lambda: busy.order == [1, 2])
        assert settled == []
        busy.go.set()
        gather.wait()
    assert settled == [0, 1, 2]


def test_a_field_that_is_not_honoured_is_named() -> None:
    from tutti.repository import config

    text = 'backend: "python" batch_output { target_name: "y" }'
    with pytest.raises(ConfigError, match="batch_output"):
        config.parse(text + ' input { name: "x" data_type: TYPE_FP32 } output { name: "y" data_type: TYPE_FP32 }', "m")
