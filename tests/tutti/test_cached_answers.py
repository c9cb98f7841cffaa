"""What the response cache must not give: answers of other parameters, of what was loaded before, of a sequence."""

from collections.abc import Sequence

import pytest

from tests.models import IN_PROCESS, Repository
from tests.serving import Gather, engine_over, infer, timer
from tests.tutti.test_model_config import x, y
from tutti import ensembles
from tutti.core.errors import ConfigError
from tutti.core.types import Call, InferResponse, Tensor, settle
from tutti.observing.statistics import ModelStatistics
from tutti.repository import config
from tutti.serving import local
from tutti.serving.engine import Engine
from tutti.serving.response_cache import Cached, ResponseCache

CACHED = (
    """
    backend: "python" max_batch_size: 4
    input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" data_type: TYPE_FP32 dims: 1 }
    response_cache { enable: true }
"""
    + IN_PROCESS
)
PLAIN = CACHED.replace("response_cache { enable: true }", "")
SCALED = """
self.count += 1
scale = float(json.loads(request.parameters()).get("scale", 1))
x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
return pb_utils.InferenceResponse([pb_utils.Tensor("y", x * np.float32(scale) + np.float32(1000 * self.count))])
"""
TIMES = """
x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
return pb_utils.InferenceResponse([pb_utils.Tensor("y", x * np.float32(%d))])
"""
ASKS = """
inner = pb_utils.InferenceRequest(model_name="times", inputs=request.inputs(), requested_output_names=["y"])
return inner.exec()
"""
GRAPH = """
    platform: "ensemble" max_batch_size: 4
    input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" data_type: TYPE_FP32 dims: 1 }
    response_cache { enable: true }
    ensemble_scheduling { step { model_name: "times" model_version: -1
        input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }
"""


def ask(engine: Engine, model: str, value: float, **parameters: object) -> float:
    (answer,) = infer(engine, [x(model, value, **parameters)])
    return y(answer)[0]


def test_parameters_decide_an_answer(repository: Repository) -> None:
    """Forwarded headers are parameters, too. How long a request may wait, and before whom it goes, decides nothing."""
    repository.add_python("m", CACHED, SCALED, "self.count = 0")
    with engine_over(repository.root) as engine:
        assert ask(engine, "m", 2) == 1002
        assert ask(engine, "m", 2, scale=3) == 2006
        assert ask(engine, "m", 2, scale="3") == 3006
        assert ask(engine, "m", 2, scale=3) == 2006
        assert ask(engine, "m", 2, timeout=10**9, priority=1) == 1002


@pytest.mark.parametrize("model", ["times", "asks", "graph"])
def test_a_reload_forgets_what_was_answered_before(repository: Repository, model: str) -> None:
    """Of the model, and of those that it asks: as an ensemble, or by itself."""
    repository.add_python("times", CACHED if model == "times" else PLAIN, TIMES % 2)
    repository.add_python("asks", CACHED, ASKS)
    repository.add("graph", GRAPH, {})
    engine = local.make_engine(repository.root, timer, ensembles.load, is_controllable=True)
    engine.load_all()
    try:
        assert (ask(engine, model, 2), ask(engine, model, 2)) == (4, 4)
        path = repository.root / "times" / "1" / "model.py"
        path.write_text(path.read_text().replace("np.float32(2)", "np.float32(5)"))
        engine.load("times")
        assert (ask(engine, model, 2), ask(engine, model, 2)) == (10, 10)
    finally:
        engine.close()


def test_answers_of_a_sequence_are_not_cached() -> None:
    with pytest.raises(ConfigError, match=r"response_cache\.enable: an answer depends on its sequence"):
        config.parse(CACHED + "sequence_batching {}", "m")


def test_an_answer_that_cannot_be_kept_is_given() -> None:
    def infer_wrong(calls: Sequence[Call]) -> None:
        for call in calls:
            call.answer = InferResponse("m", "1", [Tensor("y", "FP32", (1,), Lost())])  # type: ignore[arg-type]
        settle(calls)

    gather = Gather(1)
    Cached(infer_wrong, ResponseCache(1000), ModelStatistics())([call := Call(x("m", 1), gather)])
    gather.wait()
    assert isinstance(call.answer, InferResponse)


class Lost:
    """What was on a device that has failed."""

    def array(self) -> object:
        raise RuntimeError("the device has failed")


def test_what_one_request_was_told_no_other_is() -> None:
    """A replica explains where it is asked to: in its answer's parameters, of which the others are the answer's."""
    asked: list[Call] = []

    def replica(calls: Sequence[Call]) -> None:
        for call in calls:
            told = {"tutti_explain": '{"model": "m"}'} if "tutti_explain" in call.request.parameters else {}
            call.answer = InferResponse("m", "1", [], {"tutti_pool": "cpu", **told})
        asked.extend(calls)
        settle(calls)

    cached = Cached(replica, ResponseCache(10_000), ModelStatistics())
    first, again = infer(cached, [x("m", 1, tutti_explain=True)]), infer(cached, [x("m", 1)])
    assert len(asked) == 1
    assert [one.parameters for one in (*first, *again) if isinstance(one, InferResponse)] == [
        {"tutti_pool": "cpu", "tutti_explain": '{"model": "m"}'}, {"tutti_pool": "cpu"},
    ]  # fmt: skip
