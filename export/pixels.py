"""Pictures on their way into a graph: the form they come in, what the decoder step does, and what the graph does.

As bytes, rescaled and normalised in the graph, they are a quarter of what they are as FP32, on every way that they go.
"""

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tutti.core.types import Shape
from tutti.export import layout
from tutti.export.graphs import Arrays, Check
from tutti.export.narrow import Wide
from tutti.export.sources import Source
from tutti.repository.model_config import TensorSpec

MAX_BATCH_SIZE = 32
SEED = 0
IMAGE = TensorSpec("IMAGE", "BYTES", (1,))
# Of levels that are equal: what float32 rounds, in units of the deviation.
_ROUNDING = 1e-5


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a checkpoint's own processor treats a picture. `resize` and `resample` are the decoder step's parameters."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    height: int
    width: int
    resize: str = "exact"
    resample: int = 2  # PIL's BILINEAR
    scale: float = 1 / 255


@dataclass(frozen=True, slots=True)
class Form:
    """How PIXELS come: "uint8", to be normalised in the graph, or "fp32", normalised; colours first or last."""

    type: str = "uint8"
    layout: str = "chw"

    @property
    def datatype(self) -> str:
        return self.type.upper()

    def shape(self, how: Preprocessing) -> Shape:
        """Without the batch axis."""
        return (how.height, how.width, 3) if self.layout == "hwc" else (3, how.height, how.width)

    def entrance(self, how: Preprocessing) -> torch.nn.Module:
        """What stands in a graph before the network."""
        if self.type == "fp32":
            return torch.nn.Identity()
        return Normalize(how, self.layout)

    def sent(self, pixels: Any, how: Preprocessing) -> Any:
        """[batch, 3, height, width] UINT8 in this form."""
        if self.type == "fp32":
            return _step().normalized(pixels, how.scale, _column(how.mean), _column(how.std))
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)) if self.layout == "hwc" else pixels


class Normalize(Wide):
    """PIXELS [batch, 3, height, width] UINT8, or with the colours last -> what the network takes, FP32, colours first.

    Colours that come last stay last in memory, as convolutions on GPUs prefer it: they are moved after the cast, since
    TensorRT can do nothing else with bytes. In 32 bits also where the network has 16: contrast and brightness of every
    pixel follow from six numbers.
    """

    def __init__(self, how: Preprocessing, layout: str = "chw") -> None:
        super().__init__()
        self._are_colours_last = layout == "hwc"
        shape = (1, 1, 1, -1) if self._are_colours_last else (1, -1, 1, 1)
        mean, std = (torch.tensor(values).view(shape) for values in (how.mean, how.std))
        self.register_buffer("scale", how.scale / std)
        self.register_buffer("shift", -mean / std)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        normalized = pixels.to(self.scale.dtype) * self.scale + self.shift
        return normalized.permute(0, 3, 1, 2) if self._are_colours_last else normalized


def _column(values: Sequence[float]) -> Any:
    return np.array(values, dtype=np.float32).reshape(-1, 1, 1)


