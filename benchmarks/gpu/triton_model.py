"""A model.py for Triton's python backend around the kit's modules, to Triton's interface.

Requests of a batch are joined in pinned memory, run as one on a stream of the instance's own, and taken apart. Tensors
pass through DLPack: the stub's numpy arrays are of the first major version, and empty with the second.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
import triton_python_backend_utils as pb_utils

from benchmarks.gpu import models


class TritonPythonModel:
    """One instance."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        told = {key: value["string_value"] for key, value in parameters.items()}
        self.spec = models.specs(told["short"] == "yes")[told["model"]]
        self.device = told["device"]
        self.module = models.build(self.spec, told["precision"], 1, self.device)
        self.stream = None if self.device == "cpu" else torch.cuda.Stream(self.device)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        columns = [self.column(requests, one.name) for one in self.spec.inputs]
        sizes = [len(tensor) for tensor in columns[0]]
        with torch.inference_mode():
            answer = self.run([self.join(column) for column in columns])
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack(self.spec.output, rows)])
            for rows in answer.split(sizes)
        ]

    def column(self, requests: Sequence[Any], name: str) -> list[torch.Tensor]:
        """One input of each request."""
        found = [pb_utils.get_input_tensor_by_name(request, name) for request in requests]
        return [torch.from_dlpack(tensor.to_dlpack()) for tensor in found]

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        if self.stream is None:
            return torch.cat(tensors)
        rows = sum(len(tensor) for tensor in tensors)
        whole = torch.empty((rows, *tensors[0].shape[1:]), dtype=tensors[0].dtype, pin_memory=True)
        return torch.cat(tensors, out=whole)

    def run(self, joined: list[torch.Tensor]) -> torch.Tensor:
        """On the host again, all of it there."""
        if self.stream is None:
            answer: torch.Tensor = self.module(*joined)
            return answer
        with torch.cuda.stream(self.stream):
            answer = self.module(*(tensor.to(self.device, non_blocking=True) for tensor in joined))
            back = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True)
            back.copy_(answer, non_blocking=True)
        self.stream.synchronize()
        return back
