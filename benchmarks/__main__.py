"""`make bench`: tutti beside a real tritonserver, and its Ray application beside plain Ray Serve.

Both sides of a comparison are measured in turn, round after round, in one run; figures are medians. Each part writes a
section of benchmarks/results.md and results.json; `--only` measures some parts again and keeps the others' figures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import clients, graphs, overload, peers
from benchmarks.clients import Figures
from benchmarks.machine import commit, hardware
from benchmarks.models import (
    ACCELERATOR,
    AUDIO,
    CLIPS,
    CLIPS_ALONE,
    CNN,
    IMAGE,
    MLP,
    SLOW_ACCELERATOR,
    BenchModel,
    write_repository,
)
from demo.client import Client, load_items
from tests.models import plain_sample
from tests.peers import tritonserver
from tests.serving import serving
from tutti.loadtest.process import free_ports, stop, wait_until_ready

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks"
TRITON = "tritonserver"


@dataclass(frozen=True, slots=True)
class Run:
    """How long and how often to measure, and where to put files."""

    scratch: Path
    rounds: int
    seconds: int

    def folder(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.scratch))


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: medians of both sides over the rounds, and the least and greatest ratio of a pair."""

    what: str
    ours: Figures
    theirs: Figures
    least: float
    greatest: float

    @property
    def ratio(self) -> float:
        return self.ours.rate / self.theirs.rate


def median(figures: Sequence[Figures]) -> Figures:
    return Figures(*(statistics.median(getattr(one, key) for one in figures) for key in ("rate", "p50_ms", "p99_ms")))


def compared(what: str, pairs: Sequence[tuple[Figures, Figures]]) -> Row:
    ratios = [ours.rate / theirs.rate for ours, theirs in pairs]
    return Row(what, median([a for a, _ in pairs]), median([b for _, b in pairs]), min(ratios), max(ratios))


def interleave(what: str, ours: Callable[[], Figures], theirs: Callable[[], Figures], rounds: int) -> Row:
    """Each side once per round, in turn, after a warm-up of both. A pair of which one came to nothing is repeated."""
    ours(), theirs()
    pairs: list[tuple[Figures, Figures]] = []
    for _ in range(3 * rounds):
        pair = ours(), theirs()
        if all(one.rate > 0 for one in pair):
            pairs.append(pair)
        else:
            print(f"{what}: a run came to nothing: {pair}", file=sys.stderr)
        if len(pairs) == rounds:
            return compared(what, pairs)
    raise RuntimeError(f"{what}: {len(pairs)} pairs of {rounds} came to something")


def loads(run: Run, folder: Path, model: BenchModel) -> dict[str, Callable[[Any, int], Figures]]:
    """Protocol -> a load of so many clients on a server."""
    script = clients.http_script(folder / f"{model.name}.lua", *clients.infer_body(model))
    message = clients.grpc_message(folder / f"{model.name}.grpc", model)
    path = f"/v2/models/{model.name}/infer"
    return {
        "HTTP": lambda server, count: clients.wrk(f"http://{server.http}{path}", script, count, run.seconds),
        "gRPC": lambda server, count: clients.h2load(server.grpc, message, count, run.seconds),
    }


@contextmanager
def both(folder: Path, *models: BenchModel) -> Iterator[tuple[Any, Any]]:
    """tutti and tritonserver over one repository."""
    write_repository(folder / "repository", *models)
    with (
        serving(folder / "repository", folder / "tutti.log") as ours,
        tritonserver.running(folder / "repository", folder) as theirs,
    ):
        yield ours, theirs


def against_triton(run: Run, name: str, wanted: Sequence[tuple[BenchModel, Sequence[int]]]) -> list[Row]:
    folder = run.folder(name)
    rows = []
    with both(folder, *(model for model, _ in wanted)) as (ours, theirs):
        for model, counts in wanted:
            for protocol, load in loads(run, folder, model).items():
                for count in counts:
                    what = f"{model.name}, {protocol}, {count} client{'s' if count > 1 else ''}"
                    rows.append(interleave(what, partial(load, ours, count), partial(load, theirs, count), run.rounds))
    return rows


