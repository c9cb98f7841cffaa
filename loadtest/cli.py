"""`tutti loadtest run|saturate|compare|replay`. Exit: 0 goal met, 1 not met, 2 the run says nothing, 3 it is open."""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest import report, runner, scenario, search
from loadtest.runner import Result, RunError
from loadtest.scenario import Scenario, ScenarioError, Stage
from loadtest.slo import Verdict

# Of a probe, at least.
PROBE_REQUESTS = 600


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    locust: list[str] = []
    if "--" in given:
        locust = given[given.index("--") + 1 :]
        given = given[: given.index("--")]
    options = make_parser().parse_args(given)
    try:
        commands: dict[str, Any] = {"run": _run, "saturate": _saturate, "compare": _compare, "replay": _replay}
        return int(commands[options.command](options, locust))
    except (ScenarioError, RunError) as error:
        print(f"tutti loadtest: {error}", file=sys.stderr)
        return int(Verdict.INVALID)
    except KeyboardInterrupt:
        print("tutti loadtest: stopped by hand", file=sys.stderr)
        return int(Verdict.INVALID)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tutti loadtest",
        description="Open-loop load tests under Locust. What follows -- goes to Locust, as --expect-workers.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a scenario, and judge it by its goal")
    saturate = commands.add_parser("saturate", help="the highest rate that meets the goal, as bounds")
    saturate.add_argument("--start", type=float, default=10.0, help="requests a second to begin with (default: 10)")
    saturate.add_argument("--seconds", type=float, default=10.0, help="of each probe (default: 10)")
    saturate.add_argument("--within", type=float, default=0.03, help="until the bounds are this close (default: 0.03)")
    compare = commands.add_parser("compare", help="whether server B differs from server A, asked in turns")
    compare.add_argument("a", metavar="A", help="address of one server")
    compare.add_argument("b", metavar="B", help="address of the other")
    compare.add_argument("--rounds", type=int, default=10, help="that are compared (default: 10)")
    compare.add_argument("--seconds", type=float, default=2.0, help="of each (default: 2)")
    replay = commands.add_parser("replay", help="the arrivals of a CSV trace, or of an earlier run's Parquet")
    replay.add_argument("trace", type=Path)
    replay.add_argument("--speed", type=float, default=1.0, help="times as fast (default: 1)")
    for command in (run, saturate, compare, replay):
        command.add_argument("scenario", type=Path, help="YAML; see docs/loadtest.md")
        command.add_argument("--url", action="append", help="in place of the scenario's (repeatable)")
        command.add_argument("--protocol", choices=("http", "grpc", "grpc-stream"), help="in place of the scenario's")
        command.add_argument("--metrics", action="append", help="address of the server's metrics page (repeatable)")
        command.add_argument("--seed", type=int)
        command.add_argument("--processes", type=int, default=1, help="workers on this machine (default: 1)")
        command.add_argument("--output", type=Path, help="folder for the report, JSON and raw requests")
    for command in (run, replay):
        command.add_argument("--web", action="store_true", help="with Locust's web page, on port 8089")
    return parser


def _load(options: argparse.Namespace, **changes: Any) -> Scenario:
    target = {
        name: value
        for name, value in (("urls", options.url), ("protocol", options.protocol), ("metrics", options.metrics))
        if value
    }
    if options.seed is not None:
        changes["seed"] = options.seed
    if options.processes < 1:
        raise ScenarioError(f"--processes: expected 1 or more, got {options.processes}")
    return scenario.load(options.scenario, {**changes, **({"target": target} if target else {})})


def _run(options: argparse.Namespace, locust: Sequence[str]) -> int:
    return _tell(_measure(_load(options), options, locust), options)


def _replay(options: argparse.Namespace, locust: Sequence[str]) -> int:
    if options.speed <= 0:
        raise ScenarioError(f"--speed: expected more than 0, got {options.speed:g}")
    trace = {"trace": str(options.trace.resolve()), "speed": options.speed}
    return _tell(_measure(_load(options, arrivals=trace, stages=[]), options, locust), options)


def _measure(given: Scenario, options: argparse.Namespace, locust: Sequence[str]) -> Result:
    extra = [*locust, *(["--autostart"] if options.web else [])]
    return runner.run(given, options.output, options.processes, extra, is_quiet=False)


