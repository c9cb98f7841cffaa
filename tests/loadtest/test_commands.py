"""What a person is told: help without extras, usage, wrong files and flags, servers that are not there."""

import http.server
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tutti.loadtest import cli, commands, names, server
from tutti.loadtest.errors import RunError
from tutti.loadtest.process import free_ports
from tutti.loadtest.sampler import Sampler
from tutti.loadtest.scenario import Scenario, Target

ROOT = Path(__file__).parents[2]
SCENARIO = "payloads: [{model: m}]\nstages: [{seconds: 1, rate: 10}]\nslo: {p99_ms: 100}\n"
COMMANDS = ("run", "saturate", "compare", "replay", "worker")
WITHOUT_EXTRAS = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "locust yaml pydantic pyarrow hpack gevent geventhttpclient numpy".split():
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from tutti.loadtest import cli
for command in ([], *([name] for name in sys.argv[1:])):
    try:
        cli.main([*command, "--help"])
    except SystemExit as status:
        assert status.code == 0
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own, where a person stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(SCENARIO)
    return tmp_path


def status_of(arguments: list[str]) -> int:
    """Usage errors end the process, the others are returned."""
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


@contextmanager
def models(answers: dict[str, Any], seen: Callable[[Mapping[str, str]], None] = lambda _: None) -> Iterator[str]:
    """The address of a server that answers by path, and 404 as another kind of server would; `seen` gets headers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen({name.lower(): value for name, value in self.headers.items()})
            status, told = answers.get(self.path, (404, "no such page"))
            body = told.encode() if isinstance(told, str) else json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the library's names

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{served.server_address[1]}"
        finally:
            served.shutdown()
            thread.join()


def test_help_needs_no_extra() -> None:
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"usage: tutti loadtest {name} " in done.stdout
    assert "steady" in done.stdout, "the scenarios that come along"


@pytest.mark.parametrize("command", ["run", "saturate", "replay x.csv", "compare a:1 b:2"])
def test_a_wrong_flag_shows_the_commands_own_usage(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = command.split()[0]
    assert status_of([*command.split(), "steady", "--outptu", "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"usage: tutti loadtest {name} ")
    assert said.endswith("unrecognized arguments: --outptu x; did you mean '--output'?\n")


def test_without_a_scenario_those_that_come_along_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(["run"]) == 2
    said = capsys.readouterr().err
    assert all(f"  {name} " in said for name in names.packaged())
    assert status_of(["steady"]) == 2
    assert "did you mean 'run steady'?" in capsys.readouterr().err


def test_a_scenario_that_comes_along_is_known_by_its_name(here: Path) -> None:
    assert names.scenario("steady") == names.PACKAGED / "steady.yaml"
    (here / "steady").write_text(SCENARIO)
    assert names.scenario("steady") == Path("steady"), "a person's own comes first"


@pytest.mark.parametrize(
    ("command", "rate", "seconds", "p99_ms"),
    [
        ("run --model mine", 30, 30, 500),
        ("run steady --model mine --rate 200 --seconds 2 --p99-ms 20", 200, 2, 20),
        ("run s.yaml --model mine --seconds 2", 10, 2, 100),
        ("run recorded.yaml --model mine --rate 7 --seconds 2", 7, 2, None),
    ],
)
def test_a_model_of_ones_own_needs_no_file(
    command: str, rate: int, seconds: int, p99_ms: int | None, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "t.csv").write_text("1\n2\n")
    (here / "recorded.yaml").write_text("payloads: [{model: m}]\narrivals: {trace: t.csv}\n")
    judged: list[Scenario] = []
    monkeypatch.setattr(commands, "_judge", lambda given, _: judged.append(given) or 0)
    assert status_of(command.split()) == 0
    (given,) = judged
    assert [payload.model for payload in given.payloads] == ["mine"]
    assert [(stage.rate, stage.seconds) for stage in given.stages] == [(rate, seconds)]
    assert (given.slo.p99_ms, given.arrivals.trace) == (p99_ms, None)


WRONG = [
    ("rnu s.yaml", "no such command: 'rnu'; did you mean 'run'?"),
    ("run t.yaml", "t.yaml: no such file: expected a scenario in YAML; did you mean 's.yaml'?"),
    ("run stedy", "did you mean 'steady'?"),
    ("run steady.yaml", "did you mean 'steady'?"),
    ("run none/s.yaml", "none/s.yaml: no such file"),
    ("run .", ".: a folder: expected a scenario in YAML, as binary.yaml, idle.yaml, latin.yaml in it"),
    ("run fifo", "fifo: not a regular file"),
    ("run s.yaml/x", "s.yaml/x: no such file"),
    (f"run {'x' * 300}", "File name too long"),
    ("run latin.yaml", "latin.yaml: byte 9 is no UTF-8"),
    ("run binary.yaml", "binary.yaml: no YAML"),
    ("run list.yaml", "expected a mapping with payloads and stages (docs/loadtest.md), got list"),
    ("run s.yaml --output s.yaml", "--output s.yaml: a file: expected a folder"),
    ("run s.yaml --output s.yaml/x", "--output s.yaml/x: a file: expected a folder"),
    ("run s.yaml --url x", "argument --url: expected HOST:PORT, as 127.0.0.1:8000, got 'x'"),
    ("run s.yaml --url https://x:1", "load tests go without TLS"),
    ("run s.yaml --url x:0", "expected a port from 1 to 65535, got '0'"),
    ("run s.yaml --url x:99999", "expected a port from 1 to 65535, got '99999'"),
    ("run s.yaml --url x:8\N{SUPERSCRIPT TWO}", "expected a port"),
    ("run s.yaml --metrics http://x/metrics", "argument --metrics: expected HOST:PORT"),
    ("run s.yaml --protocol htpp", "argument --protocol: invalid choice: 'htpp'"),
    ("run s.yaml --processes 0", "argument --processes: expected a whole number from 1 to 256, got '0'"),
    ("run s.yaml --processes 1e9", "argument --processes"),
    ("run s.yaml --seed -1", "argument --seed: expected"),
    ("run s.yaml other.yaml", "unrecognized arguments: other.yaml"),
    ("saturate s.yaml --start nan", "argument --start: expected a number above 0, got 'nan'"),
    ("saturate s.yaml --start 1e12", "argument --start: expected 1,000,000 requests a second at most"),
    ("saturate s.yaml --within 3", "argument --within: expected a share between 0 and 1"),
    ("saturate open.yaml", "expected slo.p99_ms"),
    ("compare a b s.yaml", "argument A: expected HOST:PORT"),
    ("compare a:1 . s.yaml", "expected two servers or two folders of runs, got a:1 and ."),
    ("compare . . --output x", "--output: of runs that are over nothing is written"),
    ("compare . ./nowhere", "expected what `run SCENARIO --output"),
    ("compare a:1 b:2 s.yaml --rounds 2", "argument --rounds: expected a whole number from 3"),
    ("compare a:1 b:2 s.yaml --seconds -1", "argument --seconds: expected a number above 0"),
    ("compare a:1 b:2 idle.yaml", "stages: expected a rate above 0 in one of them"),
    ("compare a:1 b:2 soon.yaml", "or a first stage with a rate"),
    ("run much.yaml", "5,000,000,000,000 requests: expected 20,000,000 at most"),
    ("run s.yaml --rate 1e6 --seconds 1e6", "requests: expected 20,000,000 at most"),
    ("run s.yaml --rate 0", "argument --rate: expected a number above 0"),
    ("run s.yaml --p99-ms 0", "argument --p99-ms: expected a number above 0"),
    ("run recorded.yaml --rate 5", "expected both --rate and --seconds: the scenario has a trace"),
    ("saturate open.yaml --model x", "expected slo.p99_ms"),
    ("-x", "-x expected a command: one of run, saturate, compare, replay, worker"),
    ("replay s.csv s.yaml", "s.csv: no such file: expected a trace in CSV or Parquet; did you mean 't.csv'?"),
    ("replay words.csv s.yaml", "words.csv:1: expected a column second"),
    ("replay s.yaml s.yaml", "s.yaml:1: expected a column second"),
    ("replay . s.yaml", ".: a folder: expected a trace"),
    ("replay t.csv s.yaml --speed 0", "argument --speed: expected a number above 0"),
    ("worker", "the following arguments are required: --master-host"),
    ("worker --master-host x --master-port 0", "argument --master-port: expected a whole number from 1 to 65535"),
]


@pytest.mark.parametrize(("command", "says"), WRONG, ids=[command[:40] for command, _ in WRONG])
def test_what_is_wrong_is_named(command: str, says: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(here / "fifo")
    (here / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    (here / "binary.yaml").write_bytes(bytes(range(1, 128)))
    (here / "list.yaml").write_text("[1, 2]")
    (here / "open.yaml").write_text("payloads: [{model: m}]\nstages: [{seconds: 1, rate: 10}]\n")
    (here / "idle.yaml").write_text("payloads: [{model: m}]\nstages: [{seconds: 1, rate: 0}]\n")
    (here / "soon.yaml").write_text("payloads: [{model: m}]\nstages: [{seconds: 1, rate: 0}, {seconds: 1, rate: 1}]\n")
    (here / "much.yaml").write_text("payloads: [{model: m}]\nstages: [{seconds: 5, rate: 1e12}]\n")
    (here / "t.csv").write_text("1\n2\n")
    (here / "recorded.yaml").write_text("payloads: [{model: m}]\narrivals: {trace: t.csv}\n")
    (here / "words.csv").write_text("one,two\n3,4\n")
    assert status_of(command.split()) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1 or said.startswith("usage: "), "one line, or the usage and one"


def test_scenarios_that_are_cut_off_name_what_is_missing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At every tenth byte: what is no scenario says so, and what still is one finds no server."""
    (port,) = free_ports(1)
    for name in ("steady", "mixed", "burst"):
        whole = (names.PACKAGED / f"{name}.yaml").read_bytes()
        for end in range(random.Random(name).randrange(10), len(whole), 10):
            (here / "cut.yaml").write_bytes(whole[:end])
            assert status_of(["run", "cut.yaml", "--url", f"127.0.0.1:{port}"]) == 2
            said = capsys.readouterr().err
            assert said.startswith(("tutti loadtest: cut.yaml", f"tutti loadtest: nothing listens at 127.0.0.1:{port}"))
            assert said.count("\n") == 1


