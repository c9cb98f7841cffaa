"""The highest rate that meets a goal, and whether two servers differ. Pure: decides from what runs saw."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tutti.loadtest.slo import Verdict

Probe = Callable[[float, float], Verdict]
"""(rate, how many times as long as usual) -> what came of a run at that rate."""

# A probe has at least this many requests: enough to be certain of a share of 1%.
PROBE_REQUESTS = 600
# A probe that stays OPEN is run again for this many times as long, before it counts as missed.
_LONGER = 3.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """The highest rate that has met the goal, the lowest that has not, and every probe."""

    low: float
    high: float
    probes: Sequence[tuple[float, Verdict]]

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2 if math.isfinite(self.high) else self.low


def saturate(probe: Probe, start: float, within: float = 0.03, most: float = 1e6) -> Bounds:
    """Double until the goal is missed, then halve what lies between until it is `within` of itself.

    An INCONCLUSIVE probe is run again, for longer, and then counts as missed: the goal was not shown to be met. An
    INVALID one ends the search at what is known: the generator cannot tell about higher rates.
    """
    low, high = 0.0, math.inf
    probes: list[tuple[float, Verdict]] = []

    def ask(rate: float) -> Verdict:
        verdict = probe(rate, 1.0)
        probes.append((rate, verdict))
        if verdict is Verdict.INCONCLUSIVE:
            verdict = probe(rate, _LONGER)
            probes.append((rate, verdict))
        return verdict

    rate = start
    while rate <= most and not (math.isfinite(high) and low and high - low <= within * high):
        verdict = ask(rate)
        if verdict is Verdict.INVALID:
            break
        if verdict is Verdict.PASS:
            low = rate
        else:
            high = rate
        if math.isfinite(high):
            rate = (low + high) / 2
            if high < 1e-3 * start:
                break
        else:
            rate = 2 * rate
    return Bounds(low, high, probes)


def probes_left(low: float, high: float, within: float) -> int | None:
    """How many halvings remain; None while the rate is still doubled, or has never met the goal."""
    if not low or not math.isfinite(high):
        return None
    return max(0, math.ceil(math.log2((high - low) / (within * high)))) if high > low else 0


@dataclass(frozen=True, slots=True)
class Difference:
    """How much longer B takes than A, as a ratio with its interval; each round's ratios."""

    ratio: float
    low: float
    high: float
    rounds: Sequence[float]

    @property
    def is_different(self) -> bool:
        return not self.low <= 1.0 <= self.high


# Student's t for a two-sided interval of 98%, by degrees of freedom; of others the next fewer.
_T98 = {
    1: 31.82, 2: 6.965, 3: 4.541, 4: 3.747, 5: 3.365, 6: 3.143, 7: 2.998, 8: 2.896, 9: 2.821, 10: 2.764, 11: 2.718,
    12: 2.681, 13: 2.650, 14: 2.624, 15: 2.602, 20: 2.528, 30: 2.457,
}  # fmt: skip


def difference(a_ms: Sequence[float], b_ms: Sequence[float]) -> Difference:
    """From a figure of each of two servers in each round, asked in turns: a paired t-test on the logarithms."""
    logs = [math.log(b / a) for a, b in zip(a_ms, b_ms, strict=True)]
    mean, variance = _moments(logs)
    return _interval(mean, variance / len(logs), len(logs) - 1, [math.exp(ratio) for ratio in logs])


def difference_of_runs(a_ms: Sequence[float], b_ms: Sequence[float]) -> Difference:
    """From figures of parts of two runs, which belong to no pairs: Welch's t-test on the logarithms (1947)."""
    (a, of_a), (b, of_b) = (_moments([math.log(ms) for ms in side]) for side in (a_ms, b_ms))
    shares = of_a / len(a_ms), of_b / len(b_ms)
    squares = shares[0] ** 2 / (len(a_ms) - 1) + shares[1] ** 2 / (len(b_ms) - 1)
    freedom = int(sum(shares) ** 2 / squares) if squares else len(a_ms) + len(b_ms) - 2
    return _interval(b - a, sum(shares), freedom, [])


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """(mean, variance as of a sample; infinite for one value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _interval(mean: float, variance: float, freedom: int, rounds: Sequence[float]) -> Difference:
    """Of a mean of logarithms whose variance is known to so many degrees of freedom."""
    if not math.isfinite(variance):
        return Difference(math.exp(mean), 0.0, math.inf, rounds)
    t = next(value for known, value in sorted(_T98.items(), reverse=True) if known <= freedom)
    half = t * math.sqrt(variance)
    return Difference(math.exp(mean), math.exp(mean - half), math.exp(mean + half), rounds)
