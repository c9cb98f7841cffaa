"""Real runs under Locust, in processes of their own: against a server whose behaviour is known, and against tutti."""

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml

from tests.browser import look, needs_browser, unreadable
from tests.loadtest.test_pure import given, seen_by
from tests.serving import serving
from tutti.loadtest import cli, report, runner, search, slo
from tutti.loadtest.process import free_ports, stop
from tutti.loadtest.slo import Verdict

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may keep the processor from a generator: what it has seen is looked at all the same."""
    monkeypatch.setattr(slo, "MOST_LATE", 0.5)
    monkeypatch.setattr(slo, "MOST_CPU", 100.0)


@contextmanager
def fake(*flags: str) -> Iterator[dict[str, str]]:
    """A server that does as it is told; addresses by protocol."""
    http, grpc = free_ports(2)
    command = [sys.executable, "-m", "tests.loadtest.fake_server", str(http), str(grpc), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield {"http": f"127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"}
    finally:
        stop(process)
        process.stdout.close()  # type: ignore[union-attr]


def write(folder: Path, **more: Any) -> Path:
    file = folder / "s.yaml"
    given = {"payloads": [{"model": "fake"}], "stages": [{"seconds": 4, "rate": 150}], "warmup_s": 1, **more}
    file.write_text(yaml.safe_dump(given))
    return file


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# A run has been made and judged. On a machine that others keep busy it may be INVALID, and have counted all the same.
JUDGED = (0, 2, 3)


def load(arguments: list[str]) -> int:
    """The command's exit status, of a run in time: again where it is INVALID, as on a machine that is busy now."""
    for _ in range(5):
        status = cli.main(arguments)
        if status != 2:
            break
    return status


@pytest.mark.parametrize("protocol", ["http", "grpc", "grpc-stream"])
def test_a_stall_is_seen_as_clients_would_see_it(protocol: str, tmp_path: Path) -> None:
    """A second in which nothing is answered, of four: who was due then waits, up to a second, and is counted so."""
    file = write(
        tmp_path,
        arrivals={"process": "constant"},
        stages=[{"seconds": 4, "rate": 100}],
        warmup_s=0,
        slo={"p99_ms": 200},
    )
    with fake("--stall-every-s", "4", "--stall-s", "1") as urls:
        done = ["run", str(file), "--protocol", protocol, "--url", urls[protocol.removesuffix("-stream")]]
        assert load([*done, "--output", str(tmp_path / "out")]) == 1, "one in four was slow: the goal is missed"
    said = json.loads((tmp_path / "out" / "report.json").read_text())
    assert said["verdict"] == "FAIL"
    assert said["requests"] == 400
    assert said["errors"] == 0
    assert 0.7e3 < said["latency_ms"]["p99"] < 1.2e3
    assert said["latency_ms"]["p50"] < 100
    table = pyarrow.parquet.read_table(tmp_path / "out" / "requests.0.parquet")
    assert len(table) == 400
    took = table["done_s"].to_numpy() - table["scheduled_s"].to_numpy()
    waited = int((took > 0.5).sum())
    assert 30 <= waited <= 70, "half of those that were due in the stalled second"


def test_errors_are_counted_and_four_workers_send_what_one_would(tmp_path: Path) -> None:
    file = write(tmp_path, slo={"error_rate": 0.5}, seed=7, stages=[{"seconds": 2, "rate": 150}], warmup_s=0)
    schedules = []
    with fake("--errors", "0.1") as urls:
        for processes in (1, 4):
            out = tmp_path / f"out{processes}"
            command = ["run", str(file), "--url", urls["http"], "--processes", str(processes), "--output", str(out)]
            assert cli.main(command) in (0, 2)
            said = json.loads((out / "report.json").read_text())
            assert said["error_texts"].keys() == {"HTTP 503"}
            assert said["error_rate"] == pytest.approx(0.1, abs=0.01)
            files = sorted(out.glob("requests.*.parquet"))
            assert len(files) == processes
            due = sorted(due for one in files for due in pyarrow.parquet.read_table(one)["scheduled_s"].to_pylist())
            schedules.append(due)
    assert schedules[0] == schedules[1]


