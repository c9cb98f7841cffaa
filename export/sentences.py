"""What the files of sentence-transformers say of a checkpoint: prompt, lengths, pooling, projections, normalisation.

Each module that modules.json names is built here, or refused by its name. Without modules.json: the mean over the
attention mask, of length 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from tutti.export import checkpoint
from tutti.export.checkpoint import named
from tutti.export.errors import ExportError
from tutti.export.sources import Source

_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# As older versions say it, one key for each mode, in the order in which several are put together.
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: Mapping[str, Callable[[], torch.nn.Module]] = {
    "Identity": torch.nn.Identity,
    "Tanh": torch.nn.Tanh,
    "ReLU": torch.nn.ReLU,
    "GELU": torch.nn.GELU,
    "SiLU": torch.nn.SiLU,
    "Sigmoid": torch.nn.Sigmoid,
}
# What it does is nothing, once training is over.
_SILENT = ("Dropout",)


class Pooling(torch.nn.Module):
    """hidden [batch, length, width], mask [batch, length] -> [batch, modes * width]. Padding is on the right."""

    def __init__(self, modes: Sequence[str] = ("mean",)) -> None:
        super().__init__()
        self._modes = tuple(modes)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = [getattr(self, f"_{mode}")(hidden, weights) for mode in self._modes]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)

    def _cls(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return hidden[:, 0]

    def _max(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return hidden.masked_fill(weights == 0, torch.finfo(hidden.dtype).min).amax(1)

    def _mean(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)

    def _mean_sqrt_len_tokens(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9).sqrt()

    def _weightedmean(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._mean(hidden, weights * weights.cumsum(1))

    def _lasttoken(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        places = weights.cumsum(1)
        is_last = (places == weights.sum(1, keepdim=True)).to(hidden.dtype) * weights
        return (hidden * is_last).sum(1)


class Normalize(torch.nn.Module):
    """[batch, width] of length 1."""

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return F.normalize(pooled, p=2.0, dim=1)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a text becomes an embedding around the network. `pooling` first, then `stages` one after the other.

    `source` is where the network is; `most` the most tokens, None where nothing is said; `prompt` stands before each
    text, of `prompts` that there are.
    """

    source: Source
    pooling: Pooling = field(default_factory=Pooling)
    stages: Sequence[torch.nn.Module] = field(default_factory=lambda: (Normalize(),))
    most: int | None = None
    is_lowered: bool = False
    prompt: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)
    is_told: bool = False
    # Of a model that gives pairs of texts a score, and what it says its logits go through; "" where it does not.
    is_cross_encoder: bool = False
    activation: str = ""


def read(source: Source, prompt: str | None = None) -> Recipe:
    """Of a checkpoint's files. `prompt` names one of its prompts, "" none; None is the checkpoint's default.

    Raises ExportError naming the module, the pooling or the prompt that is not known.
    """
    modules = checkpoint.read_json(source, "modules.json")
    settings = checkpoint.read_json(source, "config_sentence_transformers.json") or {}
    prompts = {str(name): str(text) for name, text in (settings.get("prompts") or {}).items()}
    text = _prompt(prompts, settings.get("default_prompt_name"), prompt)
    if modules is None:
        return Recipe(source, prompt=text, prompts=prompts, **_lengths(source))
    of = str(settings.get("model_type") or "SentenceTransformer")
    if of not in ("SentenceTransformer", "CrossEncoder"):
        raise ExportError(f"'{source.given}' is a {of}: covered are a SentenceTransformer's and a CrossEncoder's files")
    kinds = [(str(module["type"]).rpartition(".")[2], str(module.get("path") or "")) for module in modules]
    if of == "CrossEncoder" and [kind for kind, _ in kinds] == ["Transformer"]:
        inner, activation = _inner(source, kinds[0][1]), str(settings.get("activation_fn") or "")
        recipe = Recipe(inner, prompt=text, prompts=prompts, **_lengths(inner))
        return replace(recipe, is_cross_encoder=True, activation=activation)
    if [kind for kind, _ in kinds[:2]] != ["Transformer", "Pooling"]:
        raise ExportError(
            f"modules.json: expected a Transformer and a Pooling first, got {', '.join(kind for kind, _ in kinds)}"
        )
    inner = _inner(source, kinds[0][1])
    modes = _modes(checkpoint.read_json(source, f"{kinds[1][1]}/config.json") or {}, bool(text))
    stages = [_stage(source, kind, path) for kind, path in kinds[2:] if kind not in _SILENT]
    return Recipe(inner, Pooling(modes), stages, prompt=text, prompts=prompts, is_told=True, **_lengths(inner))


