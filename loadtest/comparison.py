"""Whether one server, or one run, takes longer than another: medians of parts of the time, and their difference."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutti.loadtest import search
from tutti.loadtest.advice import said
from tutti.loadtest.errors import RunError
from tutti.loadtest.runner import Result, medians_by_address
from tutti.loadtest.scenario import Scenario
from tutti.loadtest.slo import Verdict

# How many parts a finished run is cut into; each part has a median.
_PARTS = 10


@dataclass(slots=True)
class Comparison:
    """What came of asking two servers in turns; INVALID until something has."""

    scenario: Scenario | None
    seconds: float
    rounds: int
    verdict: Verdict = Verdict.INVALID
    reasons: list[str] = field(default_factory=list)
    # Of A and of B: a median of each round in ms.
    medians: list[list[float]] = field(default_factory=list)
    difference: search.Difference | None = None
    result: Result | None = None
    # What a median is of.
    unit: str = "round"

    def measure(self, result: Result) -> None:
        """Decide by a run against both. Raises RunError when a server has answered nothing in a round."""
        assert self.scenario is not None
        self.result = result
        if result.judgement.verdict is Verdict.INVALID:
            self.reasons = list(result.judgement.reasons)
            return
        medians = medians_by_address(result.raw, 2, self.scenario.warmup_s, self.seconds, self.rounds)
        for number, pair in enumerate(zip(*medians, strict=True)):
            _check_round(number, pair, self.scenario.target.urls, result)
        self.decide(medians, search.difference(*medians))

    def decide(self, medians: list[list[float]], difference: search.Difference) -> None:
        """By medians of each, and what they come to."""
        self.medians, self.difference = medians, difference
        interval = f"({difference.low:.3f} to {difference.high:.3f}, 98%)"
        self.reasons = [
            f"{_decision(difference)}: B takes {difference.ratio:.3f} times as long at the median {interval}"
        ]
        self.verdict = Verdict.FAIL if difference.is_different and difference.ratio > 1 else Verdict.PASS

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "verdict": self.verdict.name,
            "reasons": self.reasons,
            "medians_ms": dict(zip("ab", self.medians, strict=False)),
        }


def of_runs(a: Path, b: Path) -> Comparison:
    """Two runs that have left their requests with --output. Raises RunError for a folder that has none."""
    comparison = Comparison(None, 0.0, _PARTS, unit="part")
    medians = [_medians(folder) for folder in (a, b)]
    comparison.decide(medians, search.difference_of_runs(*medians))
    comparison.reasons.append(
        "the runs were at different times, and what else the machine did then is in it: compare HOST:PORT HOST:PORT "
        "asks two servers in turns"
    )
    return comparison


def _medians(folder: Path) -> list[float]:
    """Of each part of a run's time that counts, in ms."""
    raw = sorted(folder.glob("requests.*.parquet"))
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        seconds = sum(stage["seconds"] for stage in report["stages"])
        warmup_s = report["scenario"]["warmup_s"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder}: expected what `run SCENARIO --output {folder}` leaves ({_why(error)})") from None
    if not raw:
        raise RunError(f"{folder}: has report.json, and no requests.*.parquet beside it, which are compared")
    (medians,) = medians_by_address(raw, 1, warmup_s, seconds / _PARTS, _PARTS)
    known = [median for median in medians if median == median]
    if len(known) < 3:
        raise RunError(f"{folder}: too few parts of the run have an answer, {len(known)} of {_PARTS}")
    return known


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"report.json: {error.strerror}"
    return f"report.json: {type(error).__name__}: {error}"


def _decision(difference: search.Difference) -> str:
    """What was shown, and no more: a wide interval hides differences within it."""
    if difference.is_different:
        return "different"
    return f"no difference shown, between {difference.low - 1:+.1%} and {difference.high - 1:+.1%}"


def _check_round(number: int, pair: Sequence[float], urls: Sequence[str], result: Result) -> None:
    for name, url, median in zip("AB", urls, pair, strict=True):
        if median != median:
            errors = result.errors.most_common(2)
            why = "; ".join(f"{text}: {said(result.reasons.get(text, ''))}" for text, _ in errors)
            raise RunError(f"round {number + 1}: {name} ({url}) has answered nothing: {why or 'raise --seconds'}")
