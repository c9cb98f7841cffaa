"""The contract of backends, kept by each of ours that executes on a processor."""

import importlib.util
import io
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests import models
from tutti.serving.backend_contract import BackendContract, Inputs

VARIABLE = """
    max_batch_size: 8 dynamic_batching {}
    input { name: "x" data_type: TYPE_FP32 dims: -1 }
    output [ { name: "y" data_type: TYPE_FP32 dims: -1 }, { name: "total" data_type: TYPE_FP32 dims: 1 } ]
"""


class Doubling(BackendContract):
    """y = 2x + 1 of rows of any length, and their totals."""

    def inputs(self, rows: int, size: int, rng: np.random.Generator) -> Inputs:
        return {"x": rng.normal(size=(rows, size)).astype(np.float32)}

    def outputs(self, inputs: Inputs) -> Inputs:
        y = 2 * inputs["x"] + 1
        return {"y": y, "total": y.sum(axis=1, keepdims=True)}


class TestOnnxruntime(Doubling):
    config = f'backend: "onnxruntime" {VARIABLE}'

    def write(self, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(models.onnx_doubling())


class TestOnnxruntimeThatFails(BackendContract):
    """A table of 4 entries: other ids fail."""

    config = """
        backend: "onnxruntime" max_batch_size: 8 dynamic_batching {}
        input { name: "ids" data_type: TYPE_INT64 dims: -1 } output { name: "y" data_type: TYPE_FP32 dims: -1 }
    """

    def write(self, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(models.onnx_gather())

    def inputs(self, rows: int, size: int, rng: np.random.Generator) -> Inputs:
        return {"ids": rng.integers(0, 4, (rows, size))}

    def outputs(self, inputs: Inputs) -> Inputs:
        return {"y": inputs["ids"].astype(np.float32) * 10}

    def poison(self, inputs: Inputs) -> Inputs:
        return {"ids": inputs["ids"] + 4}


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
class TestPytorch(Doubling):
    config = f'backend: "pytorch" {VARIABLE}'

    def write(self, folder: Path) -> None:
        import torch

        class Module(torch.nn.Module):  # type: ignore[misc]
            def forward(self, x):  # type: ignore[no-untyped-def]
                y = 2 * x + 1
                return y, y.sum(dim=1, keepdim=True)

        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(Module(), torch.zeros(2, 3)), buffer)
        (folder / "model.pt").write_bytes(buffer.getvalue())


class PythonModel(Doubling):
    config = f'backend: "python" {VARIABLE}'
    has_checked_outputs = False

    def write(self, folder: Path) -> None:
        (folder / "model.py").write_text(
            "import numpy as np\n"
            "import triton_python_backend_utils as pb_utils\n\n\n"
            "class TritonPythonModel:\n"
            "    def execute(self, requests):\n"
            "        return [self.answer(request) for request in requests]\n\n"
            "    def answer(self, request):\n"
            '        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()\n'
            "        y = 2 * x + 1\n"
            '        tensors = {"y": y, "total": y.sum(axis=1, keepdims=True)}\n'
            "        return pb_utils.InferenceResponse([pb_utils.Tensor(*tensor) for tensor in tensors.items()])\n"
        )


@pytest.mark.slow  # a process for each of its instances
class TestPython(PythonModel):
    pass


class TestPythonInTheServersProcess(PythonModel):
    config = f"{PythonModel.config} {models.IN_PROCESS}"


@pytest.mark.usefixtures("simulated_gpu")
class TestPytorchThroughADevicesEngine(TestPytorch):
    """Its weights, batches and answers on a simulated GPU."""

    config = f"{TestPytorch.config} instance_group {{ kind: KIND_GPU }}"