def _prompt(prompts: Mapping[str, str], default: str | None, asked: str | None) -> str:
    name = default if asked is None else asked
    if not name:
        return ""
    if name not in prompts:
        raise ExportError(f"the checkpoint has no prompt '{name}': expected one of {', '.join(prompts) or 'none'}")
    return prompts[name]


def _lengths(source: Source) -> dict[str, Any]:
    told = checkpoint.read_json(source, "sentence_bert_config.json") or {}
    most = told.get("max_seq_length")
    return {"most": int(most) if most else None, "is_lowered": bool(told.get("do_lower_case"))}


def _inner(source: Source, path: str) -> Source:
    """Where the network itself is: older checkpoints have it in a folder of its own."""
    if not path:
        return source
    if not source.is_local:
        raise ExportError(f"its network is in the folder '{path}' of the hub's files: give a local copy of them")
    return Source(str(source.path / path), given=source.given)


def _modes(told: Mapping[str, Any], has_prompt: bool) -> list[str]:
    """Of a Pooling's config.json."""
    if has_prompt and told.get("include_prompt") is False:
        raise ExportError("its pooling leaves the prompt's tokens out: not covered; --prompt '' exports it without one")
    mode_of_config = told.get("pooling_mode")
    known_modes = (
        [mode for key, mode in _OLD_MODES.items() if told.get(key)] if mode_of_config is None else mode_of_config
    )
    modes = [known_modes] if isinstance(known_modes, str) else list(known_modes) or ["mean"]
    unknown = [
        key for key, value in told.items() if key.startswith("pooling_mode_") and value and key not in _OLD_MODES
    ]
    unknown += [mode for mode in modes if mode not in _MODES]
    if unknown:
        raise ExportError(f"its pooling: expected some of {', '.join(_MODES)}, got {unknown[0]}")
    return modes


def _stage(source: Source, kind: str, path: str) -> torch.nn.Module:
    if kind == "Normalize":
        return Normalize()
    if kind == "Dense":
        return _dense(source, path)
    if kind == "LayerNorm":
        told = checkpoint.read_json(source, f"{path}/config.json") or {}
        norm = torch.nn.LayerNorm(int(told["dimension"]))
        return _filled(norm, source, path, {"norm.": ""})
    known = "Transformer, Pooling, Dense, LayerNorm, Dropout and Normalize"
    raise ExportError(f"modules.json has a {kind} behind its pooling: covered are {known}")


def _dense(source: Source, path: str) -> torch.nn.Module:
    told = checkpoint.read_json(source, f"{path}/config.json") or {}
    place = told.get("module_input_name") or "sentence_embedding"
    if place != "sentence_embedding" or told.get("use_residual"):
        subject = "a residual" if told.get("use_residual") else f"'{place}'"
        raise ExportError(f"{path}/config.json: a Dense over sentence_embedding is covered, not one with {subject}")
    activation = str(told.get("activation_function") or "torch.nn.modules.activation.Tanh").rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise ExportError(f"{path}/config.json: expected one of {', '.join(_ACTIVATIONS)}, got {activation}")
    linear = torch.nn.Linear(int(told["in_features"]), int(told["out_features"]), bool(told.get("bias", True)))
    return torch.nn.Sequential(_filled(linear, source, path, {"linear.": ""}), _ACTIVATIONS[activation]())


def _filled(module: torch.nn.Module, source: Source, path: str, renamed: Mapping[str, str]) -> torch.nn.Module:
    """With the weights of its folder, all of them and no others."""
    weights = _weights(checkpoint.file(source, f"{path}/model.safetensors"), source, path)
    for old, new in renamed.items():
        weights = {name.replace(old, new, 1): weight.float() for name, weight in weights.items()}
    wanted = module.state_dict()
    if {name: weight.shape for name, weight in weights.items()} != {
        name: tensor.shape for name, tensor in wanted.items()
    }:
        raise ExportError(f"{path}: expected the weights {named(sorted(wanted))}, got {named(sorted(weights))}")
    module.load_state_dict(weights)
    return module.eval()


def _weights(file: Path | None, source: Source, path: str) -> dict[str, torch.Tensor]:
    with checkpoint.told(source):
        if file is not None:
            from safetensors.torch import load_file

            return dict(load_file(file))
        old = checkpoint.file(source, f"{path}/pytorch_model.bin")
        if old is None:
            raise ExportError(f"{path}: expected model.safetensors or pytorch_model.bin, got neither")
        return dict(torch.load(old, map_location="cpu", weights_only=True))
