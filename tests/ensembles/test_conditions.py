"""The language of conditions: what holds for which rows, and what is refused, saying where."""

import numpy as np
import pytest

from tutti.ensembles.conditions import Column, ConditionError, parse

SPECS = {
    "score": ("FP32", (1,)), "labels": ("FP32", (4,)), "text": ("BYTES", (1,)), "flag": ("BOOL", (1,)),
    "absent": ("FP32", (1,)), "partly": ("INT64", ()), "a-b c": ("FP32", (1,)), "grid": ("FP32", (2, 2)),
    "ragged": ("FP32", (-1,)),
}  # fmt: skip


def column(values: object, valid: object = None) -> Column:
    return Column(np.array(values), None if valid is None else np.array(valid))


COLUMNS = {
    "score": column(np.array([[0.1], [0.5], [np.nan]], np.float32)),
    "labels": column([[1, 2, 3, 4], [4, 3, 2, 9.0], [0, 0, 0, 0]]),
    "text": Column(np.array([[b"a"], [b"b"], [b""]], dtype=object)),
    "flag": column([[True], [False], [True]]),
    "absent": None,
    "partly": column([7, 8, 9], [True, False, True]),
    "a-b c": column([[1.0], [2.0], [3.0]]),
    "grid": column(np.arange(12).reshape(3, 2, 2)),
    "ragged": column(np.zeros((3, 0))),
}
T, F = True, False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("score > 0.2", [F, T, F]),
        ("not score > 0.2", [T, F, T]),
        ("score <= 0.1000001 or score >= .5", [T, T, F]),
        ("score != score", [F, F, T]),
        ("max(labels) > 4 and score < 1e0", [F, T, F]),
        ("argmax(labels) == 3", [T, T, F]),
        ("mean(labels) - 1 < 1.5", [F, F, T]),
        ("sum(labels) * 2 >= 20 and min(labels) == 1", [T, F, F]),
        ("labels[1] + 1 == 3", [T, F, F]),
        ("grid[3] / 3 == 1", [T, F, F]),
        ("-score < -0.3", [F, T, F]),
        ("count(labels) == 4", [T, T, T]),
        ("text == 'a' or text == ''", [T, F, T]),
        ("text != 'a'", [F, T, T]),
        ("flag and not (flag == false)", [T, F, T]),
        ("given(absent)", [F, F, F]),
        ("not given(absent) or absent > 1", [T, T, T]),
        ("absent > 1", [F, F, F]),
        ("not absent > 1", [T, T, T]),
        ("given(partly)", [T, F, T]),
        ("partly >= 8", [F, F, T]),
        ("partly < 100", [T, F, T]),
        ("count(ragged) == 0", [T, T, T]),
        ("max(ragged) > 0 or sum(ragged) == 0", [T, T, T]),
        ("ragged[2] > 0", [F, F, F]),
        ('"a-b c" > 1', [F, T, T]),
        ('max("a-b c") == 3', [F, F, T]),
        ("score / 0 > 1", [T, T, F]),
        ("true", [T, T, T]),
        ("1 > 2 or 2 > 1 and 1 > 2", [F, F, F]),
    ],
)
def test_what_holds(text: str, expected: list[bool]) -> None:
    assert parse(text, SPECS).holds(COLUMNS, 3).tolist() == expected


def test_it_says_what_it_reads() -> None:
    assert parse("max(labels) > score and given(text) and score > 0", SPECS).names == ("labels", "score", "text")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected a value, got the end"),
        ("score", "expected a comparison, got a number"),
        ("score >", "expected a value, got the end at character 8"),
        ("score = 1", "unexpected '='"),
        ("score > 1)", r"expected the end, got '\)' at character 10"),
        ("(score > 1", r"expected '\)'"),
        ("nope > 1", "no tensor 'nope', there are a-b c, absent"),
        ("labels > 1", r"'labels' has dims \[4\]: expected one element"),
        ("ragged > 1", "expected one element"),
        ("labels[4] > 1", "has 4 elements"),
        ("labels[x] > 1", "expected a whole number"),
        ("text > 'a'", "compares numbers, got a text"),
        ("score > 'a'", "compares a number with a text"),
        ("max(text) > 1", "expected numbers, the tensor has text"),
        ("score > 1 and 2", "'and' joins comparisons, got a number"),
        ("not score", "'not' takes a comparison"),
        ("score + flag > 1", r"'\+' takes numbers, got a truth"),
        ("__import__('os').system('true')", "no tensor '__import__'"),
        ("score.real > 1", r"no tensor 'score\.real'"),
        ("max(max) > 1", "expected a tensor's name"),
        ("score > and", "expected a value after 'and'"),
        ("text == 'unterminated", "unexpected"),
        ("not " * 30 + "flag", "nested more than 20 deep"),
        ("(" * 30 + "flag" + ")" * 30, "nested more than 20 deep"),
        ("- " * 30 + "score > 1", "nested more than 20 deep"),
        ("score > 1 or " * 100 + "flag", "at most 1000 characters"),
    ],
)
def test_what_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConditionError, match=why):
        parse(text, SPECS)
