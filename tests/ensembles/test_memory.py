"""What a graph keeps: the tensors that are still to be read, not all that it ever made."""

import tracemalloc

import numpy as np

from tests.models import Repository
from tests.serving import engine_over, infer
from tutti.core.types import InferRequest, InferResponse, Tensor

STEPS = 8
SIZE = 2_000_000
MODEL = """
    backend: "python" max_batch_size: 1 input { name: "x" data_type: TYPE_FP32 dims: -1 }
    output { name: "y" data_type: TYPE_FP32 dims: -1 } dynamic_batching {}
"""
ADD_ONE = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x + np.float32(1))])
"""


def test_a_deep_graph_keeps_what_is_live_only(repository: Repository) -> None:
    repository.add_python("add", MODEL, ADD_ONE)
    steps = "".join(
        f'step {{ model_name: "add" model_version: -1 input_map {{ key: "x" value: "T{n}" }} '
        f'output_map {{ key: "y" value: "T{n + 1}" }} }}'
        for n in range(STEPS)
    )
    text = f"""platform: "ensemble" max_batch_size: 1 input {{ name: "T0" data_type: TYPE_FP32 dims: -1 }}
        output {{ name: "T{STEPS}" data_type: TYPE_FP32 dims: -1 }} ensemble_scheduling {{ {steps} }}"""
    repository.add("deep", text, {".keep": ""})
    with engine_over(repository.root) as engine:
        assert not engine.failures()
        x = np.zeros((1, SIZE), np.float32)
        tracemalloc.start()
        try:
            for _ in range(2):
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                (answer,) = infer(engine, [InferRequest("deep", {"T0": Tensor.of("T0", x)})])
                _, peak = tracemalloc.get_traced_memory()
                assert isinstance(answer, InferResponse)
                assert (answer.tensor(f"T{STEPS}").array() == STEPS).all()
                del answer
        finally:
            tracemalloc.stop()
    # One step's input and output, and one more that the instance's thread has not let go yet.
    assert peak - before < 3.5 * x.nbytes, f"{(peak - before) / x.nbytes:.1f} tensors at the peak, of {STEPS}"
