"""`tutti top`: from two looks at a server to a table, and the loop in a terminal."""

import argparse
import io
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import Served, engine_over, infer, serving
from tests.terminal import Terminal
from tests.tutti.test_metrics_page import ENSEMBLE
from tutti.app import metric_rates, top, top_table
from tutti.app.cli import main
from tutti.app.metric_rates import ModelRates, NotAServer, Rates, Scrape
from tutti.app.restarts import UNUSABLE
from tutti.app.top import Away
from tutti.core.types import InferRequest, Tensor
from tutti.frontends.v2.metrics_page import Metrics

ALONE = """
# HELP nv_inference_request_success Number of successful inference requests
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="m",version="1"} %d
nv_inference_request_success{model="m",version="2"} 5
nv_inference_request_success{model="idle",version="1"} 7
nv_inference_request_failure{model="m",reason="REJECTED",version="1"} %d
nv_inference_request_failure{model="m",reason="CANCELED",version="1"} 1
nv_inference_request_failure{model="m",reason="OTHER",version="1"} %d
nv_inference_count{model="m",version="1"} %d
nv_inference_exec_count{model="m",version="1"} %d
nv_inference_queue_duration_us{model="m",version="1"} %d
nv_inference_compute_infer_duration_us{model="m",version="1"} %d
nv_inference_request_duration_us{model="m",version="1"} %d
nv_inference_pending_request_count{model="m",version="1"} 3
"""


def page(text: str, time_s: float = 0.0) -> Scrape:
    return metric_rates.parse_page(text, time_s)


def test_rates_are_of_what_happened_between_two_looks() -> None:
    before = page(ALONE % (100, 10, 0, 500, 50, 1000, 9000, 0), 10.0)
    after = page(ALONE % (120, 14, 2, 580, 60, 41_000, 69_000, 5_000_000), 12.0)
    busy, idle = metric_rates.rates(before, after).models
    assert (busy.name, busy.requests, busy.failed, busy.refused, busy.cancelled) == ("m", 10.0, 1.0, 2.0, 0.0)
    assert (busy.in_flight, busy.queued, busy.queue_ms, busy.execution_ms, busy.batch) == (2.5, 3.0, 2.0, 3.0, 8.0)
    assert (busy.p50_ms, busy.late, busy.cache_hits) == (None, None, None)
    assert (idle.name, idle.requests, idle.queue_ms, idle.batch) == ("idle", 0.0, None, None)


def test_what_began_anew_began_at_nothing() -> None:
    before, after = page(ALONE % (100, 0, 0, 0, 0, 0, 0, 0), 0.0), page(ALONE % (4, 0, 0, 0, 0, 0, 0, 0), 2.0)
    assert metric_rates.rates(before, after).requests == 2.0


@pytest.mark.parametrize("seed", range(20))
def test_quantiles_lie_in_the_bucket_of_the_value(seed: int) -> None:
    chosen = random.Random(seed)
    bounds = sorted({chosen.uniform(0.001, 9.0) for _ in range(8)})
    values = sorted(chosen.uniform(0, bounds[-1]) for _ in range(chosen.randrange(1, 200)))
    buckets = {bound: float(sum(value <= bound for value in values)) for bound in [*bounds, float("inf")]}
    for quantile in (0.5, 0.99, 1.0):
        found = metric_rates.quantile_of(buckets, quantile)
        true = values[int(np.ceil(quantile * len(values))) - 1]
        above = next(bound for bound in bounds if bound >= true)
        below = max([0.0, *(bound for bound in bounds if bound < true)])
        assert found is not None and below <= found <= above
    assert metric_rates.quantile_of({1.0: 0.0, float("inf"): 4.0}, 0.5) == 1.0
    assert metric_rates.quantile_of({1.0: 0.0, float("inf"): 0.0}, 0.5) is None


def request(model: str) -> InferRequest:
    return InferRequest(model, {"x": Tensor("x", "FP32", (1, 4), np.zeros((1, 4), np.float32))})


def test_a_servers_own_page_has_all_of_it(repository: Repository) -> None:
    repository.add_onnx()
    repository.add("whole", ENSEMBLE.format(step="add_one"), {})
    with engine_over(repository.root) as engine:
        metrics = Metrics(engine)
        before = page(metrics.render()[0].decode(), 0.0)
        infer(engine, [request("whole") for _ in range(6)])
        rates = metric_rates.rates(before, page(metrics.render()[0].decode(), 2.0))
    models = {model.name: model for model in rates.models}
    assert rates.requests == 3.0, "a step's requests are the ensemble's"
    assert (rates.at_steps.requests, rates.at_steps.failed) == (3.0, 0.0)
    assert "+ 3.00/s, 0 failed, 0 refused at steps: of ensembles, or sent directly" in table(rates)
    assert models["whole"].requests == models["add_one"].requests == 3.0
    step = models["add_one"]
    assert step.is_step and step.is_ready and not models["whole"].is_step
    assert models["whole"].queue_ms is None and models["whole"].execution_ms is not None
    assert step.batch is not None and step.batch >= 1.0
    assert None not in (step.queue_ms, step.execution_ms, step.p50_ms, step.p99_ms, step.queue_p99_ms, step.queued)
    assert [device.name for device in rates.devices] == ["cpu"]


