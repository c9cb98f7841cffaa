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
MOST_LATE = 0.01
MOST_CPU = 0.95
# Lengths to advise for a run that left the goal open, as multiples of its own: the first that would decide.
_TIMES = (1.25, 1.5, 2, 3, 5, 10, 20, 50)
_RELIEF = "raise --processes, send from another machine, or ask for a lower rate"
# A generator that used less than this of a core had time of its own, and did not get the processor.
_IDLE = 0.5
_ROOM = "others kept the processor from it: send from another machine, or when this one is quieter"


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
    """What was seen of the requests that count; `slow` had no error, but took longer than the goal.

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
    # How many of the late ones waited for one of the client's connections.
    waited: int = 0

    @property
    def good(self) -> int:
        return self.requests - self.errors - self.slow


def interval(count: float, of: float) -> tuple[float, float]:
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
    invalid = [stopped] if stopped else _invalid(seen, goal)
    if invalid:
        return Judgement(Verdict.INVALID, invalid)
    decided = [_share("errors", seen.errors, seen.requests, goal.error_rate, seen)]
    if goal.p99_ms is not None:
        answered = seen.requests - seen.errors
        decided.append(_share(f"answers slower than {goal.p99_ms:g} ms", seen.slow, answered, 0.01, seen))
    if goal.min_goodput:
        rate = seen.good / seen.seconds if seen.seconds else 0.0
        is_met = rate >= goal.min_goodput
        reason = f"goodput {rate:,.1f} /s, wanted at least {goal.min_goodput:,.1f}"
        decided.append((Verdict.PASS if is_met else Verdict.FAIL, reason))
    order = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS)
    worst = next(verdict for verdict in order if any(verdict == other for other, _ in decided))
    return Judgement(worst, [reason for _, reason in sorted(decided, key=lambda item: order.index(item[0]))])


def _share(name: str, count: int, of: int, most: float, seen: Seen) -> tuple[Verdict, str]:
    low, high = interval(count, of)
    reason = f"{name}: {count:,} of {of:,} ({low:.3%} to {high:.3%}), at most {most:.3%} wanted"
    if high <= most or (most == 0 and not count and of):
        return Verdict.PASS, reason
    if low > most:
        return Verdict.FAIL, reason
    return Verdict.INCONCLUSIVE, f"{reason}: {_longer(count, of, most, seen.seconds)}"


def _longer(count: int, of: int, most: float, seconds: float) -> str:
    """How many requests would decide, if the share stays as it is."""
    times = next((times for times in _TIMES if _is_decided(count * times, of * times, most)), None)
    if times is None or not of:
        return "it is at the limit, and a longer run may leave it open, too: ask for a little less, or a little more"
    return f"some {of * times:,.0f} requests would tell (--seconds {seconds * times:,.0f} at this rate)"


def _is_decided(count: float, of: float, most: float) -> bool:
    low, high = interval(count, of)
    return high <= most or low > most


def _invalid(seen: Seen, goal: Goal) -> list[str]:
    """Why the run says nothing, and what to do about it."""
    reasons = []
    if not seen.requests:
        reasons.append("no request counts: the warm-up took all of it, or nothing was due (raise --seconds or --rate)")
    if seen.unsent:
        reasons.append(f"the generator did not send {seen.unsent:,} requests: {_RELIEF}")
    if seen.late > MOST_LATE * max(1, seen.requests):
        late = (
            f"{seen.late:,} of {seen.requests:,} requests were sent over {goal.late_s * 1e3:.0f} ms after they were due"
        )
        cause = (
            f"{seen.waited:,} waited for a connection: raise target.connections"
            if seen.waited
            else f"it had no time: {_RELIEF if seen.cpu >= _IDLE else _ROOM}"
        )
        reasons.append(f"{late}, and the generator was the bottleneck: {cause}")
    if seen.cpu > MOST_CPU and seen.late:
        reasons.append(f"the generator was busy for {seen.cpu:.0%} of a core, and late: {_RELIEF}")
    return reasons
