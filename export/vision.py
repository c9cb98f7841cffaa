"""Image classifiers through transformers: pixels in, class scores out, with rescaling and normalisation in the graph.

Decoding and resizing is a python step of its own.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from export import digits, layout, onnx, parity
from export.errors import ExportError
from export.formats import Format, model_files
from export.parity import Report
from export.sources import Source
from tutti.config import TensorSpec

_log = logging.getLogger(__name__)

MAX_BATCH_SIZE = 32
TOLERANCE = 1e-4
SEED = 0
EPOCHS = 12


class ImageClassifier(torch.nn.Module):
    """PIXELS [batch, 3, height, width] UINT8 -> IMAGE_SCORES [batch, classes] FP32, softmax."""

    def __init__(self, model: Any, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale", 1 / (255 * torch.tensor(std).view(1, -1, 1, 1)))
        self.register_buffer("shift", -torch.tensor(mean).view(1, -1, 1, 1) / torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, PIXELS: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensor's name in the repository
        return self.logits(PIXELS).softmax(-1)

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels.float() * self.scale + self.shift).logits  # type: ignore[no-any-return]


def load(source: Source, image_size: int | None) -> tuple[ImageClassifier, tuple[int, int]]:
    """A classifier and the (height, width) it takes, from a hub id, a local folder or a bare configuration."""
    from transformers import AutoConfig, AutoModelForImageClassification

    torch.manual_seed(SEED)
    try:
        if source.location is None:
            config = AutoConfig.for_model(source.config_type, **dict(source.options))
            model = AutoModelForImageClassification.from_config(config)
        else:
            model = AutoModelForImageClassification.from_pretrained(source.location, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ExportError(f"transformers cannot load the image classifier: {error}") from None
    mean, std, size = _preprocessing(source, model.config)
    size = (image_size, image_size) if image_size else size
    return ImageClassifier(model, mean, std).eval(), size


def _preprocessing(source: Source, config: Any) -> tuple[list[float], list[float], tuple[int, int]]:
    """Mean, standard deviation and size of the checkpoint's own image processor, or plain ones where it has none."""
    from transformers import AutoImageProcessor

    configured = getattr(config, "image_size", 224)
    plain = (configured, configured) if isinstance(configured, int) else (int(configured[0]), int(configured[1]))
    if source.location is None:
        return [0.5] * 3, [0.5] * 3, plain
    try:
        processor = AutoImageProcessor.from_pretrained(source.location, use_fast=False)
    except (OSError, ValueError):
        _log.warning("'%s' has no image processor: mean and deviation 0.5, size %s", source.location, plain)
        return [0.5] * 3, [0.5] * 3, plain
    size: dict[str, Any] = dict(processor.size)
    edge = size.get("shortest_edge", plain[0])
    fitted = (int(size.get("height") or edge), int(size.get("width") or edge))
    return list(processor.image_mean), list(processor.image_std), fitted


def train_on_digits(classifier: ImageClassifier, size: tuple[int, int]) -> float:
    """Train on scikit-learn's digits, on pictures as the decoder step makes them; returns held-out accuracy."""
    torch.manual_seed(SEED)
    pictures, labels, held_out, held_out_labels = digits.load()
    inputs = torch.from_numpy(np.stack([digits.to_input(picture, *size) for picture in pictures]))
    targets = torch.tensor(labels)
    classifier.train()
    steps = EPOCHS * (len(inputs) // 32)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(inputs)).split(32):
            if len(batch) < 32:
                continue
            loss = F.cross_entropy(classifier.logits(_shifted(inputs[batch])), targets[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    classifier.eval()
    with torch.inference_mode():
        scores = classifier(torch.from_numpy(np.stack([digits.to_input(picture, *size) for picture in held_out])))
    return float((scores.argmax(-1) == torch.tensor(held_out_labels)).float().mean())


def _shifted(pixels: torch.Tensor) -> torch.Tensor:
    """Moved by up to an eighth of the height and width, the same for the whole batch."""
    height, width = pixels.shape[-2:]
    down, right = (int(torch.randint(-edge // 8, edge // 8 + 1, ())) for edge in (height, width))
    return pixels.roll((down, right), dims=(-2, -1))


def _cases(size: tuple[int, int]) -> list[Mapping[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(SEED)
    return [{"PIXELS": rng.integers(0, 256, size=(n, 3, *size), dtype=np.uint8)} for n in (1, 2, 5, 16)]


def export(
    source: Source, repository: Path, name: str, format: Format, work: Path, train: str | None, image_size: int | None
) -> tuple[list[Report], float | None]:
    """Publish NAME_decoder and NAME_classifier; and the held-out accuracy, where it was trained here.

    Raises ParityError, and publishes nothing, where the graph differs.
    """
    classifier, size = load(source, image_size)
    accuracy = train_on_digits(classifier, size) if train == "digits" else None
    if source.location is None and train is None:
        _log.warning("random weights (seed %d): for benchmarks only, its answers mean nothing", SEED)

    def reference(case: parity.Arrays) -> parity.Arrays:
        with torch.inference_mode():
            return {"IMAGE_SCORES": classifier(torch.from_numpy(np.asarray(case["PIXELS"]))).numpy()}

    path = work / "model.onnx"
    example = {"PIXELS": torch.from_numpy(_cases(size)[1]["PIXELS"])}
    onnx.save(classifier, path, example, ["IMAGE_SCORES"], {"PIXELS": {0: onnx.BATCH}})
    report = parity.check(path, reference, _cases(size), TOLERANCE)
    inputs, outputs = onnx.tensor_specs(path)
    profile = {"PIXELS": tuple((n, 3, *size) for n in (1, 8, MAX_BATCH_SIZE))}
    backend, files = model_files(format, path, profile)  # type: ignore[arg-type]
    id2label = classifier.model.config.id2label
    labels = list(map(str, range(10))) if train == "digits" else [str(id2label[i]) for i in range(len(id2label))]
    layout.publish(
        repository,
        [
            layout.Entry(
                f"{name}_decoder",
                "python",
                [TensorSpec("IMAGE", "BYTES", (1,))],
                inputs,
                {"model.py": layout.step_file("image_decoder")},
                MAX_BATCH_SIZE,
            ),
            layout.Entry(
                f"{name}_classifier",
                backend,
                inputs,
                outputs,
                files,
                MAX_BATCH_SIZE,
                {"intra_op_thread_count": "1"},
                labels,
            ),
        ],
    )
    return [report], accuracy