def table(rates: Rates) -> list[str]:
    return top_table.lines(rates, 80, colour=False)


def test_what_is_sent_to_a_step_directly_counts(repository: Repository) -> None:
    repository.add_onnx()
    repository.add("whole", ENSEMBLE.format(step="add_one"), {})
    with engine_over(repository.root) as engine:
        metrics = Metrics(engine)
        looks = [page(metrics.render()[0].decode(), 0.0)]
        for model, time_s in (("add_one", 2.0), ("whole", 4.0)):
            infer(engine, [request(model) for _ in range(6)])
            looks.append(page(metrics.render()[0].decode(), time_s))
    directly = metric_rates.rates(looks[0], looks[1])
    assert (directly.requests, directly.at_steps.requests) == (3.0, 0.0), "no ensemble has answered anything"
    assert table(directly)[0] == "3.00 requests/s, 0 failed, 0 refused"
    assert not any("steps" in line for line in table(directly))
    # An ensemble that answers rarely asks its steps all the while.
    lately = metric_rates.rates(looks[0], looks[1], ["whole"])
    assert (lately.requests, lately.at_steps.requests) == (0.0, 3.0)


STEPS = """
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="whole",version="1"} %d
nv_inference_request_success{model="inner",version="1"} %d
nv_inference_request_success{model="ten",version="1"} %d
nv_inference_request_success{model="alone",version="1"} %d
nv_inference_request_failure{model="ten",reason="OTHER",version="1"} %d
tutti_model_ready{model="ten",version="1"} 1
tutti_ensemble_step{model="whole",step="inner",version="1"} 1
tutti_ensemble_step{model="whole",step="ten",version="1"} 1
tutti_ensemble_step{model="inner",step="ten",version="1"} 1
"""


@pytest.mark.parametrize(
    ("grown", "counted", "at_steps"),
    [
        ((0, 0, 0, 0, 0), (0, 0), (0, 0)),
        ((0, 0, 5, 1, 2), (6, 2), (0, 0)),
        ((0, 3, 5, 0, 2), (3, 0), (5, 2)),
        ((2, 2, 5, 1, 0), (3, 0), (7, 0)),
    ],
)
def test_a_request_of_an_ensemble_counts_once(
    grown: tuple[int, ...], counted: tuple[int, int], at_steps: tuple[int, int]
) -> None:
    rates = metric_rates.rates(page(STEPS % ((0,) * 5), 0.0), page(STEPS % grown, 1.0))
    assert ((rates.requests, rates.failed), (rates.at_steps.requests, rates.at_steps.failed)) == (counted, at_steps)
    assert json.dumps(top_table.as_json(rates))


def test_an_ensemble_is_busy_for_a_while_after_its_answer() -> None:
    """Its step goes on, and it has answered nothing since."""
    texts = [(STEPS % (0, 0, 0, 0, 0), 0.0), (STEPS % (1, 0, 1, 0, 0), 1.0), (STEPS % (1, 0, 9, 0, 0), 2.0)]
    texts += [(STEPS % (1, 0, 9, 0, 0), 60.0), (STEPS % (1, 0, 19, 0, 0), 61.0)]
    lines = shown(Looks(*(page(text, time_s) for text, time_s in texts)), json=True).splitlines()
    told = [json.loads(line) for line in lines]
    assert [(one["requests"], one["at_steps"]["requests"]) for one in told] == [(1, 1), (0, 8), (0, 0), (10, 0)]


def test_a_page_that_does_not_tell_steps_is_said_so() -> None:
    text = ALONE % ((0,) * 8)
    others = metric_rates.rates(page(text, 0.0), page(text, 1.0))
    assert table(others)[1] == "requests of ensembles count again at their steps, which this page does not tell"
    own = text + 'tutti_model_ready{model="m",version="1"} 1\n'
    assert not any("ensembles" in line for line in table(metric_rates.rates(page(own, 0.0), page(own, 1.0))))