def tiny(run: Run) -> list[str]:
    rows = against_triton(run, "tiny", [(MLP, (1, 16, 64))])
    lines = table(rows, TRITON)
    bare_ms = bare_call_ms(run)
    for row in rows[::3]:
        added = row.ours.p50_ms - bare_ms
        lines.append(
            f"\n{row.what}: {added:.2f} ms more than the bare session call ({bare_ms:.3f} ms); tritonserver adds "
            f"{row.theirs.p50_ms - bare_ms:.2f} ms."
        )
    return lines


def bare_call_ms(run: Run) -> float:
    """The median of the model's session called by hand."""
    session = _session(write_repository(run.folder("bare") / "repository", MLP), 1)
    item = np.full((1, *MLP.shape), 0.5, np.float32)
    times = []
    for _ in range(2000):
        start = time.perf_counter()
        session.run(None, {"x": item})
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _session(model: Path, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def malformed(run: Run) -> list[str]:
    """The rate of good requests with one in a hundred bad, beside that with none. The client is the same."""
    folder = run.folder("malformed")
    write_repository(folder / "repository", MLP)
    body, length = clients.infer_body(MLP)
    bad = body.replace(b'"shape"', b'"shapf"', 1)
    scripts = [clients.mixed_script(folder / f"{n}.lua", body, bad, length, n) for n in (1, 0)]
    with serving(folder / "repository", folder / "log") as server:
        url = f"http://{server.http}/v2/models/mlp/infer"
        some, none = (partial(clients.wrk_good, url, script, 64, run.seconds) for script in scripts)
        row = interleave("good requests, 64 clients", some, none, run.rounds)
    return table([row], "without bad ones", ours="with 1% malformed")


def large(run: Run) -> list[str]:
    return table(against_triton(run, "large", [(IMAGE, (1, 8)), (AUDIO, (1, 8))]), TRITON)


def accelerator(run: Run) -> list[str]:
    rows = against_triton(run, "accelerator", [(ACCELERATOR, (16, 64, 256))])
    capacity = ACCELERATOR.max_batch_size / (0.002 + 0.00002 * ACCELERATOR.max_batch_size)
    lines = table(rows, TRITON)
    for row in (rows[2], rows[5]):
        share, theirs = row.ours.rate / capacity, row.theirs.rate / capacity
        lines.append(f"\n{row.what}: {share:.1%} of what it could do at full batches; tritonserver {theirs:.1%}.")
    return lines


def cnn(run: Run) -> list[str]:
    """Served, beside the session called in loops by hand, at the best of their settings."""
    folder = run.folder("cnn")
    model = write_repository(folder / "repository", CNN)

    def by_hand(session: Any, loops: int, batch: int, seconds: float) -> Figures:
        items = np.full((batch, *CNN.shape), 0.5, np.float32)
        start = time.perf_counter()

        def loop(_: int) -> int:
            count = 0
            while time.perf_counter() - start < seconds:
                session.run(None, {"x": items})
                count += batch
            return count

        with ThreadPoolExecutor(loops) as pool:
            count = sum(pool.map(loop, range(loops)))
        return Figures(count / (time.perf_counter() - start), 0, 0)

    sessions = {threads: _session(model, threads) for threads in (1, 2)}
    settings = [(threads, loops, batch) for threads, loops in ((1, 1), (1, 2), (2, 1)) for batch in (1, 2, 4, 8)]
    threads, loops, batch = max(settings, key=lambda one: by_hand(sessions[one[0]], one[1], one[2], 1.5).rate)
    with serving(folder / "repository", folder / "log") as server:
        load = loads(run, folder, CNN)["HTTP"]
        row = interleave(
            "cnn, HTTP, 16 clients",
            lambda: load(server, 16),
            lambda: by_hand(sessions[threads], loops, batch, run.seconds),
            run.rounds,
        )
    return table([row], f"by hand, {loops} loops, {threads} threads, batch {batch}")


def overloaded(run: Run) -> list[str]:
    """Twice what the accelerator can do, open loop, with a deadline of 100 ms in each request."""
    folder = run.folder("overload")
    model, deadline_ms = SLOW_ACCELERATOR, 100
    body, length = clients.infer_body(model, f'"timeout":{deadline_ms * 1000}')
    request = overload.http_request(f"/v2/models/{model.name}/infer", body, length)
    script = clients.http_script(folder / "peak.lua", *clients.infer_body(model))
    lines = [
        "| | peak /s | offered /s | goodput /s | of peak | refused, p50 ms | late | memory MiB, before and after |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    with both(folder, model) as (ours, theirs):
        for name, server, pid in (("tutti", ours, ours.process.pid), (TRITON, theirs, theirs.pid)):
            url = f"http://{server.http}/v2/models/{model.name}/infer"
            peak = median([clients.wrk(url, script, 256, run.seconds) for _ in range(3)]).rate
            before = _memory(pid)
            runs = [
                overload.run(server.http, request, 2 * peak, run.seconds, deadline_ms, seed)
                for seed in range(run.rounds)
            ]
            goodput = statistics.median(one.goodput for one in runs)
            refused = sum(len(one.refused) for one in runs)
            head = f"| {name} | {peak:,.0f} | {runs[0].offered:,.0f} | {goodput:,.0f} | **{goodput / peak:.0%}**"
            shown = f"{refused}, {statistics.median(one.refusal_p50_ms for one in runs):.2f}" if refused else "none"
            late = sum(len(one.late) + one.lost for one in runs)
            lines.append(f"{head} | {shown} | {late} | {before:.0f}, {_memory(pid):.0f} |")
    return lines


def _memory(pid: int) -> float:
    process = psutil.Process(pid)
    return float(sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))) / 2**20


