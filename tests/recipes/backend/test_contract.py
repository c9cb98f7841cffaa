"""What every backend of tutti promises, promised by this one."""

from pathlib import Path

import numpy as np

from tutti.serving.backend_contract import BackendContract, Inputs


class TestAffine(BackendContract):
    config = """
        backend: "affine" max_batch_size: 8 dynamic_batching {}
        input { name: "x" data_type: TYPE_FP32 dims: -1 } output { name: "y" data_type: TYPE_FP32 dims: -1 }
    """

    def write(self, folder: Path) -> None:
        (folder / "affine.json").write_text('{"scale": 2, "offset": 1}')

    def inputs(self, rows: int, size: int, rng: np.random.Generator) -> Inputs:
        return {"x": rng.normal(size=(rows, size)).astype(np.float32)}

    def outputs(self, inputs: Inputs) -> Inputs:
        return {"y": 2 * inputs["x"] + 1}
