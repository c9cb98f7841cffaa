"""Networks over the tokens of texts, as their graphs have them, and what is known of one with its tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from tutti.export import checkpoint
from tutti.export.graphs import Arrays, Check
from tutti.export.sentences import Pooling
from tutti.repository.model_config import TensorSpec

MAX_BATCH_SIZE = 32
TEXT = TensorSpec("TEXT", "BYTES", (1,))
TEXT_PAIR = TensorSpec("TEXT_PAIR", "BYTES", (1,))


class SentenceEncoder(torch.nn.Module):
    """input_ids, attention_mask [batch, length] INT64 -> EMBEDDING [batch, width] FP32."""

    def __init__(self, model: Any, pooling: Pooling, stages: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.stages = torch.nn.Sequential(*stages)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        answer = self.model(**_given(input_ids, attention_mask, token_type_ids))
        return self.stages(self.pooling(answer.last_hidden_state, attention_mask))  # type: ignore[no-any-return]


class Classifier(torch.nn.Module):
    """input_ids, attention_mask [batch, length] INT64 -> SCORES [batch, classes] FP32, or of each token."""

    def __init__(self, model: Any, function: str) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        answer = self.model(**_given(input_ids, attention_mask, token_type_ids))
        return checkpoint.scores(answer.logits, self.function)


class ContrastiveText(torch.nn.Module):
    """input_ids, attention_mask [batch, length] INT64 -> EMBEDDING [batch, width] FP32 of length 1: CLIP."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask}
        if hasattr(self.model, "get_text_features"):
            embedding = self.model.get_text_features(**arguments)
            embedding = embedding if isinstance(embedding, torch.Tensor) else embedding.pooler_output
        else:
            embedding = self.model(**arguments).text_embeds
        return F.normalize(embedding, dim=-1)


def _given(ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a network is called with: types only where the checkpoint's tokenizer makes some that are not 0."""
    return {"input_ids": ids, "attention_mask": mask} | ({} if types is None else {"token_type_ids": types})


@dataclass(frozen=True, slots=True)
class Encoder:
    """A loaded model with its tokenizer; None for random weights.

    `kind` is embedding, classification, ranking (classes of a pair of texts) or tokens (classes of each token). It has
    `places` for so many tokens, None for any number; its tokenizer makes at most `max_length` of a text. `inputs` are
    the graph's; `prompt` stands before each text. `weights` is what was seen of the checkpoint's.
    """

    module: torch.nn.Module
    tokenizer: Any
    max_length: int
    vocabulary: int
    places: int | None = None
    labels: tuple[str, ...] = ()
    kind: str = "embedding"
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    prompt: str = ""
    checks: tuple[Check, ...] = ()
    is_fixed: bool = False

    @property
    def output(self) -> str:
        return {"embedding": "EMBEDDING", "tokens": "TOKEN_SCORES"}.get(self.kind, "SCORES")

    @property
    def model(self) -> str:
        """The last part of its graph's name."""
        named = {"embedding": "encoder", "tokens": "tagger", "ranking": "ranker"}
        return named.get(self.kind, "classifier")

    @property
    def texts(self) -> tuple[TensorSpec, ...]:
        return (TEXT, TEXT_PAIR) if self.kind == "ranking" else (TEXT,)

    def tokens(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Arrays:
        """As the tokenizer step makes them, but for the buckets. Of pairs, each with itself where none are given."""
        second = list(pairs or texts) if self.kind == "ranking" else None
        encoded = self.tokenizer(
            [self.prompt + text for text in texts], second, padding="max_length" if self.is_fixed else True,
            truncation=True, max_length=self.max_length, return_tensors="np", padding_side="right",
            return_attention_mask=True, return_token_type_ids="token_type_ids" in self.inputs,
        )  # fmt: skip
        return {name: encoded[name].astype(np.int64) for name in self.inputs}

    def embed(self, texts: list[str], run: Callable[[Arrays], Any] | None = None) -> np.ndarray[Any, Any]:
        """[len(texts), width], in PyTorch or as `run` does it."""
        parts = []
        for start in range(0, len(texts), 64):
            tokens = self.tokens(texts[start : start + 64])
            if run is not None:
                parts.append(run(tokens))
                continue
            with torch.inference_mode():
                parts.append(self.module(*map(torch.from_numpy, tokens.values())).numpy())
        return np.concatenate(parts)


def example_of(encoder: Encoder) -> dict[str, torch.Tensor]:
    """A batch of 2, of random ids."""
    length = min(24, encoder.max_length)
    example = {
        "input_ids": torch.randint(0, encoder.vocabulary, (2, length)),
        "attention_mask": torch.ones(2, length, dtype=torch.int64),
        "token_type_ids": torch.zeros(2, length, dtype=torch.int64),
    }
    return {name: example[name] for name in encoder.inputs}