def clips(run: Run) -> list[str]:
    """Clips of 1 to 30 s in buckets, beside each length alone."""
    folder = run.folder("clips")
    write_repository(folder / "repository", CLIPS, CLIPS_ALONE)
    with serving(folder / "repository", folder / "log") as server:
        bucketed, alone = (
            partial(
                clients.wrk,
                f"http://{server.http}/v2/models/{model.name}/infer",
                clients.clips_script(folder / f"{model.name}.lua"),
                64,
                run.seconds,
            )
            for model in (CLIPS, CLIPS_ALONE)
        )
        row = interleave("clips of 1 to 30 s, 64 clients", bucketed, alone, run.rounds)
    return table([row], "unbatched", ours="bucketed")


def ray(run: Run) -> list[str]:
    """One cluster at a time: they would take each other's cores. Ray Serve as it comes, and tuned."""
    folder = run.folder("ray")
    model = write_repository(folder / "repository", MLP)
    body, header_length = clients.infer_body()
    script = clients.http_script(folder / "ray.lua", body, header_length)
    plain_script = clients.http_script(folder / "plain.lua", body[header_length:], None)
    path = "/v2/models/mlp/infer"
    counts = (64, 256)
    # Tuned it leaves some of 256 clients without an answer for seconds: a rate of those that had one would say little.
    plain: dict[tuple[bool, int], list[tuple[Figures, Figures]]] = {(True, 64): [], (False, 64): [], (False, 256): []}
    triton: list[tuple[Figures, Figures]] = []
    for number in range(run.rounds):
        with serving(folder / "repository", folder / f"gateway-{number}.log", "--ray") as ours:
            clients.wrk(f"http://{ours.http}{path}", script, 64, run.seconds)
            gateway = {count: clients.wrk(f"http://{ours.http}{path}", script, count, run.seconds) for count in counts}
        for is_tuned in (True, False):
            with plain_ray_serve(model, folder / f"plain-{number}.log", is_tuned) as url:
                clients.wrk(url, plain_script, 64, run.seconds)
                for count in [count for tuned, count in plain if tuned == is_tuned]:
                    served = clients.wrk(url, plain_script, count, run.seconds)
                    plain[is_tuned, count].append((gateway[count], served))
        with (
            tempfile.TemporaryDirectory(dir=folder) as own,
            tritonserver.running(folder / "repository", Path(own)) as theirs,
        ):
            clients.wrk(f"http://{theirs.http}{path}", script, 256, run.seconds)
            triton.append((gateway[256], clients.wrk(f"http://{theirs.http}{path}", script, 256, run.seconds)))
    rows = [
        compared(f"{count} clients, beside {_RAY_SERVE[is_tuned]}", pairs) for (is_tuned, count), pairs in plain.items()
    ]
    beside = compared("HTTP through the gateway, 256 clients", triton)
    return [*table(rows, "Ray Serve"), "", *table([beside], f"{TRITON}, one process")]


