"""The sequence batcher: order, binding to instances and slots, controls, states, idle sequences."""

import random

import numpy as np
import pytest

from tests.models import IN_PROCESS, Repository
from tests.serving import Gather, engine_over, infer, wait_until
from tutti.core.errors import DeadlineExceeded, InferError, Internal, InvalidArgument
from tutti.core.types import Call, InferRequest, InferResponse, Tensor, now_ns
from tutti.scheduling import sequences
from tutti.serving.engine import Engine

CONTROLS = """
    control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }
    control_input { name: "END" control { kind: CONTROL_SEQUENCE_END fp32_false_true: [ 0, 1 ] } }
    control_input { name: "READY" control { kind: CONTROL_SEQUENCE_READY bool_false_true: [ false, true ] } }
    control_input { name: "CORRID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } }
"""
# Adds up each sequence's values, by the correlation id: it must see each sequence's requests in order.
ACCUMULATE = """
    ready = pb_utils.get_input_tensor_by_name(request, "READY").as_numpy().item()
    if not ready:
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.zeros_like(np.zeros((1, 1), np.int32)))])
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    key = int(pb_utils.get_input_tensor_by_name(request, "CORRID").as_numpy().item())
    if pb_utils.get_input_tensor_by_name(request, "START").as_numpy().item():
        self.sums[key] = 0
    self.sums[key] += int(x.item())
    total = self.sums[key]
    if pb_utils.get_input_tensor_by_name(request, "END").as_numpy().item():
        del self.sums[key]
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.full_like(x, total))])
"""
STRATEGIES = ("direct {}", "oldest { max_candidate_sequences: 3 }")


def add(repository: Repository, strategy: str, more: str = "", rows: int = 4, count: int = 2) -> None:
    repository.add_python(
        "sums",
        f"""
        backend: "python" max_batch_size: {rows}
        input {{ name: "x" data_type: TYPE_INT32 dims: 1 }}
        output {{ name: "y" data_type: TYPE_INT32 dims: 1 }}
        instance_group {{ count: {count} kind: KIND_CPU }}
        sequence_batching {{ {strategy} {CONTROLS} {more} }}
        """
        + IN_PROCESS,
        ACCUMULATE,
        "self.sums = {}",
    )


def request(key: int | str, value: int, start: bool = False, end: bool = False, model: str = "sums") -> InferRequest:
    parameters = {"sequence_id": key, "sequence_start": start, "sequence_end": end}
    return InferRequest(model, {"x": Tensor.of("x", np.array([[value]], np.int32))}, parameters=parameters)  # type: ignore[arg-type]


def value(answer: object) -> int:
    assert isinstance(answer, InferResponse), answer
    return int(answer.tensor("y").array().item())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(3))
