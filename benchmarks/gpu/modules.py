"""The models as plain PyTorch, without transformers: what is measured bare, served by tutti and by Triton is the same.

MiniLM (real weights where they are at hand), ViT-B/16, ResNet-50 and Whisper-base by their published sizes, weights
drawn with a seed otherwise. They export, compile and are captured as they are. Pictures come as UINT8 and are
normalised where the model is; answers are FP32 but for the encoder's states, which are in the model's own precision.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# The buffers that grow with the batch.
CACHES = ("own", "clip")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a transformer. `classes` is the vocabulary of a text model, too."""

    layers: int
    width: int
    heads: int
    inner: int
    classes: int = 1000


class Attention(nn.Module):
    """x [batch, length, width] looks at `source`, itself by default; `mask` is added to the scores, or boolean."""

    def __init__(self, sizes: Sizes, has_key_bias: bool = True) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.query = nn.Linear(sizes.width, sizes.width)
        self.key = nn.Linear(sizes.width, sizes.width, bias=has_key_bias)
        self.value = nn.Linear(sizes.width, sizes.width)
        self.output = nn.Linear(sizes.width, sizes.width)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.attend(x, self.split(self.key(x)), self.split(self.value(x)), mask)

    def attend(
        self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        seen = F.scaled_dot_product_attention(self.split(self.query(x)), keys, values, attn_mask=mask)
        return self.output(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A layer that normalises after each half, as BERT's, or before, as all others."""

    def __init__(self, sizes: Sizes, is_post: bool = False, has_key_bias: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.is_post = is_post
        self.attention = Attention(sizes, has_key_bias)
        self.norm1 = nn.LayerNorm(sizes.width, eps=eps)
        self.up = nn.Linear(sizes.width, sizes.inner)
        self.down = nn.Linear(sizes.inner, sizes.width)
        self.norm2 = nn.LayerNorm(sizes.width, eps=eps)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.is_post:
            x = self.norm1(x + self.attention(x, mask))
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self.attention(self.norm1(x), mask)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TextEncoder(nn.Module):
    """input_ids, attention_mask [batch, length] INT64 -> embedding [batch, width] FP32 of length 1."""

    def __init__(self, sizes: Sizes, positions: int = 512) -> None:
        super().__init__()
        self.words = nn.Embedding(sizes.classes, sizes.width)
        self.positions = nn.Embedding(positions, sizes.width)
        self.types = nn.Embedding(2, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=1e-12)
        self.blocks = nn.ModuleList(Block(sizes, is_post=True, eps=1e-12) for _ in range(sizes.layers))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        places = self.positions.weight[: input_ids.shape[1]]
        x = self.norm(self.words(input_ids) + self.types.weight[0] + places)
        mask = attention_mask[:, None, None, :].bool()
        for block in self.blocks:
            x = block(x, mask)
        weights = attention_mask.unsqueeze(2).float()
        mean = (x.float() * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return F.normalize(mean, dim=1)


class Pictures(nn.Module):
    """Base of models of UINT8 pictures [batch, 3, height, width]."""

    def normalised(self, x: torch.Tensor) -> torch.Tensor:
        parameter = next(self.parameters())
        return x.to(parameter.dtype) * (1 / 127.5) - 1.0


class VisionTransformer(Pictures):
    """image UINT8 [batch, 3, size, size] -> logits [batch, classes] FP32."""

    def __init__(self, sizes: Sizes, size: int = 224, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, sizes.width, patch, patch)
        self.first = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.places = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, sizes.width) * 0.02)
        self.blocks = nn.ModuleList(Block(sizes, eps=1e-12) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-12)
        self.head = nn.Linear(sizes.width, sizes.classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patches(self.normalised(image)).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0])).float()


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions; the second has the stride."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, outside, 1, bias=False), nn.BatchNorm2d(outside)
        has_own = stride != 1 or inside != outside
        self.shortcut: nn.Module = (
            nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
            if has_own
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet(Pictures):
    """image UINT8 [batch, 3, size, size] -> logits [batch, classes] FP32; channels last inside."""

    def __init__(self, depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        blocks, inside = [], width
        for stage, depth in enumerate(depths):
            for number in range(depth):
                own = width << stage
                blocks.append(Bottleneck(inside, own, 2 if stage and not number else 1))
                inside = 4 * own
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inside, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.normalised(image).contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3))).float()


