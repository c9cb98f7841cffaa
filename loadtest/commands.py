"""What `tutti loadtest` does, once it is known what: runs, searches and comparisons, told on the terminal and as pages.

Files are where the person stands. What could not be run ends with a line that says why, and with a page where a folder
was named for it.
"""

import argparse
import dataclasses
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from tutti.console.progress import Progress, amount, clock
from tutti.core.errors import ConfigError
from tutti.frontends import api_keys
from tutti.loadtest import names, report, runner, search, server
from tutti.loadtest.advice import said
from tutti.loadtest.arrivals import length_s
from tutti.loadtest.comparison import Comparison, of_runs
from tutti.loadtest.errors import RunError, ScenarioError
from tutti.loadtest.payloads import messages
from tutti.loadtest.process import stop
from tutti.loadtest.runner import Result
from tutti.loadtest.scenario import Scenario, Stage
from tutti.loadtest.scenario import load as load_scenario
from tutti.loadtest.search import PROBE_REQUESTS
from tutti.loadtest.slo import Verdict

# Seconds that a probe takes beside its load: the generator starts and ends.
_AROUND_S = 3.0
# Headers that carry a key. A server looks at one of them only, so a new key replaces both.
_KEY_HEADERS = ("authorization", "x-api-key")
# The file with each command's result as JSON.
_JSON = {"run": "report.json", "replay": "report.json", "saturate": "saturate.json", "compare": "compare.json"}


def run(options: argparse.Namespace) -> int:
    """Run one command; returns its exit status."""
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "run": _run, "saturate": _saturate, "compare": _compare, "replay": _replay, "worker": _worker,
    }  # fmt: skip
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # letters that the terminal cannot show must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        return commands[options.command](options)
    except ScenarioError as error:
        _leave_unusable(options, str(error))
        print(f"tutti loadtest: {error}", file=sys.stderr)
    except RunError as error:
        print(f"tutti loadtest: {error}", file=sys.stderr)
    except OSError as error:
        print(f"tutti loadtest: {error.filename or 'it failed'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ntutti loadtest: stopped by hand", file=sys.stderr)
    return int(Verdict.INVALID)


def _load(options: argparse.Namespace, **changes: Any) -> Scenario:
    """The scenario as the flags change it. Raises ScenarioError, also for a folder that cannot be written to."""
    target = {
        name: value
        for name, value in (("urls", options.url), ("protocol", options.protocol), ("metrics", options.metrics))
        if value
    }
    if options.seed is not None:
        changes["seed"] = options.seed
    if options.model is not None:
        changes |= {"payloads": [{"model": options.model}], "name": options.model}
    if options.p99_ms is not None:
        changes["slo"] = {"p99_ms": options.p99_ms}
    scenario = load_scenario(names.scenario(options.scenario), {**changes, **({"target": target} if target else {})})
    scenario = _with_key(scenario, options.api_key_file)
    length_s(scenario)  # refuses a trace that cannot be read
    if options.output is not None:
        _make_folder(options.output)
    return scenario


def _with_key(scenario: Scenario, path: Path | None) -> Scenario:
    """The scenario with the file's key in place of its own. Raises ScenarioError."""
    if path is None:
        return scenario
    try:
        shows = api_keys.headers(path)
    except ConfigError as error:
        raise ScenarioError(str(error)) from None
    others = {name: value for name, value in scenario.target.headers.items() if name.lower() not in _KEY_HEADERS}
    return scenario.model_copy(update={"target": scenario.target.model_copy(update={"headers": others | shows})})


def _leave_unusable(options: argparse.Namespace, why: str) -> None:
    """Write a page that says why nothing was run, where the folder can be written to."""
    output = getattr(options, "output", None)
    if output is None:
        return
    with suppress(ScenarioError):
        _make_folder(output)
        page = report.unusable(Path(options.scenario).stem, why, _source(options))
        _leave(options, _JSON[options.command], {"verdict": Verdict.INVALID.name, "reasons": [why]}, page)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ScenarioError(f"--output {path}: a file: expected a folder, which is made if need be") from None
    except OSError as error:
        raise ScenarioError(f"--output {path}: {error.strerror}: expected a folder to write to") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ScenarioError(f"--output {path}: Permission denied: expected a folder to write to")


