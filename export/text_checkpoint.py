"""What a checkpoint makes of texts, which its architecture says: embeddings, classes, ranks of pairs, labels of tokens.

An encoder's graph ends in what its sentence-transformers files ask for (by default the mean over the attention mask,
and length 1). What is not covered is refused.
"""

from dataclasses import replace
from typing import Any

import torch

from tutti.export import checkpoint, lengths, sentences
from tutti.export.errors import ExportError
from tutti.export.graphs import Check
from tutti.export.sentences import Recipe
from tutti.export.sources import Source
from tutti.export.text_encoder import Classifier, ContrastiveText, Encoder, SentenceEncoder, example_of
from tutti.export.text_tokenizer import inputs_of, tokenizer_of

# Of a text, where the checkpoint does not say.
_MOST_TOKENS = 512
# What tokenizers say that know no limit.
_NO_LENGTH = 1 << 20
# What the architecture's name says behind "For", and what is made of it.
_KINDS = {"SequenceClassification": "classification", "TokenClassification": "tokens"}
_PLAIN = ("", "MaskedLM", "PreTraining", "CausalLM")
_CONTRASTIVE = ("clip", "siglip", "siglip2")
_COVERED = "embeddings, classifiers, rerankers (pairs of texts) and labels of tokens"


def load(source: Source, task: str = "auto", prompt: str | None = None) -> Encoder:
    """A model from a hub id, a local folder, or a configuration, which has no tokenizer.

    `task` auto is what its architecture says. Raises ExportError for what is not covered, or not the checkpoint's.
    """
    recipe = sentences.read(source, prompt)
    config = checkpoint.configuration(recipe.source, "text")
    kind = _kind(config, source) if task == "auto" else {"token-classification": "tokens"}.get(task, task)
    if task == "auto" and recipe.is_told and kind != "embedding":
        kind = "embedding"
    if task == "auto" and recipe.is_cross_encoder:
        kind = "ranking"
    if recipe.prompt and kind != "embedding":
        raise ExportError("its prompt stands before texts to embed, and is not covered here: --prompt '' leaves it out")
    tokenizer = tokenizer_of(recipe)
    if config.model_type in _CONTRASTIVE or config.model_type.endswith("_text_model"):
        return _contrastive(source, config, tokenizer, kind)
    loaded = checkpoint.load(_family(config, kind), recipe.source, config)
    if kind == "embedding" and not checkpoint.architecture(config) and source.location and loaded.unread:
        raise ExportError(
            f"config.json does not say what '{source.given}' is, and its {checkpoint.named(loaded.unread)} are no "
            "encoder's: give --task embedding, classification, ranking or token-classification"
        )
    model = loaded.model
    labels = checkpoint.labels(model.config) if kind != "embedding" else ()
    module: torch.nn.Module
    if kind == "embedding":
        module = SentenceEncoder(model, recipe.pooling, recipe.stages).eval()
    else:
        module = Classifier(model, "softmax" if kind == "tokens" else _function(config, kind, recipe)).eval()
    places = lengths.places(model.config)
    limit = _limit(places, tokenizer, recipe.most)
    vocabulary = model.get_input_embeddings().num_embeddings
    encoder = Encoder(module, tokenizer, limit, vocabulary, places, labels, kind, prompt=recipe.prompt)
    encoder = replace(encoder, inputs=inputs_of(encoder))
    example = {name: tensor.clamp(max=1) for name, tensor in example_of(encoder).items()}
    hint = "--task embedding publishes the embeddings of its encoder" if kind != "embedding" else ""
    seen = checkpoint.check_weights(loaded, module, example, source, hint)
    return replace(encoder, checks=(seen, *_told(recipe, kind)))


def _kind(config: Any, source: Source) -> str:
    """What the checkpoint's architecture makes of texts. Raises ExportError for what is not covered."""
    name, task = checkpoint.architecture(config), checkpoint.task_of(config)
    if config.model_type in ("clip", "siglip", "siglip2"):
        return "embedding"
    if config.is_encoder_decoder and not name.endswith("EncoderModel") and config.model_type not in _WITH_ENCODERS:
        raise ExportError(
            f"'{source.given}' is a {name or config.model_type}, an encoder with a decoder: `tutti export text` covers "
            f"{_COVERED} of encoders alone, as BertForSequenceClassification"
        )
    if task not in (*_KINDS, *_PLAIN):
        raise ExportError(
            f"'{source.given}' is a {name}: `tutti export text` covers {_COVERED}; --task embedding publishes the "
            "embeddings of its encoder, without the head"
        )
    if task == "CausalLM" and checkpoint.read_json(source, "modules.json") is None:
        raise ExportError(
            f"'{source.given}' is a {name}, which writes texts: `tutti export text` covers {_COVERED}; serve it with "
            "a language model's engine"
        )
    kind = _KINDS.get(task, "embedding")
    return "ranking" if kind == "classification" and _is_of_pairs(config) else kind