class SpeechEncoder(nn.Module):
    """mel [batch, 80, frames] FP32 -> states [batch, frames / 2, width], in the model's precision."""

    def __init__(self, sizes: Sizes, frames: int = 3000, bins: int = 80) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(bins, sizes.width, 3, 1, 1)
        self.conv2 = nn.Conv1d(sizes.width, sizes.width, 3, 2, 1)
        self.places = nn.Parameter(torch.randn(frames // 2, sizes.width) * 0.02)
        self.blocks = nn.ModuleList(Block(sizes, has_key_bias=False) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.conv1(mel.to(self.places.dtype)))
        x = F.gelu(self.conv2(x)).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class SpeechDecoder(nn.Module):
    """One step: ids [batch, 1] INT64 after `past` tokens about a clip of `clip` states -> the next ids [batch] INT64.

    The caches of `batch` rows are in it, on the device, as a server would keep them; none is written.
    """

    def __init__(self, sizes: Sizes, batch: int, past: int = 64, clip: int = 1500) -> None:
        super().__init__()
        self.words = nn.Embedding(sizes.classes, sizes.width)
        self.places = nn.Embedding(448, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes, has_key_bias=False) for _ in range(sizes.layers))
        self.cross = nn.ModuleList(Attention(sizes, has_key_bias=False) for _ in range(sizes.layers))
        self.cross_norms = nn.ModuleList(nn.LayerNorm(sizes.width) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.past = past
        each = sizes.width // sizes.heads
        self.register_buffer("own", torch.randn(sizes.layers, 2, batch, sizes.heads, past, each))
        self.register_buffer("clip", torch.randn(sizes.layers, 2, batch, sizes.heads, clip, each))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places.weight[self.past]
        for number, block in enumerate(self.blocks):
            x = x + self._own(block.attention, block.norm1(x), number)
            seen = self.cross_norms[number](x)
            x = x + self.cross[number].attend(seen, self.clip[number, 0], self.clip[number, 1])
            x = x + block.down(F.gelu(block.up(block.norm2(x))))
        return F.linear(self.norm(x[:, -1]), self.words.weight).float().argmax(1)

    def _own(self, attention: Any, x: torch.Tensor, number: int) -> torch.Tensor:
        keys = torch.cat([self.own[number, 0], attention.split(attention.key(x))], 2)
        values = torch.cat([self.own[number, 1], attention.split(attention.value(x))], 2)
        seen: torch.Tensor = attention.attend(x, keys, values)
        return seen


# BERT's names -> ours, in a layer and around the layers.
_LAYER = {
    "attention.self.query": "attention.query", "attention.self.key": "attention.key",
    "attention.self.value": "attention.value", "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "norm1", "intermediate.dense": "up", "output.dense": "down",
    "output.LayerNorm": "norm2",
}  # fmt: skip
_AROUND = {
    "embeddings.word_embeddings": "words", "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "types", "embeddings.LayerNorm": "norm",
}  # fmt: skip


def from_bert(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint of BERT's kind as a state of TextEncoder; the pooler, which nobody asks, is left out."""
    state = {}
    for name, tensor in weights.items():
        stem, _, kind = name.removeprefix("bert.").rpartition(".")
        if stem in _AROUND:
            state[f"{_AROUND[stem]}.{kind}"] = tensor.float()
        elif stem.startswith("encoder.layer."):
            number, _, rest = stem.removeprefix("encoder.layer.").partition(".")
            state[f"blocks.{number}.{_LAYER[rest]}.{kind}"] = tensor.float()
    return state
