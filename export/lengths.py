"""How many tokens a model takes: the rows of its table of places, said by its checkpoint, proven by the saved graph.

What a graph makes of an input's length is arithmetic, and is not guessed at. `places`, which alone knows families, says
what a checkpoint claims; the graph has to answer as many tokens, and to fail on one more: ONNX Runtime looks at each
index on the processor. A graph that answers more has no table that ends there, and so gets no limit.
"""

from dataclasses import dataclass
from typing import Any

from tutti.export import onnx
from tutti.export.graphs import Claim

# Places are counted from behind the padding's index: rows up to it are no token's.
_BEHIND_PADDING = (
    "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
# As in those, with an index that is no matter of the configuration.
_MPNET_PADDING = 1
# Attention over more takes gigabytes.
LONGEST_PROVEN = 2048


def places(config: Any) -> int | None:
    """The most tokens that a checkpoint's configuration has places for; None where it does not say.

    Checkpoints that call it `n_positions` have it under the usual name, too.
    """
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    if config.model_type == "mpnet":
        return most - _MPNET_PADDING - 1
    if config.model_type in _BEHIND_PADDING:
        return most - int(config.pad_token_id or 0) - 1
    return most


@dataclass(frozen=True, slots=True)
class Found:
    """The `most` items that a graph takes, None for any number; `note` and `fault` are "" or what is to be told."""

    most: int | None = None
    note: str = ""
    fault: str = ""


def prove(loaded: Any, claim: Claim | None) -> Found:
    """What a session's graph makes of what is claimed of it."""
    if claim is None:
        return Found()
    if claim.most > LONGEST_PROVEN:
        return Found(claim.most, f"lengths: at most {claim.most}, by its configuration: not executed")
    why = onnx.failure(loaded, claim.case(claim.most))
    if why:
        return Found(fault=f"it has places for {claim.most} items, by its configuration, and fails on as many: {why}")
    if not onnx.failure(loaded, claim.case(claim.most + 1)):
        return Found(note=f"lengths: any, it answers more than the {claim.most} items of its configuration")
    return Found(claim.most, f"lengths: at most {claim.most}, it fails on more")
