"""Vision through transformers: image classifiers, image embeddings (CLIP, SigLIP) and zero-shot classification.

Rescaling and normalisation are in the graph. Decoding, resizing and cropping are a python step: pictures come in any
size, and only those of one size share a batch.
"""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from export import digits, layout, onnx
from export.ensemble import chain, labels_step
from export.errors import ExportError
from export.graphs import Arrays, Check, Graph, Product
from export.narrow import Wide
from export.sources import Source
from tutti.config import TensorSpec

_log = logging.getLogger(__name__)

MAX_BATCH_SIZE = 32
SEED = 0
EPOCHS = 12
_CONTRASTIVE = ("clip", "siglip", "siglip2")
_IMAGE = TensorSpec("IMAGE", "BYTES", (1,))


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


class Normalize(Wide):
    """PIXELS [batch, 3, height, width] UINT8 -> what the network takes, FP32.

    In 32 bits also where the network has 16: contrast and brightness of every pixel follow from six numbers.
    """

    def __init__(self, how: Preprocessing) -> None:
        super().__init__()
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (how.mean, how.std))
        self.register_buffer("scale", how.scale / std)
        self.register_buffer("shift", -mean / std)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.to(self.scale.dtype) * self.scale + self.shift


class ImageClassifier(torch.nn.Module):
    """PIXELS [batch, 3, height, width] UINT8 -> IMAGE_SCORES [batch, classes] FP32, softmax."""

    def __init__(self, model: Any, how: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.normalize = Normalize(how)

    def forward(self, PIXELS: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensor's name in the repository
        return self.logits(PIXELS).softmax(-1)

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=self.normalize(pixels).to(self.model.dtype)).logits  # type: ignore[no-any-return]


class ImageEncoder(torch.nn.Module):
    """PIXELS [batch, 3, height, width] UINT8 -> EMBEDDING [batch, width] FP32 of length 1."""

    def __init__(self, model: Any, how: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.normalize = Normalize(how)

    def forward(self, PIXELS: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensor's name in the repository
        found = self.model.get_image_features(pixel_values=self.normalize(PIXELS).to(self.model.dtype))
        return F.normalize(found if isinstance(found, torch.Tensor) else found.pooler_output, dim=-1)


class ZeroShot(torch.nn.Module):
    """PIXELS -> IMAGE_SCORES [batch, classes] FP32, against the embeddings of the classes' texts, kept in the graph.

    CLIP: softmax over scale * cosine. SigLIP: the sigmoid of scale * cosine + bias, each class by itself.
    """

    def __init__(self, encoder: ImageEncoder, texts: torch.Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("texts", texts.T.contiguous())
        self.register_buffer("scale", encoder.model.logit_scale.detach().exp())
        bias = getattr(encoder.model, "logit_bias", None)
        self.register_buffer("bias", bias.detach() if bias is not None else torch.zeros(1))
        self._is_apart = bias is not None

    def forward(self, PIXELS: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensor's name in the repository
        logits = self.encoder(PIXELS) @ self.texts * self.scale + self.bias
        return logits.sigmoid() if self._is_apart else logits.softmax(-1)


def load(source: Source, image_size: int | None, task: str) -> tuple[Any, Preprocessing, str]:
    """(model, its preprocessing, "classification" or "embedding") of a hub id, a local folder or a configuration."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    torch.manual_seed(SEED)
    try:
        if source.location is None:
            config = AutoConfig.for_model(source.config_type, **dict(source.options))
        else:
            config = AutoConfig.from_pretrained(source.location)
        if task == "auto":
            named = " ".join(config.architectures or [])
            is_plain = config.model_type not in _CONTRASTIVE or "ForImageClassification" in named
            task = "classification" if is_plain else "embedding"
        if task == "embedding" and config.model_type not in _CONTRASTIVE:
            raise ExportError(f"image embeddings: expected {', '.join(_CONTRASTIVE)}, got a {config.model_type}")
        family = AutoModelForImageClassification if task == "classification" else AutoModel
        if source.location is None:
            model = family.from_config(config)
        else:
            model = family.from_pretrained(source.location, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"transformers cannot load the image model: {error}") from None
    return model.eval(), _preprocessing(source, model.config, image_size), task


def _preprocessing(source: Source, config: Any, image_size: int | None) -> Preprocessing:
    """Of the checkpoint's own image processor, or plain ones where it has none."""
    from transformers import AutoImageProcessor

    configured = getattr(config, "image_size", None) or getattr(
        getattr(config, "vision_config", None), "image_size", 224
    )
    height, width = (configured, configured) if isinstance(configured, int) else map(int, configured or (224, 224))
    if image_size:
        height = width = image_size
    plain = Preprocessing((0.5,) * 3, (0.5,) * 3, height, width)
    if source.location is None:
        return plain
    try:
        processor = AutoImageProcessor.from_pretrained(source.location, backend="pil")
    except (OSError, ValueError):
        _log.warning("'%s' has no image processor: mean and deviation 0.5, size %s", source.location, (height, width))
        return plain
    return _of_processor(processor, height, width, image_size)


def _of_processor(processor: Any, height: int, width: int, image_size: int | None) -> Preprocessing:
    mean, std = tuple(processor.image_mean or (0.0,) * 3), tuple(processor.image_std or (1.0,) * 3)
    if not getattr(processor, "do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    scale = float(getattr(processor, "rescale_factor", None) or 1 / 255)
    resample = int(processor.resample if processor.resample is not None else 2)
    if image_size:
        return Preprocessing(mean, std, image_size, image_size, "exact", resample, scale)
    size: dict[str, Any] = dict(processor.size or {})
    edge = size.get("shortest_edge")
    if not edge:
        height, width = int(size.get("height") or height), int(size.get("width") or width)
        return Preprocessing(mean, std, height, width, "exact", resample, scale)
    part = getattr(processor, "crop_pct", None)
    if part is not None:  # ConvNeXt's processor, which ResNet has too
        if edge >= 384:
            return Preprocessing(mean, std, edge, edge, "exact", resample, scale)
        return Preprocessing(mean, std, edge, edge, str(int(edge / part)), resample, scale)
    crop: dict[str, Any] = dict(getattr(processor, "crop_size", None) or {})
    if not getattr(processor, "do_center_crop", False) or not crop:
        raise ExportError("the image processor keeps each picture's proportions and does not crop: give --image-size")
    return Preprocessing(mean, std, int(crop["height"]), int(crop["width"]), str(edge), resample, scale)


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


def transform() -> Any:
    """The function that the published decoder uses."""
    spec = importlib.util.spec_from_file_location("image_transform", layout.step_file("image_transform"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fitted


def _cases(how: Preprocessing, samples: Path | None) -> list[Arrays]:
    rng = np.random.default_rng(SEED)
    size = (3, how.height, how.width)
    cases: list[Arrays] = [{"PIXELS": rng.integers(0, 256, size=(n, *size), dtype=np.uint8)} for n in (1, 2, 5, 16)]
    # Smooth ones, as pictures are: noise excites few features.
    ramps = np.linspace(0, 255, how.width)[np.newaxis] * np.linspace(0, 1, how.height)[:, np.newaxis]
    cases.append({"PIXELS": np.stack([np.stack([ramps, ramps[::-1], ramps[:, ::-1]])]).astype(np.uint8)})
    own = [_opened(path, how) for path in sorted(samples.iterdir())] if samples is not None else []
    return cases + [{"PIXELS": np.stack(own[at : at + 16])} for at in range(0, len(own), 16)]


def _opened(path: Path, how: Preprocessing) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return transform()(image, how.height, how.width, how.resize, how.resample)
    except (OSError, UnidentifiedImageError) as error:
        raise ExportError(f"--samples: {path}: expected a picture: {error}") from None


def check_processor(source: Source, how: Preprocessing) -> Check:
    """Whether the decoder step and the graph make of pictures what the checkpoint's own processor does."""
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(source.location, backend="pil")
    normalize, rng = Normalize(how), np.random.default_rng(SEED)
    worst = 0.0
    for width, height in (
        (how.width, how.height),
        (2 * how.width + 7, how.height + 40),
        (how.width + 9, 3 * how.height),
    ):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        picture = small.resize((width, height), Image.Resampling.BICUBIC)
        expected = processor(picture, return_tensors="pt")["pixel_values"].numpy()
        fitted = transform()(picture, how.height, how.width, how.resize, how.resample)
        got = normalize(torch.from_numpy(np.ascontiguousarray(fitted)).unsqueeze(0)).numpy()
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


def text_embeddings(source: Source, model: Any, labels: Sequence[str], template: str) -> torch.Tensor:
    """[classes, width] of length 1. Raises ExportError for a template without a place for the class."""
    from transformers import AutoTokenizer

    if "{}" not in template:
        raise ExportError(f"--template: expected a text with {{}} in it, got '{template}'")
    if source.location is None:
        raise ExportError("zero-shot classification needs a tokenizer: give a hub id or a local folder, not config:")
    tokenizer = AutoTokenizer.from_pretrained(source.location)
    # SigLIP was trained on texts of full length.
    is_full = model.config.model_type != "clip"
    length = int(getattr(model.config.text_config, "max_position_embeddings", 64))
    tokens = tokenizer(
        [template.format(label) for label in labels], return_tensors="pt", truncation=True, max_length=length,
        padding="max_length" if is_full else True,
    )  # fmt: skip
    given = {"input_ids": tokens["input_ids"]} | ({} if is_full else {"attention_mask": tokens["attention_mask"]})
    with torch.inference_mode():
        found = model.get_text_features(**given)
    return F.normalize(found if isinstance(found, torch.Tensor) else found.pooler_output, dim=-1).clone()


def product(
    source: Source,
    name: str,
    ensemble: str,
    work: Path,
    task: str,
    labels: str | None,
    template: str,
    train: str | None,
    image_size: int | None,
    samples: Path | None,
) -> Product:
    """NAME_decoder with NAME_classifier or NAME_encoder, and the ensemble over both."""
    if samples is not None and not samples.is_dir():
        raise ExportError(f"--samples {samples}: expected a folder of pictures")
    model, how, kind = load(source, image_size, task)
    classes: list[str] = []
    accuracy = None
    module: torch.nn.Module
    if kind == "embedding":
        module = ImageEncoder(model, how).eval()
        if labels:
            classes = [one.strip() for one in labels.split(",") if one.strip()]
            module = ZeroShot(module, text_embeddings(source, model, classes, template)).eval()
    else:
        if labels:
            raise ExportError(f"--labels: zero-shot needs {', '.join(_CONTRASTIVE)}, got a {model.config.model_type}")
        module = ImageClassifier(model, how).eval()
        accuracy = train_on_digits(module, (how.height, how.width)) if train == "digits" else None
        names = model.config.id2label
        classes = list(map(str, range(10))) if train == "digits" else [str(names[i]) for i in range(len(names))]
    own = graph(module, how, name, classes, samples)
    decoder = layout.Entry(
        f"{name}_decoder", "python", [_IMAGE], [TensorSpec("PIXELS", "UINT8", (3, how.height, how.width))],
        {"model.py": layout.step_file("image_decoder"), "image_transform.py": layout.step_file("image_transform")},
        MAX_BATCH_SIZE, {"resize": how.resize, "resample": str(how.resample)},
    )  # fmt: skip
    checks = []
    if source.location is not None and not image_size and _has_processor(source):
        checks.append(lambda _: check_processor(source, how))
    steps, make = [decoder], None
    if ensemble:
        steps += [labels_step(name, classes, work)] if classes else []
        names = [decoder.name, own.name, *(step.name for step in steps[1:])]
        make = lambda entries: chain(ensemble, _IMAGE, [entries[one] for one in names])  # noqa: E731
    return Product([own], steps, make, source.provenance, checks, accuracy)


def _has_processor(source: Source) -> bool:
    return not source.is_local or (source.path / "preprocessor_config.json").is_file()


def graph(
    module: torch.nn.Module, how: Preprocessing, name: str, classes: Sequence[str], samples: Path | None
) -> Graph:
    """NAME_classifier, or NAME_encoder where there are no classes."""
    cases = _cases(how, samples)
    size = (3, how.height, how.width)
    return Graph(
        f"{name}_{'classifier' if classes else 'encoder'}",
        module,
        {"PIXELS": torch.from_numpy(np.asarray(cases[1]["PIXELS"]))},
        ("IMAGE_SCORES",) if classes else ("EMBEDDING",),
        {"PIXELS": {0: onnx.BATCH}},
        cases,
        {"PIXELS": ((1, *size), (8, *size), (MAX_BATCH_SIZE, *size))},
        max_batch_size=MAX_BATCH_SIZE,
        parameters={"intra_op_thread_count": "1"},
        labels=classes,
        decision="IMAGE_SCORES" if classes else "",
    )