def _check(scenario: Scenario, options: argparse.Namespace) -> None:
    """What can be known before: that servers, models and files are there. Raises RunError or ScenarioError."""
    if "--master" in options.locust:
        return  # the workers ask, from where they are
    inputs = server.check(scenario)
    fewer = [payload.model_copy(update={"count": 1}) for payload in scenario.payloads]
    messages(scenario.model_copy(update={"payloads": fewer}), lambda model, version: inputs[model, version])


def _run(options: argparse.Namespace) -> int:
    scenario = _load(options)
    if options.rate is not None or options.seconds is not None:
        scenario = _at_one_rate(scenario, options)
    return _judge(scenario, options)


def _at_one_rate(scenario: Scenario, options: argparse.Namespace) -> Scenario:
    """The scenario at the flags' rate and seconds, or its first stage's. Raises ScenarioError: a trace needs both."""
    if not scenario.stages and None in (options.rate, options.seconds):
        raise ScenarioError("expected both --rate and --seconds: the scenario has a trace, and no stages")
    first = scenario.stages[0] if scenario.stages else Stage(seconds=options.seconds, rate=options.rate)
    stage = Stage(seconds=options.seconds or first.seconds, rate=options.rate or first.rate)
    arrivals = scenario.arrivals.model_copy(update={"trace": None})
    changed = scenario.model_copy(update={"stages": [stage], "arrivals": arrivals})
    length_s(changed)  # refuses too many requests
    return changed


def _replay(options: argparse.Namespace) -> int:
    trace = names.file(options.trace, "a trace in CSV or Parquet", (".csv", ".parquet"))
    arrivals = {"trace": str(trace.resolve()), "speed": options.speed}
    return _judge(_load(options, arrivals=arrivals, stages=[]), options)


def _judge(scenario: Scenario, options: argparse.Namespace) -> int:
    """Run it, and say what came of it."""
    progress = Progress()
    try:
        _check(scenario, options)
        web = _web(options) if options.web else []
        result = runner.run(scenario, options.output, options.processes, [*options.locust, *web], _shown(progress))
    except RunError as error:
        said_so = {"verdict": Verdict.INVALID.name, "reasons": [str(error)]}
        _leave(options, _JSON[options.command], said_so, report.refusal(scenario, [str(error)], _source(options)))
        raise
    finally:
        progress.clear()
    _tell(result)
    _leave(options, _JSON[options.command], result.as_json(), report.page(result, _source(options)))
    return int(result.judgement.verdict)


