"""The tokenizer of a text model: the checkpoint's own, looked into, and published as a python step."""

from pathlib import Path
from typing import Any

from tutti.export import checkpoint, layout, text_trials
from tutti.export.errors import ExportError
from tutti.export.graphs import Check
from tutti.export.sentences import Recipe
from tutti.export.text_encoder import MAX_BATCH_SIZE, Encoder
from tutti.repository.model_config import TensorSpec

# A vocabulary may be filled up to a round size; more rows than that belong to another tokenizer.
_SPARE_ROWS = 512


def tokenizer_of(recipe: Recipe) -> Any:
    """The checkpoint's own; None for random weights. Raises ExportError for one that is not in a tokenizer.json."""
    from transformers import AutoTokenizer

    source = recipe.source
    if source.location is None:
        return None
    with checkpoint.told(source):
        tokenizer = AutoTokenizer.from_pretrained(source.location)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ExportError(f"'{source.given}' has a tokenizer without a tokenizer.json: expected a fast one")
    if tokenizer.pad_token_id is None:
        raise ExportError(
            f"'{source.given}' has a tokenizer without a padding token, so that texts of several lengths cannot share "
            "a batch: add pad_token to its tokenizer_config.json"
        )
    if recipe.is_lowered:
        _lower(tokenizer.backend_tokenizer)
    return tokenizer


def _lower(tokenizer: Any) -> None:
    """Texts in small letters before all else, as sentence-transformers does for do_lower_case."""
    from tokenizers import normalizers

    before = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])


def inputs_of(encoder: Encoder) -> tuple[str, ...]:
    """With token_type_ids where the checkpoint's tokenizer makes some that are not 0: those are what is left out."""
    plain = ("input_ids", "attention_mask")
    tokenizer = encoder.tokenizer
    if tokenizer is None or "token_type_ids" not in tokenizer.model_input_names:
        return plain
    pair = ("a", "b") if encoder.kind == "ranking" else ("a",)
    return (*plain, "token_type_ids") if any(tokenizer(*pair)["token_type_ids"]) else plain


def check_tokenizer(encoder: Encoder, config: Any) -> Check:
    """Whether the tokenizer is the model's: its ids are rows of the embedding, special ones are those configured."""
    subject, tokenizer, rows = "tokenizer", encoder.tokenizer, encoder.vocabulary
    highest = max(tokenizer.get_vocab().values(), default=-1) + 1
    if highest > rows:
        return Check(subject, False, f"it has ids up to {highest - 1}, the model has {rows} rows of embeddings")
    if rows - highest > max(_SPARE_ROWS, rows // 50):
        return Check(
            subject, False, f"the model has {rows} rows of embeddings, the tokenizer {highest} ids: it is another's"
        )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        expected, got = getattr(config, name, None), getattr(tokenizer, name, None)
        if isinstance(expected, int) and got is not None and expected != got:
            return Check(
                subject, False, f"{name} is {expected} for the model, {got} for the tokenizer: it is another's"
            )
    return Check(subject, True, f"{highest} ids for {rows} rows of embeddings")


def check_step(encoder: Encoder, file: Path) -> Check:
    """Whether the file that the tokenizer step reads gives the ids that transformers gives."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(encoder.max_length, direction=encoder.tokenizer.truncation_side)
    texts = (*text_trials.SENTENCES, text_trials.SENTENCES[-1] * 100)  # one that is longer than any model takes
    for text in texts:
        expected = encoder.tokenizer(text, truncation=True, max_length=encoder.max_length)["input_ids"]
        got = tokenizer.encode(text).ids
        if list(expected) != got:
            return Check("tokenizer step", False, f"{text[:40]!r}: expected ids {expected[:8]}, got {got[:8]}")
    return Check("tokenizer step", True, f"the ids of transformers on {len(texts)} texts")


def tokenizer_step(encoder: Encoder, name: str, work: Path) -> layout.Entry:
    """NAME_tokenizer."""
    file = work / "tokenizer.json"
    encoder.tokenizer.backend_tokenizer.save(str(file))
    specs = [TensorSpec(tensor, "INT64", (-1,)) for tensor in encoder.inputs]
    specs += [TensorSpec("OFFSETS", "INT64", (-1, 2))] if encoder.kind == "tokens" else []
    files = {"model.py": layout.step_file("tokenizer"), "tokenizer.json": file}
    parameters = {"max_length": str(encoder.max_length), "pad_id": str(encoder.tokenizer.pad_token_id or 0)}
    parameters |= {"prompt": encoder.prompt} if encoder.prompt else {}
    parameters |= {"truncation_side": "left"} if encoder.tokenizer.truncation_side == "left" else {}
    return layout.Entry(f"{name}_tokenizer", "python", list(encoder.texts), specs, files, MAX_BATCH_SIZE, parameters)