@pytest.mark.parametrize(
    "command", ["run s.yaml", "saturate s.yaml", "compare {url} {url} s.yaml", "replay t.csv s.yaml"]
)
def test_a_run_that_cannot_start_leaves_a_page_that_says_why(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "t.csv").write_text("1\n2\n")
    (here / "recorded.yaml").write_text("payloads: [{model: m}]\narrivals: {trace: t.csv}\n")
    (port,) = free_ports(1)
    url = f"127.0.0.1:{port}"
    assert status_of([*command.format(url=url).split(), "--url", url, "--output", "rep"]) == 2
    what = f"nothing listens at {url} (Connection refused): start a server there"
    assert what in capsys.readouterr().err
    page = (here / "rep" / "report.html").read_text()
    assert "<p class='verdict INVALID'>" in page
    assert what in page
    (told,) = (json.loads(path.read_text()) for path in (here / "rep").glob("*.json"))
    assert told["verdict"] == "INVALID"
    assert what in told["reasons"][0]


@pytest.mark.parametrize("command", ["run", "saturate", "compare a:1 b:2", "replay t.csv"])
def test_a_scenario_that_says_nothing_leaves_a_page_too(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "t.csv").write_text("1\n2\n")
    (here / "bad.yaml").write_text(SCENARIO.replace("p99_ms", "p98_ms"))
    assert status_of([*command.split(), "bad.yaml", "--output", "rep"]) == 2
    what = "slo.p98_ms: no such field"
    assert what in capsys.readouterr().err
    page = (here / "rep" / "report.html").read_text()
    assert "<title>bad: INVALID</title>" in page
    assert what in page
    (told,) = (json.loads(path.read_text()) for path in (here / "rep").glob("*.json"))
    assert (told["verdict"], what in told["reasons"][0]) == ("INVALID", True)