_RAY_SERVE = {False: "Ray Serve", True: "Ray Serve, tuned"}


@contextmanager
def plain_ray_serve(model: Path, log: Path, is_tuned: bool) -> Iterator[str]:
    """Its URL. Tuned: optimized for throughput, and asked at its replica's own port, which no proxy stands before."""
    proxy_port, own_port = free_ports(2)
    tuning = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(own_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(own_port + 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }
    with log.open("wb") as file:
        command = [sys.executable, "-m", "benchmarks.plain_ray_serve", str(model), str(proxy_port)]
        environment = {**os.environ, **(tuning if is_tuned else {})}
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=environment)
        url = f"http://127.0.0.1:{own_port if is_tuned else proxy_port}/"
        try:
            wait_until_ready(process, url + "-/ready", log)
            yield url
        finally:
            family = psutil.Process(process.pid).children(recursive=True)
            stop(process)
            _, alive = psutil.wait_procs(family, timeout=10)
            for one in alive:
                one.kill()


def lead(run: Run) -> list[str]:
    """Every server in turn, each round anew: one at a time has the cores. Draws what README begins with."""
    from benchmarks.picture import draw_lead

    peers.require()
    folder = run.folder("lead")
    model = write_repository(folder / "repository", MLP)
    body, length = clients.infer_body(MLP)
    script, raw = clients.http_script(folder / "infer.lua", body, length), body[length:]
    path = "/v2/models/mlp/infer"
    found: dict[str, list[Figures]] = {}

    def measure(name: str, url: str, script: Path) -> None:
        clients.wrk(url, script, 64, run.seconds)
        found.setdefault(name, []).append(clients.wrk(url, script, 64, run.seconds))

    for number in range(run.rounds):
        with serving(folder / "repository", folder / "tutti.log") as ours:
            measure("tutti", f"http://{ours.http}{path}", script)
        with (
            tempfile.TemporaryDirectory(dir=folder) as own,
            tritonserver.running(folder / "repository", Path(own)) as theirs,
        ):
            measure(TRITON, f"http://{theirs.http}{path}", script)
        for peer in peers.PEERS:
            body_of = clients.http_script(folder / f"{peer.name}.lua", peer.body, None, peer.content_type)
            with peers.running(peer, model, folder / f"{peer.name}.log") as url:
                measure(peer.name, url, body_of)
        for is_tuned, name in _RAY_SERVE.items():
            with plain_ray_serve(model, folder / f"plain-{number}.log", is_tuned) as url:
                measure(name, url, clients.http_script(folder / "plain.lua", raw, None))
    medians = {name: median(figures) for name, figures in found.items()}
    draw_lead(medians, RESULTS / "lead.svg")
    lines = ["| | requests/s | tutti makes | p50 / p99 ms |", "|---|---|---|---|"]
    for name, one in medians.items():
        times = medians["tutti"].rate / one.rate
        lines.append(f"| {name} | {one.rate:,.0f} | **{times:.1f}** times | {one.p50_ms:.2f} / {one.p99_ms:.2f} |")
    return [*lines, "", "![Requests a second of each](lead.svg)"]


