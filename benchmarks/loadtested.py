"""Whether the load tester tells the truth: against servers whose behaviour is arithmetic, and itself.

    python -m benchmarks.loadtested --report benchmarks/loadtest.md

A server with a fixed latency, a stall, errors and a rate; how fast one core generates; slow calls in flight; saturation
of an emulated accelerator; comparisons of a server with itself and with a slower one.
"""

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.machine import ROOT, run_parts
from benchmarks.open_loop import CONFIG, write_model
from tutti.loadtest import runner, scenario, search
from tutti.loadtest.process import free_ports, stop, wait_until_ready
from tutti.loadtest.scenario import Scenario
from tutti.loadtest.search import PROBE_REQUESTS
from tutti.loadtest.slo import Verdict

DELAY_MS, STALL_S, EVERY_S, ERRORS = 5.0, 1.0, 20.0, 0.01
ACCELERATOR_S, ROW_S = 0.02, 0.001
CLOSED = """
from locust import HttpUser, constant_throughput, task


class User(HttpUser):
    wait_time = constant_throughput(20)

    @task
    def infer(self):
        self.client.post("/v2/models/fake/infer", data=b"x" * 200)
"""


@contextlib.contextmanager
def fake(*flags: str) -> Iterator[dict[str, str]]:
    """tests/loadtest/fake_server.py; its addresses by protocol."""
    http, grpc = free_ports(2)
    command = [sys.executable, "-m", "tests.loadtest.fake_server", str(http), str(grpc), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield {"http": f"127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"}
    finally:
        stop(process)


@contextlib.contextmanager
def tutti(folder: Path, *prefix: str) -> Iterator[dict[str, str]]:
    """`tutti serve` over a folder's models."""
    http, grpc = free_ports(2)
    command = [
        *prefix,
        sys.executable,
        "-m",
        "tutti.app.cli",
        "serve",
        str(folder / "models"),
        "--http-port",
        str(http),
    ]
    with (folder / "tutti.log").open("wb") as log:
        process = subprocess.Popen([*command, "--grpc-port", str(grpc), "--metrics-port", "0"], stdout=log, stderr=log)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{http}/v2/health/ready", folder / "tutti.log")
        yield {"http": f"127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"}
    finally:
        stop(process)


def made(
    protocol: str, urls: dict[str, str], rate: float, seconds: float, model: str = "fake", **more: Any
) -> Scenario:
    given = {
        "payloads": [{"model": model}], "stages": [{"seconds": seconds, "rate": rate}], "warmup_s": 2,
        "target": {"protocol": protocol, "urls": [urls[protocol.removesuffix("-stream")]], "connections": 2000}, **more,
    }  # fmt: skip
    return Scenario(**given)


def row(what: str, true: float, got: float, unit: str) -> str:
    return f"| {what} | {true:,.4g} {unit} | {got:,.4g} {unit} | {got / true - 1:+.2%} |"


def truth(folder: Path) -> list[str]:
    """A fixed latency of 5 ms, a stall of 1 s every 20 s, an error in each hundred; 200 /s evenly for 40 s."""
    lines = []
    flags = (
        "--delay-ms",
        str(DELAY_MS),
        "--stall-every-s",
        str(EVERY_S),
        "--stall-s",
        str(STALL_S),
        "--errors",
        str(ERRORS),
    )
    # Of a uniform wait up to STALL_S for the share STALL_S / EVERY_S, the top hundredth of all.
    p99 = STALL_S * (1 - 0.01 * EVERY_S / STALL_S) * 1e3 + DELAY_MS
    for protocol in ("http", "grpc", "grpc-stream"):
        with fake(*flags) as urls:
            own = made(protocol, urls, 200, 40, arrivals={"process": "constant"}, warmup_s=0)
            result = runner.run(own, folder / protocol)
        got, seen = runner.quantiles_ms(result.histogram), result.seen
        lines += [f"{protocol}:", "", "| | truth | measured | off by |", "|---|---|---|---|"]
        lines += [row("p50", DELAY_MS, got["p50"], "ms"), row("p99", p99, got["p99"], "ms")]
        lines += [row("max", STALL_S * 1e3 + DELAY_MS, got["max"], "ms")]
        lines += [row("errors", 100 * ERRORS, 100 * seen.errors / seen.requests, "%"), ""]
    with fake(*flags) as urls:
        file = folder / "closed.py"
        file.write_text(CLOSED)
        command = [sys.executable, "-m", "locust", "-f", str(file), "--headless", "-u", "10", "-r", "10", "-t", "40s"]
        command += ["--host", f"http://{urls['http']}", "--json-file", str(folder / "closed"), "--only-summary"]
        subprocess.run(command, capture_output=True, check=False, cwd=folder)
    (found,) = json.loads((folder / "closed.json").read_text())
    times = sorted((float(ms), count) for ms, count in found["response_times"].items())
    rank, total = 0.99 * sum(count for _, count in times), 0
    closed = next(ms for ms, count in times if (total := total + count) >= rank)
    lines.append(
        f"Locust's own closed loop at the same 200 /s (10 users of 20 /s): p99 {closed:.0f} ms, where clients waited "
        f"{p99:.0f}; it asked {found['num_requests']:,} times, {8000 - found['num_requests']:,} fewer than were due."
    )
    return lines


def rate_limit(folder: Path) -> list[str]:
    """A server that does 400 requests a second, one after the other: the highest rate with a p99 within 200 ms."""
    lines = ["| | truth | bounds | middle off by |", "|---|---|---|---|"]
    for protocol in ("http", "grpc"):
        with fake("--rate", "400") as urls:
            found = saturate(made(protocol, urls, 1, 8, slo={"p99_ms": 200, "error_rate": 0.01}), 100, 8, 0.02)
        lines.append(f"| {protocol} | 400 /s | {found.low:.0f} to {found.high:.0f} | {found.middle / 400 - 1:+.1%} |")
    return lines


def saturate(own: Scenario, start: float, seconds: float, within: float) -> search.Bounds:
    count = 0

    def probe(rate: float, times: float) -> Verdict:
        nonlocal count
        count += 1
        stages = [scenario.Stage(seconds=times * max(seconds, PROBE_REQUESTS / rate), rate=rate)]
        return runner.run(own.model_copy(update={"stages": stages, "seed": own.seed + count})).judgement.verdict

    return search.saturate(probe, start, within)


def generator(folder: Path) -> list[str]:
    """The load tester on one core, tutti with a tiny model on the other: the highest rate that is still valid."""
    from tests.models import Repository

    Repository(folder / "models").add_onnx("tiny")
    lines = ["| | highest valid rate | generator, of a core | sent late, p99 |", "|---|---|---|---|"]
    profile: list[str] = []
    for protocol, rates in (("http", range(8000, 24_001, 2000)), ("grpc", range(4000, 10_001, 500))):
        with tutti(folder, "taskset", "-c", "1") as urls:
            best: tuple[int, runner.Result] | None = None
            for rate in rates:
                own = made(protocol, urls, rate, 5, model="tiny", slo={"error_rate": 0.01})
                with on_core(0):
                    result = runner.run(own)
                if result.judgement.verdict is Verdict.INVALID:
                    break
                best = rate, result
            assert best is not None
            late = best[1].lateness_ms.get("p99", 0.0)
            lines.append(f"| {protocol} | {best[0]:,} /s | {best[1].cpu:.0%} | {late:.2f} ms |")
            with on_core(0):
                profile += [
                    f"- {protocol} at {best[0]:,} /s: {profiled(made(protocol, urls, best[0], 8, model='tiny'))}"
                ]
    return [*lines, "", "Where the engine's time goes (py-spy, shares of samples on the processor):", "", *profile]


@contextlib.contextmanager
def on_core(number: int) -> Iterator[None]:
    """This process, and what it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {number})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def profiled(own: Scenario) -> str:
    """The functions with most samples while a run is on."""
    found: list[str] = []

    def watch() -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "tutti.loadtest.engine" in " ".join(process.cmdline()):
                        time.sleep(4)
                        spy = Path(sys.executable).with_name("py-spy")
                        command = [str(spy), "record", "-d", "3", "-r", "200", "-f", "raw", "-o", "/dev/stdout"]
                        command += ["-p", str(process.pid)]
                        raw = subprocess.run(command, capture_output=True, text=True, check=False).stdout
                        found.append(raw)
                        return
            time.sleep(0.1)

    thread = threading.Thread(target=watch)
    thread.start()
    runner.run(own)
    thread.join()
    counts: Counter[str] = Counter()
    for line in "".join(found).splitlines():
        match = re.match(r"(.*) (\d+)$", line)
        if match and "loadtest" in match[1]:
            counts[re.sub(r":\d+\)$", ")", match[1].split(";")[-1])] += int(match[2])
    total = max(1, sum(counts.values()))
    return ", ".join(f"{name} {count / total:.0%}" for name, count in counts.most_common(6)) or "no samples"


def in_flight(folder: Path) -> list[str]:
    """Calls over gRPC that take a second each, 500 in flight from one worker."""
    with fake("--delay-ms", "1000") as urls:
        result = runner.run(made("grpc", urls, 500, 8, arrivals={"process": "constant"}, warmup_s=0), folder)
    got = runner.quantiles_ms(result.histogram)
    return [f"p50 {got['p50'] - 1000:+.1f} ms, p99 {got['p99'] - 1000:+.1f} ms over the second that each takes; "
            f"{result.seen.requests:,} calls, {result.seen.errors} errors"]  # fmt: skip


def accelerator(folder: Path) -> list[str]:
    """An emulated accelerator of 20 ms + 1 ms a row, 16 rows at most, behind tutti; p99 within 400 ms; three times.

    Probes of 20 s: in 10 s, a rate 4% too high makes a queue of no more than the goal.
    """
    version = write_model(folder / "models", fixed_s=ACCELERATOR_S, row_s=ROW_S)
    assert "max_batch_size: 16" in CONFIG
    capacity = 16 / (ACCELERATOR_S + 16 * ROW_S)
    lines = [
        f"It can do {capacity:.0f} rows a second ({version.parent.name}).",
        "",
        "| | bounds | middle | off by |",
        "|---|---|---|---|",
    ]
    with tutti(folder) as urls:
        middles = []
        for number in range(3):
            own = made("grpc", urls, 1, 10, model="double", slo={"p99_ms": 400, "error_rate": 0.01}, seed=100 * number)
            found = saturate(own, 100, 20, 0.03)
            middles.append(found.middle)
            off = found.middle / capacity - 1
            lines.append(
                f"| {number + 1} | {found.low:.0f} to {found.high:.0f} /s | {found.middle:.0f} /s | {off:+.1%} |"
            )
    return [*lines, "", f"between runs: {max(middles) / min(middles) - 1:.1%}"]


def comparisons(folder: Path) -> list[str]:
    """A server with itself, and with one that takes 10% longer: twenty times each, ten rounds of a second."""
    file = folder / "s.yaml"
    file.write_text(
        yaml.safe_dump({"payloads": [{"model": "fake"}], "stages": [{"seconds": 1, "rate": 100}], "warmup_s": 0.5})
    )
    said: dict[str, list[str]] = {"itself": [], "10% slower": []}
    with fake() as a, fake("--slower-by", "1.1") as b:
        for number in range(20):
            for name, other in (("itself", a), ("10% slower", b)):
                command = [sys.executable, "-m", "tutti.loadtest.cli", "compare", a["http"], other["http"], str(file)]
                done = subprocess.run(
                    [*command, "--seconds", "1", "--seed", str(number)],
                    capture_output=True,
                    text=True,
                    check=False,
                    cwd=ROOT,
                )
                said[name].append(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:])
    lines = []
    for name, texts in said.items():
        found = sum(text.startswith("different") for text in texts)
        ratios = [float(one[1]) for text in texts if (one := re.search(r"takes ([\d.]+) times", text))]
        shown = f"ratios {min(ratios):.3f} to {max(ratios):.3f}, median {statistics.median(ratios):.3f}"
        lines.append(f"- with {name}: {found} of 20 say different, {20 - found} no difference; {shown}")
    return lines


PARTS: dict[str, Callable[[Path], list[str]]] = {
    "truth": truth,
    "rate-limit": rate_limit,
    "generator": generator,
    "in-flight": in_flight,
    "accelerator": accelerator,
    "comparisons": comparisons,
}


if __name__ == "__main__":
    sys.exit(run_parts("loadtested", "The load tester", __doc__, PARTS))
