"""How quickly a batch can be done at best: the larger of operations over peak and bytes over bandwidth.

operations  multiplications and additions of all products, counted by torch's FlopCounterMode on shapes alone
            (a product of [m, k] and [k, n] is 2mkn; a convolution and attention likewise)
bytes       weights and caches once a batch, inputs and outputs once
copies      inputs to the card and outputs back, each over its own direction
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import models
from benchmarks.gpu.models import Spec
from benchmarks.gpu.modules import CACHES

# What `limits` measures when it runs in the same folder; else what such a card (H100, H200) is known for.
KNOWN = {"fp32": 50e12, "tf32": 400e12, "fp16": 790e12, "bf16": 790e12, "memory": 3.0e12, "in": 50e9, "out": 50e9}


@dataclass(frozen=True, slots=True)
class Work:
    """Of one batch."""

    operations: float
    device_bytes: float
    in_bytes: float
    out_bytes: float

    def floor_s(self, peaks: dict[str, float], precision: str) -> float:
        return max(
            self.operations / peaks[precision], self.device_bytes / peaks["memory"], self.in_bytes / peaks["in"],
            self.out_bytes / peaks["out"],
        )  # fmt: skip

    def bound(self, peaks: dict[str, float], precision: str) -> str:
        """What the floor comes from."""
        times = {
            "operations": self.operations / peaks[precision], "memory": self.device_bytes / peaks["memory"],
            "copies in": self.in_bytes / peaks["in"], "copies out": self.out_bytes / peaks["out"],
        }  # fmt: skip
        return max(times, key=lambda name: times[name])


def work(spec: Spec, precision: str, batch: int) -> Work:
    """Counted on tensors without storage: costs nothing."""
    size = torch.finfo(models.PRECISIONS[precision]).bits // 8
    with torch.device("meta"):
        module = spec.make(1).eval()
        inputs = [torch.from_numpy(array).to("meta") for array in spec.draw(1)]
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            answer = module(*inputs)
    held = sum(tensor.numel() for tensor in module.parameters()) * size
    caches = [tensor for name, tensor in module.named_buffers() if name in CACHES]
    cached = sum(tensor.numel() for tensor in caches) * size * batch
    taken = batch * sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    width = size if not spec.output_datatype else answer.element_size()
    told = batch * answer.numel() * width
    return Work(batch * counter.get_total_flops(), held + cached + taken + told, taken, told)


def peaks(*folders: Path) -> tuple[dict[str, float], str]:
    """Measured ones where a folder has `limits.json` with them, and where they come from."""
    for folder in folders:
        path = folder / "limits.json"
        rows = _rows(path) if path.exists() else []
        measured = {row["peak"]: float(row["per_s"]) for row in rows if "peak" in row}
        if measured:
            return {**KNOWN, **measured}, "measured"
    return dict(KNOWN), "known"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row for line in json.loads(path.read_text())["lines"] for row in line["rows"]]