def of(url: str, **more: Any) -> Scenario:
    return Scenario(payloads=[{"model": "pets"}], stages=[{"seconds": 1, "rate": 1}], target={"urls": [url], **more})


INDEX = [{"name": "pet", "state": "READY"}, {"name": "other"}]
METADATA = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}], "outputs": [{"name": "scores"}]}


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        (
            {"/v2/models/pets": (400, {"error": "unknown"}), "/v2/repository/index": (200, INDEX)},
            "model 'pets' is not served at {url}; did you mean 'pet'?",
        ),
        (
            {"/v2/models/pets": (400, {"error": "not ready"}), "/v2/repository/index": (200, [{"name": "pets"}])},
            "model 'pets' at {url}: not ready",
        ),
        ({}, "{url} answers /v2/models/pets with HTTP 404, as no server of models does: is it another port?"),
        ({"/v2/models/pets": (401, {"error": "who?"})}, "refuses (HTTP 401: who?): give the key, with --api-key-file"),
        ({"/v2/models/pets": (200, {"inputs": [1]})}, "what it tells of model 'pets' is no metadata"),
    ],
)
def test_a_server_that_does_not_serve_it_is_named(answers: dict[str, Any], says: str) -> None:
    with models(answers) as url, pytest.raises(RunError) as error:
        server.check(of(url))
    assert says.format(url=url) in str(error.value)