def test_many_sequences_at_once_keep_their_order(repository: Repository, strategy: str, seed: int) -> None:
    add(repository, strategy)
    rng = random.Random(seed)
    plans = {key: [rng.randrange(100) for _ in range(rng.randint(1, 8))] for key in range(1, 30)}
    with engine_over(repository.root) as engine:
        calls: dict[int, list[Call]] = {key: [] for key in plans}
        gather = Gather(sum(map(len, plans.values())))
        left = dict(plans)
        while left:  # interleaved at random, and never waiting for an answer
            key = rng.choice(list(left))
            values = left[key]
            sent = request(key, values[0], start=not calls[key], end=len(values) == 1)
            calls[key].append(Call(sent, gather))
            engine([calls[key][-1]])
            if len(values) == 1:
                del left[key]
            else:
                left[key] = values[1:]
        gather.wait()
        for key, values in plans.items():
            sums = np.cumsum(values).tolist()
            assert [value(call.answer) for call in calls[key]] == sums


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mistakes_are_refused(repository: Repository, strategy: str) -> None:
    add(repository, strategy)
    with engine_over(repository.root) as engine:
        wide = request(7, 1, start=True)
        wide.inputs["x"] = Tensor.of("x", np.ones((2, 1), np.int32))
        for sent, says in (
            (request(0, 1, start=True), "non-zero or non-empty correlation ID"),
            (request(5, 1), "must specify the START flag"),
            (wide, "must specify batch-size 1 due to requirements of sequence batcher, got 2"),
        ):
            (answer,) = infer(engine, [sent])
            assert isinstance(answer, InvalidArgument)
            assert says in answer.message


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sequence_may_start_again(repository: Repository, strategy: str) -> None:
    add(repository, strategy)
    with engine_over(repository.root) as engine:
        assert [value(infer(engine, [one])[0]) for one in (request(1, 5, start=True), request(1, 6))] == [5, 11]
        assert value(infer(engine, [request(1, 7, start=True)])[0]) == 7
        assert value(infer(engine, [request(1, 1, end=True)])[0]) == 8
        (late,) = infer(engine, [request(1, 1)])
        assert isinstance(late, InvalidArgument)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_idle_sequence_gives_its_slot_to_one_that_waits(repository: Repository, strategy: str) -> None:
    add(repository, strategy, "max_sequence_idle_microseconds: 100000", rows=1, count=1)
    with engine_over(repository.root) as engine:
        slots = engine.model("sums").config.sequences.slots  # type: ignore[union-attr]
        for key in range(1, slots + 1):
            infer(engine, [request(key, 1, start=True)])
        assert value(infer(engine, [request(99, 4, start=True)])[0]) == 4
        (gone,) = infer(engine, [request(1, 1)])
        assert isinstance(gone, InferError)


def test_text_is_a_correlation_id(repository: Repository) -> None:
    repository.add_python(
        "named",
        """
        backend: "python" max_batch_size: 2
        input { name: "x" data_type: TYPE_INT32 dims: 1 }
        output { name: "y" data_type: TYPE_STRING dims: 1 }
        sequence_batching {
          oldest {} control_input { name: "ID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } }
        }
        """,
        """
        key = pb_utils.get_input_tensor_by_name(request, "ID").as_numpy()
        assert request.correlation_id() == key.item().decode()
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", key)])
        """,
    )
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request("a text", 1, start=True, model="named")])
        assert isinstance(answer, InferResponse)
        assert answer.tensor("y").array().tolist() == [[b"a text"]]


def test_direct_fills_the_slots_without_a_request(repository: Repository) -> None:
    add(repository, "direct {}", rows=3, count=1)
    with engine_over(repository.root) as engine:
        for key in (1, 2, 3):
            infer(engine, [request(key, key, start=True)])
        counts = engine.model("sums").statistics.counts
        before = (counts.inferences, counts.success.count)
        assert value(infer(engine, [request(3, 4)])[0]) == 7
        assert (counts.inferences - before[0], counts.success.count - before[1]) == (1, 1), "fillers are not counted"


def add_state_model(repository: Repository, extra: str = "") -> None:
    """An ONNX graph with y = x + s and s' = y: the server keeps s."""
    from onnx import TensorProto, helper

    from tests.models import _serialized

    def info(name: str) -> object:
        return helper.make_tensor_value_info(name, TensorProto.INT32, ["batch", 1])

    nodes = [helper.make_node("Add", ["x", "s_in"], ["y"]), helper.make_node("Identity", ["y"], ["s_out"])]
    graph = helper.make_graph(nodes, "state", [info("x"), info("s_in")], [info("y"), info("s_out")])
    repository.add(
        "sums",
        f"""
        backend: "onnxruntime" max_batch_size: 4
        input {{ name: "x" data_type: TYPE_INT32 dims: 1 }}
        output {{ name: "y" data_type: TYPE_INT32 dims: 1 }}
        sequence_batching {{
          oldest {{ max_candidate_sequences: 8 }}
          state {{ input_name: "s_in" output_name: "s_out" data_type: TYPE_INT32 dims: 1 {extra} }}
        }}
        """,
        {"model.onnx": _serialized(graph)},
    )


def sums_of(engine: Engine, key: int, values: list[int]) -> list[int]:
    return [
        value(infer(engine, [request(key, v, start=i == 0, end=i == len(values) - 1)])[0]) for i, v in enumerate(values)
    ]