def _web(options: argparse.Namespace) -> list[str]:
    """Locust's flags for its page. Raises RunError when its port is taken."""
    words = [part for word in options.locust for part in word.split("=", 1)]
    host = words[words.index("--web-host") + 1] if "--web-host" in words[:-1] else "127.0.0.1"
    port = words[words.index("--web-port") + 1] if "--web-port" in words[:-1] else "8089"
    try:
        with socket.create_server((host if host != "*" else "", int(port))):
            pass
    except (OSError, ValueError, OverflowError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise RunError(f"--web: nothing can listen at {host}:{port} ({why}): choose another: -- --web-port N") from None
    print(f"while the run is on, its page is at http://{host}:{port}", file=sys.stderr)
    return ["--autostart"]


def _shown(progress: Progress, before: str = "", more_s: Callable[[], float | None] = lambda: 0.0) -> runner.Tell:
    """Progress with the time left; `more_s` is that of what comes after, None where nobody knows."""

    def show(text: str, left_s: float) -> None:
        more = more_s()
        if not left_s and not more:
            progress.show(f"{before}{text}, and the last are waited for")
            return
        # For one run the schedule tells how much is left; a search adds what its other probes may take.
        all_of_it = f"{amount(left_s + more)} left" if more else f"{clock(left_s)} left"
        after = all_of_it if more is not None else f"{clock(left_s)} left of this one"
        progress.show(f"{before}{text}, {after}")

    return show


def _tell(result: Result) -> None:
    judgement, figures, seen = result.judgement, runner.quantiles_ms(result.histogram), result.seen
    warmup_s = 0.0 if result.stopped else result.scenario.warmup_s
    after = f" after {warmup_s:g} s of warm-up, which do not count" if warmup_s else ""
    goodput = f"goodput {seen.good / max(seen.seconds, 1e-9):,.1f} /s"
    print(f"{seen.requests:,} requests{after}: {seen.errors:,} errors, {goodput}")
    for error, count in result.errors.most_common(5):
        print(f"  {count:,} times {': '.join(filter(None, (error, said(result.reasons.get(error, '')))))}")
    if figures:
        print(
            "latency from when requests were due: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in figures.items())
        )
    print(f"generator: at most {result.cpu:.0%} of a core, {result.lateness_ms.get('p99', 0.0):.2f} ms late (p99)")
    print("\n".join([judgement.verdict.name, *(f"  {reason}" for reason in judgement.reasons)]))


def _source(options: argparse.Namespace) -> report.Source:
    hardware = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores."
    return report.Source(shlex.join(["tutti", "loadtest", *options.words]), hardware)


def _leave(options: argparse.Namespace, name: str, told: dict[str, Any], page: str) -> None:
    """The page and its figures, where a folder was named."""
    if options.output is None:
        return
    (options.output / name).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    path = options.output / "report.html"
    before = f", over that of {_written_at(path)} (another --output keeps both)" if path.is_file() else ""
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    print(f"report: {path}{before}")


def _written_at(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")


@dataclasses.dataclass(slots=True)
class _Search:
    """The probes of one search, each printed when it is over."""

    scenario: Scenario
    options: argparse.Namespace
    progress: Progress = dataclasses.field(default_factory=Progress)
    seen: list[Result] = dataclasses.field(default_factory=list)
    low: float = 0.0
    high: float = float("inf")
    # Why a probe could not be made.
    broken: str = ""

    def probe(self, rate: float, times: float) -> Verdict:
        """Run at one rate, long enough to be certain of errors of 1%: rarer ones would take too long at each rate."""
        stages = [Stage(seconds=times * self._seconds(rate), rate=rate)]
        slo = self.scenario.slo
        goal = slo.model_copy(update={"min_goodput": 0.0, "error_rate": max(0.01, slo.error_rate)})
        probed = self.scenario.model_copy(
            update={"stages": stages, "slo": goal, "seed": self.scenario.seed + len(self.seen)}
        )
        before = f"probe {len(self.seen) + 1} at {rate:,.1f} /s: "
        shown = _shown(self.progress, before, lambda: self._more_s(rate))
        try:
            result = runner.run(probed, None, self.options.processes, self.options.locust, shown)
        except RunError as error:
            self.broken = f"the probe at {rate:,.1f} /s could not be made: {error}"
            return Verdict.INVALID
        finally:
            self.progress.clear()
        return self._note(rate, result)

    def _note(self, rate: float, result: Result) -> Verdict:
        if result.stopped and self.low:  # it has answered lower rates: this one is too high
            result.stopped = ""
        self.seen.append(result)
        judgement = result.judgement
        p99 = runner.quantiles_ms(result.histogram).get("p99")
        latency = f"p99 {p99:.1f} ms" if p99 is not None else "nothing was answered well"
        print(f"{rate:10,.1f} /s: {judgement.verdict.name}, {latency}; {judgement.reasons[0]}", flush=True)
        if judgement.verdict is Verdict.PASS:
            self.low = max(self.low, rate)
        elif judgement.verdict is not Verdict.INVALID:
            self.high = min(self.high, rate)
        return judgement.verdict

    def _seconds(self, rate: float) -> float:
        return max(float(self.options.seconds), PROBE_REQUESTS / rate)

    def _more_s(self, rate: float) -> float | None:
        left = search.probes_left(self.low, self.high, self.options.within)
        return None if left is None else max(0, left - 1) * (self._seconds(rate) + _AROUND_S)

    def reasons(self, bounds: search.Bounds) -> list[str]:
        """What was found, and why no more."""
        is_bounded = bounds.high != float("inf")
        high = f"{bounds.high:,.1f}" if is_bounded else "a rate that could not be generated"
        sentence = [
            f"meets the goal up to {bounds.low:,.1f} /s, and no longer at {high} /s".replace(
                "generated /s", "generated"
            )
        ]
        if self.broken:
            return [self.broken, *(sentence if bounds.low else [])]
        if not is_bounded and self.seen:
            return [*self.seen[-1].judgement.reasons, *(sentence if bounds.low else [])]
        return sentence


def _say(verdict: Verdict, reasons: Sequence[str]) -> None:
    """Print the verdict and its reasons: an INVALID one to stderr, since it says nothing of the server."""
    stream = sys.stderr if verdict is Verdict.INVALID else sys.stdout
    print("\n".join([verdict.name, *(f"  {reason}" for reason in reasons)]), file=stream)


def _saturate(options: argparse.Namespace) -> int:
    scenario = _load(options)
    if scenario.slo.p99_ms is None:
        raise ScenarioError("saturate: expected slo.p99_ms: without a goal there is no highest rate that meets it")
    probes = _Search(scenario, options)
    try:
        _check(scenario, options)
        bounds = search.saturate(probes.probe, options.start, options.within)
    except RunError as error:
        bounds, probes.broken = search.Bounds(0.0, float("inf"), []), str(error)
    verdict = Verdict.PASS if bounds.low else Verdict.FAIL
    if probes.broken or bounds.high == float("inf"):
        verdict = Verdict.INVALID
    reasons = probes.reasons(bounds)
    _say(verdict, reasons)
    listed = [{"rate": rate, "verdict": verdict.name} for rate, verdict in bounds.probes]
    high = bounds.high if bounds.high != float("inf") else None
    told = {"verdict": verdict.name, "reasons": reasons, "low": bounds.low, "high": high, "probes": listed}
    page = report.saturation(scenario, verdict, reasons, bounds, probes.seen, _source(options))
    _leave(options, _JSON[options.command], told, page)
    return int(verdict)


def _compare(options: argparse.Namespace) -> int:
    if options.is_of_runs:
        return _compare_runs(options)
    scenario = _load(options)
    rate = options.rate or (scenario.stages[0].rate if scenario.stages else 0.0)
    if not rate:
        raise ScenarioError("compare: expected --rate, or a first stage with a rate: of each server")
    target = scenario.target.model_copy(update={"urls": [options.a, options.b]})
    stages = [Stage(seconds=options.rounds * options.seconds, rate=2 * rate)]
    both = scenario.model_copy(update={"target": target, "stages": stages})
    comparison, progress = Comparison(both, options.seconds, options.rounds), Progress()
    with tempfile.TemporaryDirectory(prefix="tutti-loadtest-") as folder:
        try:
            _check(both, options)
            where = options.output or Path(folder)
            comparison.measure(runner.run(both, where, options.processes, options.locust, _shown(progress)))
        except RunError as error:
            comparison.reasons = [str(error)]
        finally:
            progress.clear()
    _tell_comparison(comparison)
    page = report.comparison(
        both, comparison.verdict, comparison.reasons, comparison.medians, comparison.difference, comparison.result,
        _source(options),
    )  # fmt: skip
    _leave(options, _JSON[options.command], comparison.as_json(), page)
    return int(comparison.verdict)


def _compare_runs(options: argparse.Namespace) -> int:
    """Compare two finished runs by the files they left. Raises RunError where these are not enough."""
    comparison = of_runs(options.a, options.b)
    _tell_comparison(comparison)
    return int(comparison.verdict)


def _tell_comparison(comparison: Comparison) -> None:
    for number, (a, b) in enumerate(zip(*comparison.medians, strict=True)):
        print(f"{comparison.unit} {number + 1}: A {a:.3f} ms, B {b:.3f} ms")
    _say(comparison.verdict, comparison.reasons)


def _worker(options: argparse.Namespace) -> int:
    """A worker of Locust's, with the engine; it ends with its master."""
    command = [sys.executable, "-P", "-m", "locust", "-f", str(runner.LOCUSTFILE), "--worker"]
    command += ["--master-host", options.master_host, "--master-port", str(options.master_port)]
    if options.raw is not None:
        _make_folder(options.raw)
        command += ["--raw", str(options.raw.resolve())]
    with tempfile.TemporaryDirectory(prefix="tutti-loadtest-") as empty:
        process = subprocess.Popen([*command, *options.locust], cwd=empty)
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                stop(process)
