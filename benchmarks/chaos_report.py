"""What faults on a cluster came to: what was lost or wrong, and how long the cluster took to get over each.

Knows outcomes of requests and times of faults, and nothing of how they were made.
"""

from collections import Counter
from dataclasses import dataclass

from benchmarks.open_loop import Outcome


@dataclass(slots=True)
class Fault:
    """What was done, and when, in seconds since the start."""

    kind: str
    at_s: float
    note: str = ""


def recovery_s(fault: Fault, following_s: float, outcomes: list[Outcome], normal_s: float) -> float:
    """From a fault to the end of the last second, before the next fault, in which much was slow.

    Much is more than one request in twenty; slow is four times the 99th percentile without faults.
    """
    due: Counter[int] = Counter()
    slow: Counter[int] = Counter()
    for one in outcomes:
        if fault.at_s <= one.due_s < following_s and one.kind != "poison":
            second = int(one.due_s - fault.at_s)
            due[second] += 1
            slow[second] += one.done_s - one.due_s > 4 * normal_s
    return max((second + 1.0 for second in due if slow[second] > 0.05 * due[second]), default=0.0)


def report(
    outcomes: list[Outcome], retries: int, faults: list[Fault], rate: float, share: float, seconds: float
) -> tuple[list[str], bool]:
    """Lines of the report, and whether all went well."""
    kinds = Counter("wrong" if one.kind == "ok" and one.version != 1 else one.kind for one in outcomes)
    quiet = sorted(one.done_s - one.due_s for one in outcomes if one.due_s < faults[0].at_s and one.kind == "ok")
    normal_s = quiet[int(0.99 * (len(quiet) - 1))]
    all_s = sorted(one.done_s - one.due_s for one in outcomes if one.kind == "ok")
    lines = [
        f"{len(outcomes):,} requests in {seconds:.0f} s at {rate:.0f} /s, {share:.0%} of what was done without faults: "
        f"{kinds['ok']:,} right, {kinds['wrong']} wrong, {kinds['failed']} failed "
        f"({kinds['failed'] / len(outcomes):.4%}), {kinds['poison']} poison; asked again by the client: {retries}",
        f"p99 {normal_s * 1e3:.0f} ms before the first fault, {all_s[int(0.99 * len(all_s))] * 1e3:.0f} ms over all; "
        f"answered by the cpu pool: {sum(one.pool == 'cpu' for one in outcomes) / len(outcomes):.1%}",
        "",
        "| fault | times | recovery s, median and most |",
        "|---|---|---|",
    ]
    ends = [fault.at_s for fault in faults[1:]] + [seconds]
    by_kind: dict[str, list[float]] = {}
    for fault, end_s in zip(faults, ends, strict=True):
        by_kind.setdefault(fault.kind, []).append(recovery_s(fault, end_s, outcomes, normal_s))
    for kind, took in sorted(by_kind.items()):
        lines.append(f"| {kind} | {len(took)} | {sorted(took)[len(took) // 2]:.1f}, {max(took):.1f} |")
    lines += [f"failed: {one.what}" for one in outcomes if one.kind == "failed"][:20]
    poisons = sum(fault.kind == "poison request" for fault in faults)
    is_well = not kinds["wrong"] and kinds["failed"] <= 0.001 * len(outcomes) and kinds["poison"] == poisons
    return lines, is_well