def test_pools_and_devices_have_theirs() -> None:
    extra = """
tutti_pool_replicas{pool="gpu"} 2
tutti_pool_wanted_replicas{pool="gpu"} 3
tutti_pool_requests_total{pool="gpu"} %d
tutti_fallback_requests_total{pool="gpu"} %d
nv_gpu_utilization{gpu_uuid="GPU-1"} 0.25
nv_gpu_memory_used_bytes{gpu_uuid="GPU-1"} 1073741824
nv_gpu_memory_total_bytes{gpu_uuid="GPU-1"} 4294967296
"""
    text = ALONE % ((0,) * 8)
    rates = metric_rates.rates(page(text + extra % (0, 0), 0.0), page(text + extra % (10, 4), 2.0))
    shown = "\n".join(top_table.lines(rates, 80, colour=False))
    assert re.search(r"^gpu +2 +3 +5.00 +2.00$", shown, re.MULTILINE)
    assert "gpu GPU-1  25% busy, 1.0 of 4.0 GiB" in shown


def test_statistics_will_do_where_there_is_no_page() -> None:
    def statistics(requests: int) -> str:
        part = {"count": requests, "ns": 2_000_000 * requests}
        stats = dict.fromkeys(("success", "queue", "compute_infer"), part) | {"fail": {"count": 3, "ns": 1}}
        model = {"name": "m", "version": "1", "inference_count": 4 * requests, "execution_count": requests}
        return json.dumps({"model_stats": [{**model, "inference_stats": stats}]})

    looks = [metric_rates.parse_statistics(statistics(count), time_s) for count, time_s in ((10, 0.0), (14, 2.0))]
    model = metric_rates.rates(*looks).models[0]
    assert (model.requests, model.failed, model.queue_ms, model.execution_ms, model.batch) == (2.0, 0.0, 2.0, 2.0, 4.0)


@pytest.mark.parametrize(
    "text", ["", "<html>", "# HELP go_threads x\ngo_threads 3\n", "# TYPE nv_x counter\nnv_x{ 1\n"]
)
def test_what_is_no_servers_page_is_told(text: str) -> None:
    with pytest.raises(NotAServer):
        page(text)
    with pytest.raises(NotAServer):
        metric_rates.parse_statistics(text, 0.0)


def test_numbers_are_five_characters_at_most() -> None:
    chosen = random.Random(1)
    values = [10 ** chosen.uniform(-4, 14) for _ in range(2000)] + [
        9.994,
        9.995,
        99.94,
        99.95,
        99_999.4,
        99_999.5,
        999_499,
    ]
    for value in values:
        text = top_table.number(value)
        size = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1.0)
        assert len(text) <= 5
        assert abs(float(text.rstrip("kMGT")) * size - value) <= max(0.005 * value, 0.006), text


def rates_of(count: int) -> Rates:
    models = [ModelRates(f"model_{index:03}_of_a_long_name", float(index), refused=1.0) for index in range(count)]
    return Rates(1.0, 5.0, 1.0, 0.0, tuple(models))


@pytest.mark.parametrize("width", [1, 20, 40, 60, 80, 100, 132, 200])
@pytest.mark.parametrize("height", [None, 3, 10, 24])
def test_it_fits_the_terminal(width: int, height: int | None) -> None:
    plain = top_table.lines(rates_of(30), width, False, height)
    assert max(map(len, plain)) <= width
    if height is not None:
        assert len(plain) <= max(height, 6)
    coloured = top_table.lines(rates_of(30), width, True, height)
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in coloured] == plain


def test_wider_terminals_show_more() -> None:
    titles = [top_table.lines(rates_of(1), width, False)[1].split() for width in (40, 80, 120)]
    assert titles[0][:3] == ["model", "req/s", "fail/s"] and {"queue", "exec"} <= set(titles[0])
    assert {"ref/s", "queued", "p50", "p99", "batch"} <= set(titles[1])
    assert {"cache", "inside", "queue99", "late/s"} <= set(titles[2])
    assert titles[0] == [title for title in titles[2] if title in titles[0]], "in one order"


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"interval": 1.0, "once": False, "json": False, **changes})


class Looks:
    """What a server says, look by look; the last one interrupts."""

    def __init__(self, *answers: Scrape | Exception) -> None:
        self._answers = list(answers)
        self.pauses: list[float] = []

    def __call__(self) -> Scrape:
        if not self._answers:
            raise KeyboardInterrupt
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def look(requests: int, time_s: float) -> Scrape:
    return page(ALONE % (requests, 0, 0, 0, 0, 0, 0, 0), time_s)


def shown(looks: Looks, **changes: object) -> str:
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        top.watch(looks, options(**changes), out, looks.pauses.append)
    return out.getvalue()