def first_inference(run: Run) -> list[str]:
    """Seconds from the start of the process to the ensemble's first answer."""
    item = load_items()[0]
    sample = plain_sample(ROOT / "model_repository", run.folder("cold") / "repository")

    def ours() -> float:
        started = time.monotonic()
        with serving(sample, run.scratch / "cold.log") as served:
            Client("http", served.http).infer("content_intelligence", item.inputs())
            return time.monotonic() - started

    def theirs() -> float:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, tritonserver.running(sample, Path(folder)) as running:
            Client("http", running.http).infer("content_intelligence", item.inputs())
            return time.monotonic() - started

    pairs = [(ours(), theirs()) for _ in range(run.rounds)]
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    return [f"- {name}: {seconds:.2f} s" for name, seconds in zip(("tutti", TRITON), medians, strict=True)]


def perf_analyzer(run: Run) -> list[str]:
    """NVIDIA's load client, for the record: it takes as much of the machine as a fast server, and lowers both sides."""
    command = os.environ.get("TUTTI_PERF_ANALYZER")
    if not command:
        return ["Not measured: TUTTI_PERF_ANALYZER does not name the program."]
    folder = run.folder("perf-analyzer")
    rows = []
    with both(folder, MLP) as (ours, theirs):
        for protocol in ("http", "grpc"):

            def load(server: Any, protocol: str = protocol) -> Figures:
                return clients.perf_analyzer(command, protocol, getattr(server, protocol), 16)

            what = f"mlp, {protocol}, 16 clients"
            rows.append(interleave(what, partial(load, ours), partial(load, theirs), max(3, run.rounds - 2)))
    return table(rows, TRITON)