def test_streams_and_trace_replays(tmp_path: Path, repository: Any) -> None:
    repository.add_onnx()
    file = write(tmp_path, payloads=[{"model": "add_one", "rows": 2}], stages=[{"seconds": 2, "rate": 40}])
    with serving(repository.root, tmp_path / "log") as served:
        first = tmp_path / "first"
        base = ["--protocol", "grpc-stream", "--url", served.grpc, "--metrics", served.metrics]
        assert cli.main(["run", str(file), *base, "--output", str(first)]) in JUDGED
        said = json.loads((first / "report.json").read_text())
        assert said["server"], "its metrics were read"
        again = tmp_path / "again"
        raw = str(first / "requests.0.parquet")
        assert cli.main(["replay", raw, str(file), *base, "--speed", "2", "--output", str(again)]) in JUDGED
    both = [pyarrow.parquet.read_table(one / "requests.0.parquet")["scheduled_s"].to_numpy() for one in (first, again)]
    assert both[1] * 2 == pytest.approx(both[0] - both[0][0])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_inputs_in_shared_memory(protocol: str, tmp_path: Path, repository: Any) -> None:
    repository.add_onnx()
    target = {"protocol": protocol, "shared_memory": True}
    file = write(tmp_path, payloads=[{"model": "add_one"}], stages=[{"seconds": 2, "rate": 40}], target=target)
    with serving(repository.root, tmp_path / "log", "--allow-client-shm") as served:
        url = served.http if protocol == "http" else served.grpc
        assert cli.main(["run", str(file), "--url", url, "--output", str(tmp_path / "out")]) in JUDGED
    said = json.loads((tmp_path / "out" / "report.json").read_text())
    assert said["errors"] == 0
    assert said["requests"] > 40


