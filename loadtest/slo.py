"""Whether a run has met its goal, and whether it may say so. Pure.

A share that was measured is known within an interval only (Wilson, 1927; two-sided, 95%). A goal on a share is met when
the whole interval is on its good side, missed when it is on the bad one, and open otherwise. A run whose generator was
the bottleneck says nothing, whatever it measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from tutti.loadtest.scenario import Goal

Z95 = 1.959964
# A request that is sent later than this after it was due was not sent when it was due.
LATE_S = 0.010
MOST_LATE = 0.01
MOST_CPU = 0.95


class Verdict(IntEnum):
    """The values are exit statuses."""

    PASS = 0
    FAIL = 1
    INVALID = 2
    INCONCLUSIVE = 3


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was decided, and each reason, the worst first."""

    verdict: Verdict
    reasons: Sequence[str]


@dataclass(frozen=True, slots=True)
class Seen:
    """Of the requests that count: how many, errors, those without one that were slower than the goal.

    `late` were sent too late by the generator, `unsent` not at all; `cpu` is the most that a generator was busy, as a
    share of a core, over half a second.
    """

    requests: int
    errors: int
    slow: int
    seconds: float
    late: int = 0
    unsent: int = 0
    cpu: float = 0.0
    # Of the late: those that waited for one of the client's connections.
    waited: int = 0

    @property
    def good(self) -> int:
        return self.requests - self.errors - self.slow


def interval(count: int, of: int) -> tuple[float, float]:
    """The share `count` / `of` with 95% confidence; everything when there is nothing to go by."""
    if not of:
        return 0.0, 1.0
    share, z2 = count / of, Z95**2
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = Z95 / (1 + z2 / of) * (share * (1 - share) / of + z2 / (4 * of * of)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def judge(seen: Seen, goal: Goal, stopped: str = "") -> Judgement:
    """PASS only where everything that was asked for is certain, and the generator kept up.

    `stopped` says why a run was ended before its end: it says nothing then.
    """
    invalid = [stopped] if stopped else _invalid(seen)
    if invalid:
        return Judgement(Verdict.INVALID, invalid)
    found = [_share("errors", seen.errors, seen.requests, goal.error_rate)]
    if goal.p99_ms is not None:
        answered = seen.requests - seen.errors
        found.append(_share(f"answers slower than {goal.p99_ms:g} ms", seen.slow, answered, 0.01))
    if goal.min_goodput:
        rate = seen.good / seen.seconds if seen.seconds else 0.0
        is_met = rate >= goal.min_goodput
        what = f"goodput {rate:,.1f} /s, wanted at least {goal.min_goodput:,.1f}"
        found.append((Verdict.PASS if is_met else Verdict.FAIL, what))
    order = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS)
    worst = next(one for one in order if any(verdict == one for verdict, _ in found))
    return Judgement(worst, [what for _, what in sorted(found, key=lambda item: order.index(item[0]))])


def _share(name: str, count: int, of: int, most: float) -> tuple[Verdict, str]:
    low, high = interval(count, of)
    what = f"{name}: {count:,} of {of:,} ({low:.3%} to {high:.3%}), at most {most:.3%} wanted"
    if high <= most or (most == 0 and not count and of):
        return Verdict.PASS, what
    return (Verdict.FAIL if low > most else Verdict.INCONCLUSIVE), what


def _invalid(seen: Seen) -> list[str]:
    found = []
    if not seen.requests:
        found.append("no request counts")
    if seen.unsent:
        found.append(f"the generator did not send {seen.unsent:,} requests")
    if seen.late > MOST_LATE * max(1, seen.requests):
        what = f"{seen.late:,} of {seen.requests:,} requests were sent over {LATE_S * 1e3:.0f} ms after they were due"
        why = f"{seen.waited:,} waited for a connection (target.connections)" if seen.waited else "it had no time"
        found.append(f"{what}: the generator was the bottleneck: {why}")
    if seen.cpu > MOST_CPU and seen.late:
        found.append(f"the generator was busy for {seen.cpu:.0%} of a core, and late")
    return found