def _tell(result: Result, options: argparse.Namespace) -> int:
    judgement, figures = result.judgement, runner.quantiles_ms(result.histogram)
    seen = result.seen
    print(f"{seen.requests:,} requests, {seen.errors:,} errors, goodput {seen.good / max(seen.seconds, 1e-9):,.1f} /s")
    for what, count in result.errors.most_common(5):
        print(f"  {count:,} times {': '.join(filter(None, (what, result.reasons.get(what))))}")
    print("latency from when requests were due: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in figures.items()))
    print(f"generator: at most {result.cpu:.0%} of a core, {result.lateness_ms.get('p99', 0.0):.2f} ms late (p99)")
    print("\n".join([judgement.verdict.name, *(f"  {reason}" for reason in judgement.reasons)]))
    if options.output is not None:
        _write(result, options.output)
        print(f"report: {options.output / 'report.html'}")
    return int(judgement.verdict)


def _write(result: Result, folder: Path) -> None:
    given = sys.argv[1:] if Path(sys.argv[0]).name == "cli.py" else sys.argv[2:]
    command = shlex.join(["tutti", "loadtest", *given])
    hardware = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores."
    (folder / "report.html").write_text(report.page(result, command, hardware), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(result.as_json(), indent=1) + "\n")


def _saturate(options: argparse.Namespace, locust: Sequence[str]) -> int:
    given = _load(options)
    if given.slo.p99_ms is None:
        raise ScenarioError("saturate: expected slo.p99_ms: without a goal there is no highest rate that meets it")
    if min(options.start, options.seconds, options.within) <= 0:
        raise ScenarioError("saturate: expected --start, --seconds and --within above 0")
    seen: list[Result] = []

    def probe(rate: float, times: float) -> Verdict:
        # Long enough to be certain of a hundredth; what is rarer than that would take too long at each rate.
        stages = [Stage(seconds=times * max(options.seconds, PROBE_REQUESTS / rate), rate=rate)]
        goal = given.slo.model_copy(update={"min_goodput": 0.0, "error_rate": max(0.01, given.slo.error_rate)})
        one = given.model_copy(update={"stages": stages, "slo": goal, "seed": given.seed + len(seen)})
        seen.append(runner.run(one, None, options.processes, locust))
        judgement = seen[-1].judgement
        p99 = runner.quantiles_ms(seen[-1].histogram).get("p99", float("nan"))
        print(f"{rate:10,.1f} /s: {judgement.verdict.name}, p99 {p99:.1f} ms; {judgement.reasons[0]}", flush=True)
        return judgement.verdict

    found = search.saturate(probe, options.start, options.within)
    is_bounded = found.high != float("inf")
    high = f"{found.high:,.1f}" if is_bounded else "more than could be generated"
    print(f"meets the goal up to {found.low:,.1f} /s, and no longer at {high} /s")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        probes = [{"rate": rate, "verdict": verdict.name} for rate, verdict in found.probes]
        bounds = {"low": found.low, "high": found.high if is_bounded else None, "probes": probes}
        (options.output / "saturate.json").write_text(json.dumps(bounds, indent=1) + "\n")
    if not is_bounded:
        return int(Verdict.INVALID)
    return int(Verdict.PASS if found.low else Verdict.FAIL)


def _compare(options: argparse.Namespace, locust: Sequence[str]) -> int:
    given = _load(options)
    if options.rounds < 3 or options.seconds <= 0:
        raise ScenarioError(f"--rounds: expected 3 or more, got {options.rounds}, of {options.seconds:g} s")
    rate = given.stages[0].rate if given.stages else 0.0
    if not rate:
        raise ScenarioError("compare: expected a first stage with a rate: of each server")
    target = given.target.model_copy(update={"urls": [options.a, options.b]})
    stages = [Stage(seconds=options.rounds * options.seconds, rate=2 * rate)]
    one = given.model_copy(update={"target": target, "stages": stages})
    with tempfile.TemporaryDirectory(prefix="tutti-loadtest-") as folder:
        result = runner.run(one, options.output or Path(folder), options.processes, locust)
        if result.judgement.verdict is Verdict.INVALID:
            raise RunError("; ".join(result.judgement.reasons))
        medians = runner.medians_by_address(result.raw, 2, one.warmup_s, options.seconds, options.rounds)
    for number, (a, b) in enumerate(zip(*medians, strict=True)):
        if not (a == a and b == b):
            raise RunError(f"round {number + 1}: a server has answered nothing: {dict(result.errors)}")
        print(f"round {number + 1}: A {a:.3f} ms, B {b:.3f} ms")
    found = search.difference(*medians)
    shown = f"B takes {found.ratio:.3f} times as long at the median ({found.low:.3f} to {found.high:.3f}, 98%)"
    print(f"{'different' if found.is_different else 'no difference'}: {shown}")
    return int(Verdict.FAIL if found.is_different and found.ratio > 1 else Verdict.PASS)


if __name__ == "__main__":
    sys.exit(main())
