"""What a served text model is asked before it is published, and what the checkpoint's own libraries answer to it.

transformers' pipelines and, where it is installed and the checkpoint has its files, sentence-transformers.
"""

import copy
import importlib.util
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tutti.export import checkpoint, lengths
from tutti.export.graphs import Arrays, Trial
from tutti.export.sources import Source

if TYPE_CHECKING:
    from tutti.export.text_encoder import Encoder

Original = Callable[[str, str], Arrays]
"""A text, and the second one of a pair -> outputs of the ensemble."""
SENTENCES = (
    "Act now and win a free phone.", "The meeting is at ten.", "x", "¿Dónde está la biblioteca?",
    "A long sentence says little, and goes on and on about it, until everybody who has begun to read it has left. " * 3,
)  # fmt: skip


def trials(encoder: "Encoder", source: Source) -> list[Trial]:
    """A short text, usual ones, and one that is longer than the model takes."""
    usual, second = SENTENCES[4], SENTENCES[0]
    tokens = max(1, len(encoder.tokenizer(usual)["input_ids"]))
    texts = {"a short text": SENTENCES[1], "a usual one": usual, "one that is not English": SENTENCES[3]}
    if encoder.max_length <= lengths.LONGEST_PROVEN:
        texts["one longer than it takes"] = usual * (encoder.max_length // tokens + 2)
    original = _original(encoder, source)
    read = _entities_of if encoder.kind == "tokens" else None

    def trial(subject: str, text: str) -> Trial:
        inputs = dict(zip((spec.name for spec in encoder.texts), (text.encode(), second.encode()), strict=False))
        return Trial(subject, inputs, lambda: original(text, second), read)

    return [trial(subject, text) for subject, text in texts.items()]


def _original(encoder: "Encoder", source: Source) -> Original:
    if encoder.kind == "embedding":
        return _embedding(encoder, source)
    tokenizer = copy.copy(encoder.tokenizer)
    tokenizer.model_max_length = encoder.max_length
    return _entities(encoder, tokenizer) if encoder.kind == "tokens" else _scores(encoder, tokenizer)


def _entities(encoder: "Encoder", tokenizer: Any) -> Original:
    import transformers

    model: Any = encoder.module.model
    tag = transformers.pipeline("token-classification", model=model, tokenizer=tokenizer, device="cpu")

    def answer(text: str, _: str) -> Arrays:
        return _spans(tag(text, aggregation_strategy="simple"))

    return answer


def _entities_of(got: Mapping[str, Any]) -> Arrays:
    """Of the ensemble's JSON what is compared."""
    return _spans(json.loads(got["ENTITIES"][0, 0]))


def _spans(entities: Any) -> Arrays:
    told = [f"{entity['entity_group']} {int(entity['start'])} {int(entity['end'])}" for entity in entities]
    return {"ENTITIES": np.array(told, object), "scores": np.array([float(entity["score"]) for entity in entities])}


def _scores(encoder: "Encoder", tokenizer: Any) -> Original:
    import transformers

    model: Any = encoder.module.model
    function = str(encoder.module.function)
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    limits = {"truncation": True, "max_length": encoder.max_length}

    def answer(text: str, second: str) -> Arrays:
        asked = {"text": text} | ({"text_pair": second} if encoder.kind == "ranking" else {})
        labels = classify(asked, top_k=None, function_to_apply=function, **limits)
        scores = {label["label"]: label["score"] for label in labels}
        row = np.array([[scores[label] for label in encoder.labels]], dtype=np.float32)
        return {"SCORES": row, "LABEL": np.array([[encoder.labels[int(row.argmax())].encode()]], dtype=object)}

    return answer


def _embedding(encoder: "Encoder", source: Source) -> Original:
    """By sentence-transformers, or else one text at a time without padding."""
    if checkpoint.file(source, "modules.json") and importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        with checkpoint.told(source):
            theirs = SentenceTransformer(str(source.location), device="cpu")
        return lambda text, _: {"EMBEDDING": np.asarray(theirs.encode([text], prompt=encoder.prompt), np.float32)}

    def answer(text: str, _: str) -> Arrays:
        tensors = {name: torch.from_numpy(array) for name, array in encoder.tokens([text]).items()}
        with torch.inference_mode():
            return {"EMBEDDING": encoder.module(**tensors).numpy()}

    return answer