def picture(run: Run) -> list[str]:
    """Latency against throughput from 1 to 128 clients, on both protocols."""
    from benchmarks.picture import draw

    folder = run.folder("picture")
    curves: dict[str, list[Figures]] = {}
    with both(folder, MLP) as (ours, theirs):
        short = Run(run.scratch, run.rounds, max(2, run.seconds // 2))
        for protocol, load in loads(short, folder, MLP).items():
            for count in (1, 4, 16, 64, 128):
                row = interleave("", partial(load, ours, count), partial(load, theirs, count), 3)
                curves.setdefault(f"tutti, {protocol}", []).append(row.ours)
                curves.setdefault(f"{TRITON}, {protocol}", []).append(row.theirs)
    draw(curves, RESULTS / "latency.svg")
    return ["![Latency against throughput, 1 to 128 clients](latency.svg)"]


def ensembles(run: Run) -> list[str]:
    """Chains and branches beside their slowest step alone, and beside tritonserver."""
    folder = run.folder("ensembles")
    root = graphs.write(folder / "repository")
    alone: list[Row] = []
    beside: list[Row] = []
    died: list[str] = []
    with serving(root, folder / "tutti.log") as ours:
        step = loads(run, folder, graphs.STEP)
        for graph in (graphs.CHAIN_3, graphs.CHAIN_6, graphs.FAN):
            load = loads(run, folder, graph)
            for protocol in ("HTTP", "gRPC"):
                what = f"{graph.name}, {protocol}"
                graph_load, step_load = load[protocol], step[protocol]
                for count in (1, 64):
                    loaded, single = partial(graph_load, ours, count), partial(step_load, ours, count)
                    alone.append(interleave(f"{what}, {count} clients", loaded, single, run.rounds))
                own = Path(tempfile.mkdtemp(dir=folder))
                with tritonserver.running(root, own) as theirs:
                    loaded, other = partial(graph_load, ours, 64), partial(graph_load, theirs, 64)
                    try:
                        beside.append(interleave(f"{what}, 64 clients", loaded, other, run.rounds))
                    except RuntimeError as error:
                        died.append(f"\n{what}, 64 clients: {TRITON} died under the load ({error}).")
    lines = table(alone, "its slowest step alone")
    for row, steps in ((alone[0], 2), (alone[4], 5)):
        added_us = (row.ours.p50_ms - row.theirs.p50_ms) / steps * 1e3
        lines.append(f"\n{row.what}: {added_us:.0f} us for each added step.")
    return [*lines, "", *table(beside, TRITON), *died]


def gate(run: Run) -> list[str]:
    """One row in ten goes on to a step that costs ten times as much."""
    folder = run.folder("gate")
    root = graphs.write(folder / "repository")
    body, length = clients.infer_body(graphs.GATED)
    stays, passes = (body[:length] + np.full(graphs.GATED.shape, x, np.float32).tobytes() for x in (0.0, 1.0))
    script = clients.mixed_script(folder / "gate.lua", stays, passes, length, bad_in_100=10)
    with serving(root, folder / "tutti.log") as server:
        gated, ungated = (
            partial(clients.wrk, f"http://{server.http}/v2/models/{graph.name}/infer", script, 64, run.seconds)
            for graph in (graphs.GATED, graphs.UNGATED)
        )
        row = interleave("64 clients, HTTP", gated, ungated, run.rounds)
    return table([row], "every row", ours="one row in ten")


def shed(run: Run) -> list[str]:
    """One and a half times what the whole graph can do, open loop, with a deadline in each request."""
    folder = run.folder("shed")
    root = graphs.write(folder / "repository")
    deadline_ms = 400
    body, length = clients.infer_body(graphs.SHED, f'"timeout":{deadline_ms * 1000}')
    script = clients.http_script(folder / "peak.lua", *clients.infer_body(graphs.UNSHED))
    lines = ["| | capacity /s | offered /s | answered in time | late or refused |", "|---|---|---|---|---|"]

    def measure(server: Any, what: str, wanted: dict[str, BenchModel]) -> None:
        url = f"http://{server.http}/v2/models/{graphs.UNSHED.name}/infer"
        peak = median([clients.wrk(url, script, 192, run.seconds) for _ in range(3)]).rate
        for name, graph in wanted.items():
            request = overload.http_request(f"/v2/models/{graph.name}/infer", body, length)
            runs = [
                overload.run(server.http, request, 1.5 * peak, 2 * run.seconds, deadline_ms, seed)
                for seed in range(run.rounds)
            ]
            shares = [one.goodput / one.offered for one in runs]
            rest = sum(len(one.late) + len(one.refused) + one.lost for one in runs)
            lines.append(
                f"| {what}{name} | {peak:,.0f} | {runs[0].offered:,.0f} | **{statistics.median(shares):.0%}** "
                f"({min(shares):.0%} to {max(shares):.0%}) | {rest} |"
            )

    with serving(root, folder / "tutti.log") as server:
        measure(
            server,
            "tutti, the second step is ",
            {"optional": graphs.SHED, "not: what is refused is refused in time": graphs.UNSHED},
        )
    with tritonserver.running(root, folder) as theirs:
        measure(theirs, f"{TRITON}, which sheds and refuses nothing", {"": graphs.UNSHED})
    return lines


SECTIONS: dict[str, tuple[str, Callable[[Run], list[str]]]] = {
    "lead": ("A tiny model over HTTP, 64 clients, beside other servers at their best settings", lead),
    "tiny": (f"A tiny model, beside {TRITON} 2.51 (its python-based onnxruntime backend)", tiny),
    "picture": ("The same, drawn", picture),
    "malformed": ("One request in a hundred malformed", malformed),
    "accelerator": ("An emulated accelerator: a python model that sleeps 2 ms + 0.02 ms a row", accelerator),
    "cnn": ("A model that keeps the processor busy, beside onnxruntime called by hand", cnn),
    "large": ("Tensors of 600 kB (image) and 2 MB (audio)", large),
    "overload": ("Overload: twice the capacity, open loop, deadlines of 100 ms", overloaded),
    "clips": ("Audio of mixed lengths, on the emulated accelerator", clips),
    "perf_analyzer": ("perf_analyzer as the client, for the record", perf_analyzer),
    "ray": ("On Ray, beside a plain Ray Serve deployment, as it comes and tuned", ray),
    "ensembles": (f"Ensembles of small models, beside their slowest step and beside {TRITON}", ensembles),
    "gate": ("A gate that one row in ten passes, before a step that costs ten times as much", gate),
    "shed": ("One and a half times what a graph can do, deadlines of 400 ms", shed),
    "cold": ("From process start to the sample ensemble's first answer", first_inference),
}


def table(rows: Sequence[Row], theirs: str, ours: str = "tutti") -> list[str]:
    lines = [f"| | {ours}, /s | {theirs}, /s | ratio (pairs) | {ours} p50 / p99 ms | {theirs} p50 / p99 ms |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        a, b = row.ours, row.theirs
        latencies = f"{a.p50_ms:.2f} / {a.p99_ms:.2f} | {b.p50_ms:.2f} / {b.p99_ms:.2f}"
        ratio = f"**{row.ratio:.2f}** ({row.least:.2f} to {row.greatest:.2f})"
        lines.append(f"| {row.what} | {a.rate:,.0f} | {b.rate:,.0f} | {ratio} | {latencies} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--only", choices=SECTIONS, action="append")
    options = parser.parse_args()
    clients.require_tools()
    path = RESULTS / "results.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if options.only and path.exists() else {}
    with tempfile.TemporaryDirectory(prefix="tutti-bench-") as folder:
        run = Run(Path(folder), options.rounds, options.seconds)
        for name in options.only or SECTIONS:
            title, measure = SECTIONS[name]
            print(f"## {title}", flush=True)
            lines = _measured(measure, run)
            print("\n".join(lines), flush=True)
            kept[name] = {
                "title": title,
                "date": datetime.now(UTC).date().isoformat(),
                "commit": commit(),
                "hardware": hardware(),
                "rounds": options.rounds,
                "seconds": options.seconds,
                "lines": lines,
            }
            write(kept)
    return 0


def _measured(measure: Callable[[Run], list[str]], run: Run) -> list[str]:
    """A part's lines. It begins anew when a server dies under it, as tritonserver does now and then."""
    for _ in range(2):
        try:
            return measure(run)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            print(f"begins anew: {error}", flush=True)
    return measure(run)


def write(sections: dict[str, Any]) -> None:
    """results.json as it is, and results.md from it."""
    (RESULTS / "results.json").write_text(json.dumps(sections, indent=1) + "\n")
    lines = [
        "# Results",
        "",
        "`make bench` measures all of this, `.venv/bin/python -m benchmarks --only NAME` one part. Both sides of a",
        "line are measured in turn on one machine; figures are medians, ratios also show the least and the greatest",
        "pair. Clients are wrk (HTTP) and h2load (gRPC, whose latencies are its mean and maximum), one thread each, on",
        "the same cores. Models are in benchmarks/models.py; the tiny one is three dense layers, [1, 384] FP32.",
    ]
    for name in SECTIONS:
        if name in sections:
            one = sections[name]
            lines += ["", f"## {one['title']}", ""]
            lines += [
                f"`{name}`, {one['date']}, commit {one['commit']}, {one['rounds']} rounds of {one['seconds']} s on "
            ]
            lines[-1] += f"{one['hardware']}"
            lines += ["", *one["lines"]]
    (RESULTS / "results.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
