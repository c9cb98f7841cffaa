"""What a checkpoint says that it is, and the proof that a graph is made of its weights and of no others.

transformers fills what a file lacks with random numbers, and drops what it has no place for. So each weight is looked
at: one that the answers depend on must come from the checkpoint, and one that they do not depend on is named. Which
those are is seen in the gradients of an answer. Knows nothing of families.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tutti.export.errors import ExportError, first_line
from tutti.export.graphs import Check
from tutti.export.sources import Source

_NAMED = 4
# Counts of training steps: nothing that answers depend on.
_COUNTERS = "num_batches_tracked"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model of transformers, which weights it has that no file has, and which the files have that it has not."""

    model: Any
    missing: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


_TAKES = {"audio": "sounds", "vision": "pictures", "text": "texts"}


@contextmanager
def told(source: Source) -> Iterator[None]:
    """Whatever transformers raises on reading a checkpoint -> ExportError, in a sentence."""
    try:
        yield
    except ExportError:
        raise
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise ExportError(f"transformers cannot load '{source.given}': {first_line(error)}") from None


def configuration(source: Source, kind: str) -> Any:
    """The checkpoint's, or one made of `config:TYPE`. Raises ExportError where another command than `kind` takes it."""
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # What it says of missing weights is looked at here, and told; what it says of training and sharding is of no use.
    transformers_logging.set_verbosity_error()
    with told(source):
        if source.location is not None:
            config = AutoConfig.from_pretrained(source.location)
        elif source.config_type in CONFIG_MAPPING:
            config = AutoConfig.for_model(source.config_type, **dict(source.options))
        else:
            near = difflib.get_close_matches(source.config_type, CONFIG_MAPPING.keys(), 1)
            hint = f"; did you mean 'config:{near[0]}'?" if near else ", as config:bert"
            raise ValueError(f"expected config:TYPE with a type that it knows{hint}")
    kind_of_config = _kind_of(config.model_type)
    if kind_of_config not in ("", kind):
        hint = f"'{source.given}' is a {config.model_type}, which takes {_TAKES[kind_of_config]}"
        raise ExportError(f"{hint}: tutti export {kind_of_config} {source.given}")
    return config


def _kind_of(model_type: str) -> str:
    """The command that takes models of a type; "" where several do, or nobody knows."""
    from transformers.models.auto import modeling_auto as known

    kinds = {
        "audio": {*known.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, "clap"},
        "vision": {*known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES},
        "text": {*known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, *known.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES},
    }
    pairs = known.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES  # with an encoder for texts and one for images
    candidates = [kind for kind, types in kinds.items() if model_type in types and model_type not in pairs]
    return candidates[0] if len(candidates) == 1 else ""


def architecture(config: Any) -> str:
    """The class whose weights the checkpoint holds, as BertForTokenClassification; "" where it does not say."""
    return str(next(iter(config.architectures or ()), ""))


def task_of(config: Any) -> str:
    """What of the architecture's name stands behind "For", as TokenClassification; "" for a model without a head."""
    return architecture(config).partition("For")[2]


def load(family: Any, source: Source, config: Any, **more: Any) -> Loaded:
    """A model in float32; of random weights, of which none is missing, for `config:TYPE`."""
    torch.manual_seed(0)
    with told(source):
        if source.location is None:
            make = getattr(family, "from_config", None) or family._from_config
            return Loaded(make(config).eval())
        model, seen = family.from_pretrained(source.location, dtype=torch.float32, output_loading_info=True, **more)
    if seen.get("mismatched_keys"):
        name = str(next(iter(seen["mismatched_keys"])))
        raise ExportError(f"'{source.given}': weight {name} has another shape in its file than its config.json says")
    return Loaded(model.eval(), tuple(sorted(seen["missing_keys"])), tuple(sorted(seen["unexpected_keys"])))