def test_states_are_kept_between_requests(repository: Repository) -> None:
    add_state_model(repository)
    with engine_over(repository.root) as engine:
        assert sums_of(engine, 1, [1, 2, 3]) == [1, 3, 6]
        assert sums_of(engine, 1, [10, 1]) == [10, 11]


def test_a_state_may_begin_with_a_file(repository: Repository) -> None:
    add_state_model(repository, 'initial_state { name: "i" data_type: TYPE_INT32 dims: 1 data_file: "seven" }')
    folder = repository.root / "sums" / "initial_state"
    folder.mkdir()
    (folder / "seven").write_bytes(np.int32(7).tobytes())
    with engine_over(repository.root) as engine:
        assert sums_of(engine, 1, [1, 2]) == [8, 10]


def test_a_state_that_cannot_be_kept_is_told(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> InferResponse:
        raise RuntimeError("the device has failed")

    add_state_model(repository)
    with engine_over(repository.root) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(sequences.SequenceBatcher, "_keep_states", fails)
            (answer,) = infer(engine, [request(1, 1, start=True)])
        assert isinstance(answer, Internal) and "the device has failed" in answer.message
        assert sums_of(engine, 1, [1, 2]) == [1, 3], "the sequence may begin anew"


def test_unloading_answers_what_waits(repository: Repository) -> None:
    add(repository, "direct {}", rows=1, count=1)
    gather = Gather(2)
    with engine_over(repository.root) as engine:
        infer(engine, [request(1, 1, start=True)])
        waiting = [Call(request(key, 1, start=True), gather) for key in (2, 3)]
        engine(waiting)
        wait_until(lambda: engine.model("sums").pending() == 2)
    gather.wait()
    assert all(isinstance(call.answer, InferError) for call in waiting)


@pytest.mark.parametrize("key", [-1, 2**64, "a text"])
def test_an_id_that_the_models_control_cannot_hold(repository: Repository, key: int | str) -> None:
    add(repository, "oldest { max_candidate_sequences: 3 }")
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request(key, 1, start=True)])
        assert isinstance(answer, InvalidArgument)
        assert "expected UINT64" in answer.message
        assert value(infer(engine, [request(5, 1, start=True)])[0]) == 1


def test_a_sequence_whose_first_request_was_cancelled_gives_its_slot_back(repository: Repository) -> None:
    add(repository, "direct {}", "max_sequence_idle_microseconds: 50000", rows=1, count=1)
    with engine_over(repository.root) as engine:
        gather = Gather(1)
        gone = Call(request(1, 1, start=True), gather)
        gone.is_cancelled = True
        engine([gone])
        gather.wait()
        assert isinstance(gone.answer, InferError)
        assert value(infer(engine, [request(2, 5, start=True)])[0]) == 5


@pytest.mark.parametrize("strategy", ["direct {}", "oldest { max_candidate_sequences: 1 }"])
def test_who_waits_for_a_slot_is_answered_at_the_deadline(repository: Repository, strategy: str) -> None:
    """With what waits behind it, which has no START any more; the sequence that has the slot goes on."""
    add(repository, strategy, rows=1, count=1)
    with engine_over(repository.root) as engine:
        assert value(infer(engine, [request(1, 5, start=True)])[0]) == 5
        gather = Gather(3)
        first, behind, later = (
            Call(one, gather) for one in (request(2, 1, start=True), request(2, 2), request(3, 4, start=True))
        )
        first.deadline_ns = now_ns() + 50_000_000
        later.deadline_ns = now_ns() + 100_000_000
        engine([first, behind, later])
        gather.wait()
        assert all(isinstance(call.answer, DeadlineExceeded) for call in (first, behind, later))
        assert engine.model("sums").pending() == 0
        (lost,) = infer(engine, [request(2, 3)])
        assert isinstance(lost, InvalidArgument)
        assert value(infer(engine, [request(1, 2, end=True)])[0]) == 7
        assert value(infer(engine, [request(4, 9, start=True)])[0]) == 9, "the slot is free for others"
