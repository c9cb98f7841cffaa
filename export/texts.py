"""Texts for models that take texts: how their words are found in a graph, and texts that tell whether they are.

A graph's expressions know ASCII only, unless they say otherwise. Knows nothing of files or graphs.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

# Python's \w in the words of RE2, which the tokenizer of ONNX Runtime takes.
_LETTER = r"[\p{L}\p{N}_]"
# Patterns whose matches are as long as they can be, so that the word boundaries around them say nothing.
_WORDS = re.compile(r"(?:\(\?u\))?(?:\\b)?((?:\\w)*\\w(?:\+|\{\d+,\}))(?:\\b)?")
# What people write: one letter, digits, signs, other alphabets, other cases, nothing.
_ODD = (
    "", " ", "...", "a", "I", "7", "click a family", "1,000.5 x 2nd", "don't", "A-B c_d e.f", "UPPER Case mixedCase",
    "é à Ärger über Öl STRASSE straße ÎLE", "日本語 テスト", "привет МИР", "e\u0301tat", "tab\tnew\nline", "😀 ok 👍",
    "me@example.com http://example.com/a?b=1", "#tag & \"quoted\" (so) [it] *is*", "x" * 300,
)  # fmt: skip
_SMALL = ("a", "i", "I", "x", "7", "42", "é", "the", "and", "of", "is", "not", "you", "ein", "und", "zzz", "£5")
_JOINTS = (" ", " ", " ", "  ", ", ", ". ", "-", "'", "/", "\n")


def expression(vectorizer: Any) -> str | None:
    """What finds the words of a vectorizer in a graph; None where its own pattern does."""
    if getattr(vectorizer, "analyzer", None) != "word":
        return None
    match = _WORDS.fullmatch(getattr(vectorizer, "token_pattern", None) or "")
    return match[1].replace(r"\w", _LETTER) if match else None


def drawn(words: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """Texts to ask with: odd ones, and those of the model's own words with others between them, in several cases."""
    known = sorted({part for word in words for part in word.split()}) or ["some", "text"]
    return [*_ODD[:count], *(_mixed(known, rng) for _ in range(count - len(_ODD)))]


def _mixed(known: Sequence[str], rng: np.random.Generator) -> str:
    text = ""
    for _ in range(int(rng.integers(1, 10))):
        word = str(rng.choice(known if rng.random() < 0.7 else _SMALL))
        case = rng.random()
        word = word.upper() if case < 0.1 else word.capitalize() if case < 0.2 else word
        text += (str(rng.choice(_JOINTS)) if text else "") + word
    return text