def check_weights(
    loaded: Loaded, module: torch.nn.Module, example: Mapping[str, torch.Tensor], source: Source, hint: str = ""
) -> Check:
    """That what `module` answers is made of the checkpoint's weights alone; what of these it does not need is named.

    `module` holds `loaded.model`. Raises ExportError, with `hint` for what would work, where a weight that is needed
    is in no file of the checkpoint, or where answers change from run to run.
    """
    needed = _needed(module, loaded.model, example, source)
    invented = [name for name in loaded.missing if name in needed]
    if invented:
        kind = architecture(loaded.model.config) or loaded.model.config.model_type
        raise ExportError(
            f"'{source.given}' is no {type(loaded.model).__name__}: it holds a {kind}, whose files lack "
            f"{named(invented)}, and random numbers would stand there{hint and '; ' + hint}"
        )
    weights = [name for name, _ in loaded.model.named_parameters(remove_duplicate=False)]
    present = [name for name in weights if name not in loaded.missing]
    spare = [*(name for name in present if name not in needed), *loaded.unread]
    used = len(present) + len(loaded.unread) - len(spare)
    if source.location is None:
        return Check("weights", True, "random ones")
    told_spare = f"; not used: {named(spare)}" if spare else ""
    return Check("weights", True, f"{used} of the checkpoint's {used + len(spare)} are in the answers{told_spare}")


def _needed(module: torch.nn.Module, model: Any, example: Mapping[str, torch.Tensor], source: Source) -> set[str]:
    """The names in `model` of the parameters that answers depend on, and of all buffers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        answers = _floats(module(**example))
        again = _floats(module(**example))
        total = sum((answer.sum() for answer in answers), torch.zeros(()))
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        kind = architecture(model.config) or model.config.model_type
        raise ExportError(f"'{source.given}', a {kind}, cannot be run as this family: {first_line(error)}") from None
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
    if any(not torch.equal(answer, other) for answer, other in zip(answers, again, strict=True)):
        raise ExportError(f"'{source.given}' answers otherwise each time that it is asked: it draws at random")
    used = {
        id(parameter)
        for parameter, gradient in zip(parameters.values(), gradients, strict=True)
        if gradient is not None
    }
    buffers = {name for name, _ in model.named_buffers() if not name.endswith(_COUNTERS)}
    return {name for name, parameter in parameters.items() if id(parameter) in used} | buffers


def _floats(answers: Any) -> list[torch.Tensor]:
    answers = (answers,) if isinstance(answers, torch.Tensor) else answers
    return [tensor for tensor in answers if tensor.is_floating_point()]


def named(names: Sequence[str]) -> str:
    """The first few, and how many there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def file(source: Source, name: str) -> Path | None:
    """A file of the checkpoint, from its folder or from the hub; None where it has no such file."""
    if source.location is None:
        return None
    if source.is_local:
        path = source.path / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    with told(source):
        file = cached_file(
            source.location, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False
        )
    return Path(file) if file else None


def read_json(source: Source, name: str) -> Any:
    """The content of a JSON file of the checkpoint; None where it has no such file."""
    path = file(source, name)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"'{source.given}': {name} is no JSON: {first_line(error)}") from None


def function_of(config: Any, is_one_sigmoid: bool = True) -> str:
    """What turns logits into scores, as transformers' pipelines do it: "none", "sigmoid" or "softmax".

    Of a single class they make a sigmoid, but for sounds.
    """
    kind = getattr(config, "problem_type", None)
    if kind == "regression":
        return "none"
    if kind == "multi_label_classification" or (config.num_labels == 1 and is_one_sigmoid):
        return "sigmoid"
    return "softmax"


def scores(logits: torch.Tensor, function: str) -> torch.Tensor:
    """[..., classes] of logits, by `function_of`."""
    if function == "sigmoid":
        return logits.sigmoid()
    return logits.softmax(-1) if function == "softmax" else logits


def labels(config: Any) -> tuple[str, ...]:
    """The classes' names, in their order. Raises ExportError where a class has none."""
    names = config.id2label
    try:
        return tuple(str(names[number]) for number in range(len(names)))
    except KeyError as error:
        raise ExportError(f"config.json: id2label has {len(names)} names, and none for class {error}") from None
