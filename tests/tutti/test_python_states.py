"""`sequence_batching.state` of a python model, and KIND_MODEL."""

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import engine_over, infer
from tests.tutti.test_model_config import y
from tutti.core.errors import ConfigError
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.repository import config

SUMS = """
    backend: "python" max_batch_size: 4
    input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" data_type: TYPE_FP32 dims: 1 }
    sequence_batching { %s state { input_name: "sum" output_name: "new_sum" data_type: TYPE_FP32 dims: 1 } }
"""
ADD = """
x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
total = pb_utils.get_input_tensor_by_name(request, "sum").as_numpy()
total += x
return pb_utils.InferenceResponse([pb_utils.Tensor("y", total), pb_utils.Tensor("new_sum", total)])
"""


def of(sequence: int, value: float, **flags: bool) -> InferRequest:
    array = np.array([[value]], np.float32)
    return InferRequest("m", {"x": Tensor.of("x", array)}, parameters={"sequence_id": sequence, **flags})


@pytest.mark.parametrize("strategy", ["", "direct {}", "oldest { max_candidate_sequences: 4 }"])
def test_the_server_keeps_a_python_models_state(repository: Repository, strategy: str) -> None:
    repository.add_python("m", SUMS % strategy, ADD)
    with engine_over(repository.root) as engine:
        sums = []
        for flags in ({"sequence_start": True}, {}, {"sequence_end": True}):
            answers = infer(engine, [of(1, 1, **flags), of(2, 10, **flags)])
            assert all(isinstance(a, InferResponse) and [t.name for t in a.outputs] == ["y"] for a in answers)
            sums.append([y(answer)[0] for answer in answers])
        (again,) = infer(engine, [of(1, 5, sequence_start=True, sequence_end=True)])
    assert sums == [[1, 10], [2, 20], [3, 30]]
    assert y(again) == [5]


def test_a_state_that_would_be_dropped_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sequence_batching\.state: is not supported for a decoupled model"):
        config.parse(SUMS % "" + "model_transaction_policy { decoupled: true }", "m")


def test_a_python_model_may_choose_its_devices(repository: Repository) -> None:
    """KIND_MODEL: it is told so, and no device."""
    repository.add_python(
        "m",
        """
        backend: "python" instance_group { kind: KIND_MODEL count: 2 }
        input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" data_type: TYPE_STRING dims: 2 }
        """,
        """
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array(self.told, dtype=object))])
        """,
        "self.told = [args['model_instance_kind'], args['model_instance_device_id']]",
    )
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [InferRequest("m", {"x": Tensor.of("x", np.zeros(1, np.float32))})])
    assert isinstance(answer, InferResponse), answer
    assert [str(text, "utf-8") if isinstance(text, bytes) else text for text in answer.tensor("y").array()] == [
        "MODEL",
        "0",
    ]


@pytest.mark.parametrize(
    ("backend", "gpus", "why"),
    [("onnxruntime", "", "is supported for python models only"), ("python", "gpus: 0", "names no GPUs")],
)
def test_kind_model_is_refused_where_it_would_mean_nothing(backend: str, gpus: str, why: str) -> None:
    text = f"""
        backend: "{backend}" instance_group {{ kind: KIND_MODEL {gpus} }}
        input {{ name: "x" data_type: TYPE_FP32 dims: 1 }} output {{ name: "y" data_type: TYPE_FP32 dims: 1 }}
    """
    with pytest.raises(ConfigError, match=f"KIND_MODEL {why}"):
        config.parse(text, "m")