def test_one_that_speaks_no_http_and_one_without_metrics_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"127.0.0.1:{listening.getsockname()[1]}"

        def refuse() -> None:
            for _ in range(2):  # one that only looks, one that asks
                listening.accept()[0].close()

        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(RunError, match=rf"{url} does not answer in HTTP .* is it the gRPC port\?"):
            server.check(of(url))
        thread.join()
    with models({"/v2/models/pets": (200, METADATA)}) as url:
        assert server.check(of(url))["pets", ""][0].shape == (-1, 4)
        with pytest.raises(RunError, match=f"{url} has no metrics at /metrics"):
            server.check(of(url, metrics=[url]))
        payload = of(url).payloads[0].model_copy(update={"outputs": ["score"]})
        with pytest.raises(RunError, match="has the outputs scores, and no 'score'; did you mean 'scores'"):
            server.check(of(url).model_copy(update={"payloads": [payload]}))


def test_metrics_may_want_a_key() -> None:
    answers = {"/v2/models/pets": (200, METADATA), "/metrics": (401, "a key is needed")}
    with models(answers) as url, pytest.raises(RunError) as error:
        server.check(of(url, metrics=[url]))
    assert f"{url} refuses to tell its metrics (HTTP 401): give the key" in str(error.value)


def test_metrics_are_shown_the_key_all_the_while() -> None:
    asked = threading.Event()

    def seen(headers: Mapping[str, str]) -> None:
        if headers.get("authorization") == "Bearer secret":
            asked.set()

    with models({"/metrics": (200, "nv_x 1")}, seen) as url:
        target = Target(metrics=[url], headers={"authorization": "Bearer secret"})
        with Sampler(target, ["pets"], ["pets"]):
            assert asked.wait(60)


def test_a_key_stands_for_the_scenarios_and_is_in_no_report(here: Path) -> None:
    (here / "keys").write_text("# whose\n\nsecret\nanother\n")
    shows = "target: {headers: {Authorization: Bearer old, X-Api-Key: old, x-tenant: a}}\n"
    (here / "s.yaml").write_text(SCENARIO + shows)
    made = commands._load(cli.parse(["run", "s.yaml", "--api-key-file", "keys"]))
    assert made.target.headers == {"x-tenant": "a", "authorization": "Bearer secret"}
    assert made.as_json()["target"]["headers"] == dict.fromkeys(made.target.headers, "(not shown)")
    assert commands._load(cli.parse(["run", "s.yaml"])).target.headers["Authorization"] == "Bearer old"


@pytest.mark.parametrize("content", [b"", b"# none\n", b"k\xc3\xa4y\n", b"a\x07b\n", b"\xff\n"])
def test_a_file_without_a_key_is_named_and_not_shown(
    content: bytes, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "keys").write_bytes(content)
    assert status_of(["run", "s.yaml", "--api-key-file", "keys"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tutti loadtest: --api-key-file keys: ")
    assert not set(said) & {"\x07", "\xe4"}


def test_the_parts_of_ensembles_do_the_work() -> None:
    def ensemble(*steps: str) -> tuple[int, Any]:
        return 200, {"ensemble_scheduling": {"step": [{"model_name": name} for name in steps]}}

    answers = {
        "/v2/models/pets/config": ensemble("decoder", "inner"),
        "/v2/models/inner/config": ensemble("classifier", "decoder"),
        "/v2/models/decoder/config": (200, {"name": "decoder"}),
    }
    with models(answers) as url:
        assert server.parts(of(url)) == ["decoder", "classifier"]


def test_samples_come_along_with_the_package(tmp_path: Path) -> None:
    """As a wheel has it: links have become files, and nothing of the repository is around."""
    (tmp_path / "tutti").mkdir()
    for path in ROOT.glob("tutti/*.py"):
        shutil.copy(path, tmp_path / "tutti")
    shutil.copytree(ROOT / "loadtest", tmp_path / "tutti" / "loadtest", ignore=shutil.ignore_patterns("reports"))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tutti.loadtest import payloads as p; "
        "assert p.__file__.startswith(sys.argv[1]); infos = [p.TensorInfo('AUDIO', 'FP32', (-1, -1)), "
        "p.TensorInfo('IMAGE', 'BYTES', (-1, 1)), p.TensorInfo('TEXT', 'BYTES', (-1, 1))]; "
        "drawn = p.Payloads(0).draw(infos); assert drawn['AUDIO'].any(); assert len(drawn['IMAGE'][0, 0]) > 100"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_samples_and_scenarios_are_package_data() -> None:
    import tomllib

    root = ROOT / "loadtest"
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = told["tool"]["setuptools"]["package-data"]["tutti.loadtest"]
    packed = {path for pattern in patterns for path in root.glob(pattern)}
    wanted = {*(root / "samples").iterdir(), *(root / "scenarios").iterdir(), root / "sentences.tsv"}
    assert packed == wanted