def test_a_server_that_goes_away_is_said_once_and_waited_for() -> None:
    looks = Looks(look(0, 0.0), look(2, 1.0), Away("Connection refused"), Away("Connection refused"), look(1, 5.0))
    text = shown(looks, interval=0.5)
    assert text.count("waiting for the server: Connection refused") == 1
    assert re.findall(r"(\S+) requests/s", text) == ["2.00", "0.25"]
    assert looks.pauses == [0.5] * 5


def test_json_is_a_line_for_each_look() -> None:
    lines = shown(Looks(look(0, 0.0), look(2, 1.0), Away("gone"), look(4, 2.0)), json=True).splitlines()
    told = [json.loads(line) for line in lines]
    assert [one.get("requests") for one in told] == [2.0, None, 2.0]
    assert told[1]["error"] == "gone"
    assert told[0]["models"][0]["name"] == "m"


def test_once_is_one_table() -> None:
    out = io.StringIO()
    assert top.watch(Looks(look(0, 0.0), look(2, 1.0)), options(once=True), out, lambda _: None) == 0
    assert out.getvalue().count("requests/s") == 1
    with pytest.raises(Away):
        top.watch(Looks(look(0, 0.0), Away("gone")), options(once=True), out, lambda _: None)


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The address of something that says one thing to everybody."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.recv(65536)
                    client.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join(timeout=20)


HTML = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>"
GONE = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
CLOSED = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (HTML, "it answers, but not with metrics of an inference server"),
        (GONE, "HTTP 404"),
        (CLOSED, "it wants a key (--api-key-file)"),
        (b"SSH-2.0-OpenSSH\r\n", "what answers speaks no HTTP"),
        (b"", ""),
    ],
)
def test_what_is_no_server_is_told(answer: bytes, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(answer) as address:
        assert main(["top", address]) == UNUSABLE
    told = capsys.readouterr().err
    assert told.startswith(f"tutti top: http://{address}: ") and says in told and "expected the metrics" in told


def test_where_nothing_listens_that_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert main(["top", f"127.0.0.1:{port}", "--once"]) == UNUSABLE
    assert "Connection refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["ftp://x"], ["http://"], ["x y"], ["x:y"], ["x:0"], ["--interval=0"], ["--interval=x"], ["--api-key-file=/no"]],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["top", *arguments])
    assert ended.value.code == UNUSABLE
    assert "expected" in capsys.readouterr().err or arguments[0].startswith("--api")


@contextmanager
def loaded(served: Served) -> Iterator[None]:
    """Requests one after the other, as long as this lasts and the server does."""
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0, 0, 0, 0]}]}).encode()
    url, has_ended = f"http://{served.http}/v2/models/add_one/infer", threading.Event()

    def send() -> None:
        while not has_ended.is_set():
            try:
                urllib.request.urlopen(url, body, timeout=60).read()
            except OSError:
                has_ended.wait(0.05)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def test_a_real_server_is_watched_in_a_terminal(repository: Repository, tmp_path: Path) -> None:
    repository.add_onnx()
    with serving(repository.root, tmp_path / "log") as served, loaded(served):
        command = [sys.executable, "-m", "tutti", "top", served.metrics, "--interval", "0.2"]
        terminal = Terminal(command, TERM="xterm")
        terminal.read_until(r"add_one +[0-9.]*[1-9]")
        command = [sys.executable, "-m", "tutti", "top", served.http, "--once", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        model = json.loads(done.stdout)["models"][0]
        assert model["name"] == "add_one" and model["requests"] > 0 and model["execution_ms"] is not None
        served.process.send_signal(signal.SIGTERM)
        terminal.read_until("waiting for the server: ")
        terminal.press("\x03")
        assert terminal.end() == 0
    assert terminal.text.startswith("\x1b[?1049h\x1b[?25l")
    end = terminal.text.rpartition("\x1b[?25h\x1b[?1049l")[2]
    assert "add_one" in end and "\x1b[H" not in end, "the last table stays on the terminal as it was"
    assert "\x1b[1m" in terminal.text and "Traceback" not in terminal.text


def test_tables_may_be_cut_off_by_who_reads(repository: Repository, tmp_path: Path) -> None:
    with serving(repository.root, tmp_path / "log") as served:
        command = f"{sys.executable} -m tutti top {served.metrics} --interval 0.1 | head -1"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert "requests/s" in done.stdout
    assert done.stderr == ""


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    def first(term: str, no_color: str) -> str:
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("NO_COLOR", no_color)
        out = Tty()
        with pytest.raises(KeyboardInterrupt):
            top.watch(Looks(look(0, 0.0), look(2, 1.0)), options(), out, lambda _: None)
        return out.getvalue()

    assert "\x1b[1m" in first("xterm", "")
    assert "\x1b[1m" not in first("xterm", "1")
    assert "\x1b" not in first("dumb", "")
