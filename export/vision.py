"""Vision through transformers: image classifiers, image embeddings and zero-shot classification.

Rescaling and normalisation are in the graph, unless it takes FP32. Decoding, resizing and cropping are a python step:
pictures come in any size, and only those of one size share a batch.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from tutti.export import checkpoint, digits, onnx, pixels
from tutti.export.checkpoint import Loaded
from tutti.export.ensemble import chain, labels_step
from tutti.export.errors import ExportError
from tutti.export.graphs import Arrays, Check, Graph, Product, Trial
from tutti.export.pixels import IMAGE, MAX_BATCH_SIZE, Form, Normalize, Preprocessing
from tutti.export.sources import Source

_log = logging.getLogger(__name__)

EPOCHS = 12
_CONTRASTIVE = ("clip", "siglip", "siglip2")


class ImageClassifier(torch.nn.Module):
    """PIXELS [batch, 3, height, width] UINT8, or another form -> IMAGE_SCORES [batch, classes] FP32.

    Softmax, or as the checkpoint's problem is.
    """

    def __init__(self, model: Any, how: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.normalize = Normalize(how)
        self._function = checkpoint.function_of(model.config)

    def forward(self, PIXELS: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensor's name in the repository
        return checkpoint.scores(self.logits(PIXELS), self._function)

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=self.normalize(pixels).to(self.model.dtype)).logits  # type: ignore[no-any-return]


class ImageEncoder(torch.nn.Module):
    """PIXELS [batch, 3, height, width] UINT8, or another form -> EMBEDDING [batch, width] FP32 of length 1."""

    def __init__(self, model: Any, how: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.normalize = Normalize(how)

    def forward(self, PIXELS: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensor's name in the repository
        features = self.model.get_image_features(pixel_values=self.normalize(PIXELS).to(self.model.dtype))
        return F.normalize(features if isinstance(features, torch.Tensor) else features.pooler_output, dim=-1)


class Backbone(torch.nn.Module):
    """PIXELS -> EMBEDDING [batch, width] FP32 of a network without a head: what it pools, or else its first place.

    Not made of length 1: nothing in such a checkpoint asks for it.
    """

    def __init__(self, model: Any, how: Preprocessing, is_pooled: bool = True) -> None:
        super().__init__()
        self.model = model
        self.normalize = Normalize(how)
        self._is_pooled = is_pooled

    def forward(self, PIXELS: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensor's name in the repository
        answer = self.model(pixel_values=self.normalize(PIXELS).to(self.model.dtype))
        pooled = getattr(answer, "pooler_output", None) if self._is_pooled else None
        return answer.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


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


def load(source: Source, image_size: int | None, task: str) -> tuple[Loaded, Preprocessing, str]:
    """(model, its preprocessing, "classification" or "embedding") of a hub id, a local folder or a configuration.

    `task` auto is what the checkpoint's architecture says. Raises ExportError for what is not covered.
    """
    from transformers import AutoModel, AutoModelForImageClassification

    config = checkpoint.configuration(source, "vision")
    kind = _kind(config, source) if task == "auto" else task
    family = AutoModelForImageClassification if kind == "classification" else AutoModel
    loaded = checkpoint.load(family, source, config)
    return loaded, _preprocessing(source, loaded.model.config, image_size), kind


def _kind(config: Any, source: Source) -> str:
    name, task = checkpoint.architecture(config), checkpoint.task_of(config)
    if task.startswith("ImageClassification") or (source.location is None and config.model_type not in _CONTRASTIVE):
        return "classification"
    if not task and (name.endswith("Model") or not name or config.model_type in _CONTRASTIVE):
        return "embedding"
    raise ExportError(
        f"'{source.given}' is a {name}: `tutti export vision` covers image classifiers, image embeddings and "
        "zero-shot classification; --task embedding publishes the embeddings of its backbone, without the head"
    )


def _module(loaded: Loaded, how: Preprocessing, kind: str, source: Source) -> tuple[Any, Check]:
    """The network with its preparation, and what was seen of its weights."""
    example = {"PIXELS": torch.randint(0, 256, (1, 3, how.height, how.width), dtype=torch.uint8)}
    if kind == "classification":
        hint = "--task embedding publishes its embeddings"
        classifier = ImageClassifier(loaded.model, how).eval()
        return classifier, checkpoint.check_weights(loaded, classifier, example, source, hint)
    if loaded.model.config.model_type in _CONTRASTIVE:
        encoder = ImageEncoder(loaded.model, how).eval()
        return encoder, checkpoint.check_weights(loaded, encoder, example, source)
    # A pooler that is not in the checkpoint is none of its own.
    is_pooled = not any("pooler" in name for name in loaded.missing)
    backbone = Backbone(loaded.model, how, is_pooled).eval()
    return backbone, checkpoint.check_weights(loaded, backbone, example, source)


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
    torch.manual_seed(pixels.SEED)
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


def _cases(how: Preprocessing, samples: Path | None) -> list[Arrays]:
    opened = [_opened(path, how) for path in sorted(samples.iterdir())] if samples is not None else []
    return pixels.cases(how) + [{"PIXELS": np.stack(opened[start : start + 16])} for start in range(0, len(opened), 16)]


def _opened(path: Path, how: Preprocessing) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return pixels.fitted(image, how)
    except (OSError, UnidentifiedImageError) as error:
        raise ExportError(f"--samples: {path}: expected a picture: {error}") from None


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
    arguments = {"input_ids": tokens["input_ids"]} | ({} if is_full else {"attention_mask": tokens["attention_mask"]})
    with torch.inference_mode():
        features = model.get_text_features(**arguments)
    return F.normalize(features if isinstance(features, torch.Tensor) else features.pooler_output, dim=-1).clone()


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
    form: Form = Form(),  # noqa: B008 - it cannot change
) -> Product:
    """NAME_decoder with NAME_classifier or NAME_encoder, and the ensemble over both; PIXELS go between them."""
    if samples is not None and not samples.is_dir():
        raise ExportError(f"--samples {samples}: expected a folder of pictures")
    loaded, how, kind = load(source, image_size, task)
    model = loaded.model
    whole, seen = _module(loaded, how, kind, source)
    classes: list[str] = []
    accuracy = None
    module: torch.nn.Module
    if kind == "embedding":
        module = encoder = whole
        encoder.normalize = form.entrance(how)
        if labels and isinstance(encoder, ImageEncoder):
            if loaded.missing:
                raise ExportError(
                    f"'{source.given}' lacks {checkpoint.named(loaded.missing)}: --labels needs all of it"
                )
            classes = [label.strip() for label in labels.split(",") if label.strip()]
            module = ZeroShot(encoder, text_embeddings(source, model, classes, template)).eval()
        elif labels:
            raise ExportError(f"--labels: zero-shot needs {', '.join(_CONTRASTIVE)}, got a {model.config.model_type}")
    else:
        if labels:
            raise ExportError(f"--labels: zero-shot needs {', '.join(_CONTRASTIVE)}, got a {model.config.model_type}")
        module = classifier = whole
        accuracy = train_on_digits(classifier, (how.height, how.width)) if train == "digits" else None
        classifier.normalize = form.entrance(how)
        classes = list(map(str, range(10))) if train == "digits" else list(checkpoint.labels(model.config))
    graph_of_model = graph(module, how, name, classes, samples, form)
    decoder = pixels.decoder_step(name, how, form)
    checks = [lambda _: seen]
    if source.location is not None and _has_processor(source):
        checks.append(lambda _: pixels.check_levels(source, how, form))
        if not image_size:
            checks.append(lambda _: pixels.check_processor(source, how))
    steps, make = [decoder], None
    if ensemble:
        steps += [labels_step(name, classes, work)] if classes else []
        names = [decoder.name, graph_of_model.name, *(step.name for step in steps[1:])]
        make = lambda entries: chain(ensemble, IMAGE, [entries[entry] for entry in names])  # noqa: E731
    asked = _trials(whole, how, kind, source, form) if make is not None and not (labels or train or image_size) else []
    return Product([graph_of_model], steps, make, source.provenance, checks, accuracy, asked)


def _trials(module: Any, how: Preprocessing, kind: str, source: Source, form: Form) -> list[Trial]:
    """Pictures of several sizes, as the checkpoint's own processor and transformers' own model answer them."""
    if source.location is None or not _has_processor(source):
        return []
    model = module.model
    output = "IMAGE_SCORES" if kind == "classification" else "EMBEDDING"

    def original(data: bytes) -> Arrays:
        pixel_values = pixels.processed(source, data)
        with torch.inference_mode():
            if kind == "classification":
                scores = checkpoint.scores(
                    model(pixel_values=pixel_values).logits, checkpoint.function_of(model.config)
                )
            else:
                entrance, module.normalize = module.normalize, torch.nn.Identity()
                scores = module(pixel_values)
                module.normalize = entrance
        return {output: scores.numpy()}

    sizes = (("a small picture", (40, 30)), ("a wide one", (320, 200)), ("a high one", (150, 400)))
    pictures = [(subject, pixels.encoded(size)) for subject, size in sizes]
    return [Trial(subject, {"IMAGE": data}, partial(original, data)) for subject, data in pictures]


def _has_processor(source: Source) -> bool:
    return not source.is_local or (source.path / "preprocessor_config.json").is_file()


def graph(
    module: torch.nn.Module, how: Preprocessing, name: str, classes: Sequence[str], samples: Path | None, form: Form
) -> Graph:
    """NAME_classifier, or NAME_encoder where there are no classes."""
    cases = [{"PIXELS": form.sent(case["PIXELS"], how)} for case in _cases(how, samples)]
    size = form.shape(how)
    return Graph(
        f"{name}_{'classifier' if classes else 'encoder'}",
        module,
        {"PIXELS": torch.from_numpy(cases[1]["PIXELS"])},
        ("IMAGE_SCORES",) if classes else ("EMBEDDING",),
        {"PIXELS": {0: onnx.BATCH}},
        cases,
        {"PIXELS": ((1, *size), (8, *size), (MAX_BATCH_SIZE, *size))},
        max_batch_size=MAX_BATCH_SIZE,
        parameters={"intra_op_thread_count": "1"},
        labels=classes,
        decision="IMAGE_SCORES" if classes else "",
    )