def _step() -> Any:
    """The functions that the published decoder uses."""
    spec = importlib.util.spec_from_file_location("image_transform", layout.step_file("image_transform"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fitted(picture: Any, how: Preprocessing) -> Any:
    """[3, height, width] UINT8 of a PIL picture, as the decoder step makes it."""
    return _step().fitted(picture, how.height, how.width, how.resize, how.resample).transpose(2, 0, 1)


def decoder_step(name: str, how: Preprocessing, form: Form) -> layout.Entry:
    """NAME_decoder: a file's bytes -> PIXELS in the form that the graph takes."""
    parameters = {"resize": how.resize, "resample": str(how.resample)}
    if form.layout != "chw":
        parameters["layout"] = form.layout
    if form.type == "fp32":
        parameters["scale"] = repr(how.scale)
        parameters |= {key: ",".join(map(repr, values)) for key, values in (("mean", how.mean), ("std", how.std))}
    return layout.Entry(
        f"{name}_decoder", "python", [IMAGE], [TensorSpec("PIXELS", form.datatype, form.shape(how))],
        {"model.py": layout.step_file("image_decoder"), "image_transform.py": layout.step_file("image_transform")},
        MAX_BATCH_SIZE, parameters,
    )  # fmt: skip


def cases(how: Preprocessing) -> list[Arrays]:
    """Random pictures, and a smooth one, as pictures are: noise excites few features."""
    rng = np.random.default_rng(SEED)
    size = (3, how.height, how.width)
    cases: list[Arrays] = [{"PIXELS": rng.integers(0, 256, size=(n, *size), dtype=np.uint8)} for n in (1, 2, 5, 16)]
    ramps = np.linspace(0, 255, how.width)[np.newaxis] * np.linspace(0, 1, how.height)[:, np.newaxis]
    cases.append({"PIXELS": np.stack([np.stack([ramps, ramps[::-1], ramps[:, ::-1]])]).astype(np.uint8)})
    return cases


def check_processor(source: Source, how: Preprocessing) -> Check:
    """Whether the decoder step and the graph make of pictures what the checkpoint's own processor does."""
    from PIL import Image

    processor, normalize, rng = _processor(source), Normalize(how), np.random.default_rng(SEED)
    worst = 0.0
    for width, height in (
        (how.width, how.height),
        (2 * how.width + 7, how.height + 40),
        (how.width + 9, 3 * how.height),
    ):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        picture = small.resize((width, height), Image.Resampling.BICUBIC)
        expected = processor(picture, return_tensors="pt")["pixel_values"].numpy()
        got = normalize(torch.from_numpy(np.ascontiguousarray(fitted(picture, how))).unsqueeze(0)).numpy()
        if expected.shape != got.shape:
            return Check("image processor", False, f"expected shape {list(expected.shape)}, got {list(got.shape)}")
        worst = max(worst, float(np.abs(expected - got).max()))
    # A level of 256 more or less, where the library rounds otherwise.
    limit = 1.5 * how.scale / min(how.std)
    return Check(
        "image processor",
        worst <= limit,
        f"pixels differ by at most {worst:.1e} from the checkpoint's (of {limit:.1e})",
    )


def check_levels(source: Source, how: Preprocessing, form: Form) -> Check:
    """Whether each of the 256 levels of each colour becomes the number that the checkpoint's own processor makes of it.

    No picture is resized here, so that nothing but float32 rounds.
    """
    from PIL import Image

    rng = np.random.default_rng(SEED)
    levels = np.stack([rng.permutation(256) for _ in range(3)]).reshape(3, 16, 16).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))
    expected = _processor(source)(picture, do_resize=False, do_center_crop=False, return_tensors="pt")
    sent = torch.from_numpy(np.ascontiguousarray(form.sent(levels[np.newaxis], how)))
    if expected["pixel_values"].shape != (1, *levels.shape):
        return Check("image levels", True, "not looked at: the processor changes sizes by itself")
    worst = float((expected["pixel_values"] - form.entrance(how)(sent)).abs().max())
    limit = _ROUNDING / min(how.std)
    why = f"each level is the checkpoint's but for {worst:.1e} (of {limit:.1e})"
    return Check("image levels", worst <= limit, why)


def processed(source: Source, data: bytes) -> torch.Tensor:
    """What the checkpoint's own processor makes of a file's bytes, [1, 3, height, width] FP32."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        pixels: torch.Tensor = _processor(source)(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    return pixels


def encoded(size: tuple[int, int]) -> bytes:
    """A PNG of this width and height, of soft spots of colour."""
    from PIL import Image

    rng = np.random.default_rng(SEED)
    spots = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    file = io.BytesIO()
    spots.resize(size, Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def _processor(source: Source) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(source.location, backend="pil")