# Of whose encoders transformers has a class of their own.
_WITH_ENCODERS = ("t5", "mt5", "umt5")


def _is_of_pairs(config: Any) -> bool:
    """Cross-encoders say so; a single score without a problem is a reranker's; entailment is between two texts."""
    if config.model_type == "bert" and checkpoint.architecture(config).endswith("NextSentencePrediction"):
        return True
    if getattr(config, "sentence_transformers", None) or getattr(config, "sbert_ce_default_activation_function", None):
        return True
    names = [str(name).lower() for name in config.id2label.values()]
    return "entailment" in names or (config.num_labels == 1 and config.problem_type is None)


def _function(config: Any, kind: str, recipe: Recipe) -> str:
    """As transformers' pipeline; of a reranker's single score, as the cross-encoder says."""
    told = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    told = str(recipe.activation or told or getattr(config, "sbert_ce_default_activation_function", None) or "")
    if kind == "ranking" and config.num_labels == 1 and told:
        last = told.rpartition(".")[2]
        if last not in ("Identity", "Sigmoid"):
            raise ExportError(f"config.json: the cross-encoder's activation: expected Identity or Sigmoid, got {told}")
        return "none" if last == "Identity" else "sigmoid"
    return checkpoint.function_of(config)


def _family(config: Any, kind: str) -> Any:
    import transformers

    if kind == "tokens":
        return transformers.AutoModelForTokenClassification
    if kind in ("classification", "ranking"):
        return transformers.AutoModelForSequenceClassification
    if config.model_type in _WITH_ENCODERS:
        return transformers.AutoModelForTextEncoding
    return transformers.AutoModel


def _limit(places: int | None, tokenizer: Any, most: int | None) -> int:
    """The most tokens of a text: the least of what the model, its tokenizer and sentence-transformers' files say."""
    told = [limit for limit in (places, most) if limit is not None]
    if tokenizer is not None and tokenizer.model_max_length < _NO_LENGTH:
        told.append(int(tokenizer.model_max_length))
    return min(told, default=_MOST_TOKENS)


def _told(recipe: Recipe, kind: str) -> list[Check]:
    """What a person may not expect: the prompt that is applied, and those that are not."""
    if kind != "embedding" or not recipe.prompts:
        return []
    others = ", ".join(f"'{name}'" for name, text in recipe.prompts.items() if text != recipe.prompt)
    prompted = f"{recipe.prompt!r} stands before each text" if recipe.prompt else "none is put before texts"
    return [Check("prompt", True, prompted + (f"; --prompt takes another of its own: {others}" if others else ""))]


def _contrastive(source: Source, config: Any, tokenizer: Any, kind: str) -> Encoder:
    """CLIP's and SigLIP's text side; its pictures' side is what `tutti export vision` makes."""
    import transformers

    if kind != "embedding":
        raise ExportError(f"'{source.given}' is a {checkpoint.architecture(config)}: only its embeddings are covered")
    if not config.model_type.startswith("clip"):
        raise ExportError(
            f"'{source.given}' is a {checkpoint.architecture(config)}: of texts CLIP's side is covered; its pictures' "
            "is with `tutti export vision`, where --labels compares them with texts"
        )
    family = transformers.CLIPTextModelWithProjection if config.model_type != "clip" else transformers.CLIPModel
    loaded = checkpoint.load(family, source, config)
    module = ContrastiveText(loaded.model).eval()
    text = getattr(config, "text_config", config)
    places = lengths.places(text)
    limit = _limit(places, tokenizer, None)
    encoder = Encoder(module, tokenizer, limit, int(text.vocab_size), places)
    example = example_of(encoder)
    example["input_ids"][:, -1] = int(text.eos_token_id)
    return replace(encoder, checks=(checkpoint.check_weights(loaded, module, example, source),))