def test_servers_with_keys_are_shown_one_which_no_report_has(
    tmp_path: Path, repository: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    repository.add_onnx()
    keys, key = tmp_path / "keys", "kept-to-itself-4711"
    keys.write_text(f"# of the load test\n{key}\nof-others\n")
    changes = {"payloads": [{"model": "add_one"}], "stages": [{"seconds": 1, "rate": 50}], "warmup_s": 0}
    file = write(tmp_path, **changes)
    with serving(repository.root, tmp_path / "log", "--api-key-file", str(keys), is_guarded=True) as served:
        for protocol, url in (("http", served.http), ("grpc-stream", served.grpc)):
            command = ["run", str(file), "--protocol", protocol, "--url", url, "--metrics", served.metrics]
            out = tmp_path / "out" / protocol
            assert cli.main(command) == 2
            assert f"{url} refuses (" in (said := capfd.readouterr().err) and "--api-key-file" in said
            assert cli.main([*command, "--api-key-file", str(keys), "--output", str(out)]) in JUDGED
            told = json.loads((out / "report.json").read_text())
            assert told["requests"] > 0 and told["errors"] == 0, told["error_texts"]
    assert key not in "".join(capfd.readouterr())
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left and not [path for path in left if key.encode() in path.read_bytes()]


def test_a_generator_that_cannot_keep_up_says_so(tmp_path: Path) -> None:
    """Two connections to a server that takes its time: most requests could not be sent when they were due."""
    target = {"connections": 2}
    file = write(tmp_path, target=target, stages=[{"seconds": 1, "rate": 100}], warmup_s=0, slo={"error_rate": 1.0})
    with fake("--delay-ms", "100") as urls:
        assert cli.main(["run", str(file), "--url", urls["http"], "--output", str(tmp_path / "out")]) == 2
    said = json.loads((tmp_path / "out" / "report.json").read_text())
    assert said["verdict"] == "INVALID"
    assert "the generator was the bottleneck" in said["reasons"][0]


def test_workers_elsewhere_and_one_that_is_lost(tmp_path: Path) -> None:
    """They know nothing but their master, which hands them the scenario; without one of them a run says nothing."""
    for is_lost in (False, True):
        # The one that is lost must have something left to do.
        file = write(tmp_path, stages=[{"seconds": 8 if is_lost else 3, "rate": 100}], warmup_s=0.5)
        (port,) = free_ports(1)
        out = tmp_path / f"out{is_lost}"
        command = [
            sys.executable, "-m", "tutti.loadtest.cli", "run", str(file), "--protocol", "grpc", "--output", str(out),
        ]  # fmt: skip
        locust = [
            "--master",
            "--master-bind-host",
            "127.0.0.1",
            "--master-bind-port",
            str(port),
            "--expect-workers",
            "2",
        ]
        with fake("--errors", "0.005") as urls:
            master = subprocess.Popen(
                [*command, "--url", urls["grpc"], "--", *locust],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            workers = []
            for number in range(2):
                raw = tmp_path / f"raw{number}{is_lost}"
                own = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--worker"]
                # The first by our own command.
                one = own if number else [sys.executable, "-m", "tutti.loadtest.cli", "worker"]
                one = [*one, "--raw", str(raw), "--master-host", "127.0.0.1", "--master-port", str(port)]
                workers.append(subprocess.Popen(one, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            if is_lost:
                wait_for(lambda: any((tmp_path / f"raw{number}True" / "job.1.json").exists() for number in range(2)))
                workers[1].kill()
            said, _ = master.communicate(timeout=100)
            for worker in workers:
                worker.wait(30)
        if is_lost:
            assert master.returncode == 2, said.decode()
            assert b"was lost" in said
        else:
            assert master.returncode in JUDGED, said.decode()
            assert json.loads((out / "report.json").read_text())["requests"] == pytest.approx(300, rel=0.2)
            assert len(list(tmp_path.glob("raw*False/requests.*.parquet"))) == 2


def test_locusts_page_shows_the_run(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    file = write(tmp_path, stages=[{"seconds": 6, "rate": 100}])
    with fake("--errors", "0.1") as urls:
        command = [sys.executable, "-m", "tutti.loadtest.cli", "run", str(file), "--url", urls["http"], "--web"]
        run = subprocess.Popen([*command, "--", "--web-port", str(port)], cwd=ROOT, stdout=subprocess.DEVNULL)
        seen: list[Any] = []

        def has_errors() -> bool:
            address = f"http://127.0.0.1:{port}/stats/requests"
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
                seen.append(json.load(answer))
            return bool(seen and seen[-1]["errors"])

        wait_for(has_errors)
        assert run.wait(60) in (1, 2), "the page is there as long as the run is"
    assert seen[-1]["errors"][0]["error"] == "HTTP 503"
    assert {one["name"] for one in seen[-1]["stats"]} == {"fake", "Aggregated"}


def test_saturation_and_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """200 a second are far from too many and 400 far too many; 300 may be either."""
    file = write(tmp_path, slo={"p99_ms": 250}, warmup_s=0.5)
    with fake("--rate", "300") as urls, fake("--delay-ms", "20") as slower:
        out = tmp_path / "out"
        command = ["saturate", str(file), "--url", urls["http"], "--start", "200", "--seconds", "2", "--within", "0.35"]
        assert load([*command, "--output", str(out)]) == 0
        bounds = json.loads((out / "saturate.json").read_text())
        assert 199 < bounds["low"] < 310 < 1.4 * bounds["high"]
        command = ["compare", urls["http"], slower["http"], str(write(tmp_path, stages=[{"seconds": 1, "rate": 30}]))]
        assert load([*command, "--rounds", "5", "--seconds", "1"]) == 1
        assert "FAIL\n  different: B takes" in capsys.readouterr().out
        for name, server in (("before", urls), ("after", slower)):
            assert load(["run", str(file), "--url", server["http"], "--output", str(tmp_path / name), *LITTLE]) == 0
        assert load(["compare", str(tmp_path / "before"), str(tmp_path / "after")]) == 1
    assert "FAIL\n  different: B takes" in capsys.readouterr().out


# Of a run: enough to be certain of a hundredth.
LITTLE = ("--rate", "200", "--seconds", "4")


def test_outside_the_repository_a_run_that_always_fails_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths are where the person stands, whose folder may hold anything; a minute of errors would say no more."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, stages=[{"seconds": 60, "rate": 50}])
    (tmp_path / "locust.conf").write_text("users = 3\nno such thing\n")
    (tmp_path / "pyproject.toml").write_text("no toml")
    for name in ("locust", "loadtest", "gevent"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the folder of the person was imported from')\n")
    with fake("--errors", "1") as urls:
        began = time.monotonic()
        command = ["run", "s.yaml", "--url", urls["http"], "--output", "rep", "--", "--csv", "own"]
        assert cli.main(command) == 2
        assert time.monotonic() - began < 50
    assert "the first requests have all failed alike, and the run was ended: HTTP 503" in capsys.readouterr().out
    told = json.loads((tmp_path / "rep" / "report.json").read_text())
    assert told["verdict"] == "INVALID"
    assert told["requests"] == told["errors"] == told["error_texts"]["HTTP 503"] < 200
    assert "<p class='verdict INVALID'>" in (tmp_path / "rep" / "report.html").read_text()
    assert (tmp_path / "own_stats.csv").is_file(), "Locust's own files as well"


def test_scenarios_against_a_server_of_their_own(sample_repository: Path, tmp_path: Path) -> None:
    """As make loadtest does, over every model of the sample."""
    models = sorted(
        path.parent.name for path in sample_repository.glob("*/config.pbtxt") if path.parent.name != "moderation_score"
    )
    file = write(
        tmp_path, payloads=[{"model": name, "count": 4} for name in models], stages=[{"seconds": 5, "rate": 30}]
    )
    command = [sys.executable, "-m", "tutti.loadtest.run", str(file), "--repository", str(sample_repository)]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        cwd=ROOT,
    )
    said = json.loads((tmp_path / "out" / "s" / "report.json").read_text())
    assert said["errors"] == 0, (said["error_texts"], done.stdout[-2000:])
    assert done.returncode in JUDGED, done.stdout[-2000:]


def test_a_server_that_does_not_come_up_ends_the_scenarios_with_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tutti.loadtest.run", "steady", "--repository", str(tmp_path / "none")]
    command += ["--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("tutti.loadtest.run: no scenario was run: the server ended with ")
    assert "Traceback" not in done.stderr


def test_locusts_own_users_still_run(sample_repository: Path, tmp_path: Path) -> None:
    """In closed loop: loadtest/closed_loop.py. They take models at random: longer, until each was asked over both."""
    models = {path.parent.name for path in sample_repository.glob("*/config.pbtxt")}
    expected = {(protocol, model) for protocol in ("http", "grpc") for model in models}
    with serving(sample_repository, tmp_path / "log") as served:
        command = [
            sys.executable, "-m", "locust", "-f", "loadtest/closed_loop.py", "--headless", "-u", "4",
            "--http-url", served.http, "--grpc-url", served.grpc, "--json-file", str(tmp_path / "run"),
        ]  # fmt: skip
        for seconds in (4, 12, 36):
            done = subprocess.run(
                [*command, "-t", f"{seconds}s"], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
            )
            assert done.returncode == 0, done.stderr[-3000:]
            rows = json.loads((tmp_path / "run.json").read_text())
            asked = {(row["method"], row["name"]) for row in rows}
            if asked == expected:
                break
    assert asked == expected
    assert all(row["num_failures"] == 0 and row["num_requests"] > 0 for row in rows)


def pages() -> dict[str, str]:
    """One of each kind, with many stages, long names, and large and small numbers."""
    own = given(
        slo={"p99_ms": 2500, "min_goodput": 40}, name="long " * 20,
        stages=[{"seconds": 10, "rate": 50, "name": f"stage with a name {n}"} for n in range(4)],
    )  # fmt: skip
    result = runner.gather(own, [seen_by(100 * (n + 1), str(n)) for n in range(4)])
    second = {**result.seconds[0], "p50_ms": 0.4, "p99_ms": 1234.5}
    result.seconds = [{**second, "second": n, "due": 12_345 * n} for n in range(100)]
    models = {f"model_with_a_long_name_{n}": {"queue_ms": 1e-4 * n, "compute_ms": n, "batch": n} for n in range(7)}
    result.server = [{"at_s": n, "models": models} for n in range(20)]
    bounds = search.Bounds(300.0, 375.0, [(300.0, Verdict.PASS)])
    found = search.difference([10.0, 11, 12], [20.0, 22, 23])
    return {
        "run": report.page(result, "tutti loadtest run " + "x" * 100),
        "refusal": report.refusal(own, ["nothing listens at 127.0.0.1:8000 (Connection refused)"]),
        "saturation": report.saturation(own, Verdict.PASS, ["meets the goal"], bounds, [result] * 5),
        "comparison": report.comparison(own, Verdict.FAIL, ["different"], [[10, 11, 12], [20, 22, 23]], found, result),
    }


@needs_browser
@pytest.mark.parametrize("kind", ["run", "refusal", "saturation", "comparison"])
def test_the_pages_in_a_browser(kind: str, tmp_path: Path) -> None:
    """No wider than its window at 400 and 1280 pixels, with no text over another and none cut off."""
    for width in (1280, 400):
        told = look(pages()[kind], width, tmp_path)
        assert unreadable(told) == {}
        assert told["texts"] > 5 or kind == "refusal"
