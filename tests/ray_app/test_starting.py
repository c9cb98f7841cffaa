"""What a person is told of `tutti serve --ray` as it starts, and what is refused before Ray is."""

import asyncio
import importlib.util
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from tests.models import Repository
from tests.serving import engine_over
from tutti.app import serve_options
from tutti.app.cli import main
from tutti.app.restarts import UNUSABLE
from tutti.core import extras
from tutti.core.errors import ConfigError
from tutti.ray_app import checks, news, run, starting
from tutti.ray_app.members import Member, PoolStatus
from tutti.ray_app.news import News, Start, Writer
from tutti.ray_app.overview import Loads, table
from tutti.ray_app.placement import PoolSpec, check_cpus


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on, who never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield one.getsockname()[1]


def refused(root: Path, *flags: str) -> str:
    options = serve_options.parse([str(root), "--ray", "--http-port", "0", "--grpc-port", "0", *flags])
    with pytest.raises(ConfigError) as error:
        run._checked(options)
    return str(error.value)


def test_what_cannot_be_served_is_said_before_ray_is_started(repository: Repository, tmp_path: Path) -> None:
    repository.add_onnx()
    repository.add("broken", "max_batch_size: -3", {})
    said = refused(repository.root)
    assert "model 'broken'" in said
    assert "max_batch_size" in said
    assert "is not a folder" in refused(tmp_path / "nowhere")
    options = serve_options.parse([str(repository.root), "--ray", "--exit-on-error", "false", "--http-port", "0"])
    assert not run._checked(options).exit_on_error, "the others are served"


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port"])
def test_a_port_that_is_taken_is_said_before_ray_is_started(repository: Repository, taken: int, flag: str) -> None:
    assert f"cannot listen: 127.0.0.1:{taken}: Address already in use" in refused(repository.root, flag, str(taken))


def test_a_placement_is_read_before_ray_is_started(repository: Repository, tmp_path: Path) -> None:
    repository.add_onnx("one")
    file = tmp_path / "pools.yaml"
    assert "No such file" in refused(repository.root, "--placement", str(file))
    file.write_text('pools: [{name: front, models: ["t*"]}]')
    assert "model 'one': no pool takes it: front does not list it" in refused(repository.root, "--placement", str(file))
    near = refused(repository.root, "--placement", str(tmp_path / "pool.yaml"))
    assert f"did you mean '{file}'?" in near
    file.write_text("pools: [{name: gpu, num_gpus: 4, models: ['*']}]")
    options = serve_options.parse([str(repository.root), "--ray", "--http-port", "0", "--placement", str(file)])
    assert run._checked(options).pools, "nobody knows yet how many GPUs there are"
    assert "the cluster has 1" in refused(repository.root, "--placement", str(file), "--num-gpus", "1")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--api-key-file", "no.keys"], "--api-key-file no.keys: No such file"),
        (["--trace-config", "rate"], "--trace-config rate: expected KEY=VALUE"),
        (["--cache-config", "redis"], "--cache-config"),
        (["--http-restricted-api", "nothing:a=b"], "nothing"),
        (
            ["--http-use-ssl", "--http-server-cert", "no.pem", "--http-server-key", "no.key"],
            "--http-server-cert no.pem: No such file or directory",
        ),
        (["--access-log", "nowhere/access"], "--access-log nowhere/access: No such file or directory"),
        (["--trace-config", "triton,file=nowhere/trace"], "triton,file=nowhere/trace: there is no folder 'nowhere'"),
        (["--trace-config", "level=TIMESTAMPS"], "--trace-config: level is set, but triton,file is not"),
        (["--ray-address", "ray://127.0.0.1:10001"], "expected HOST:PORT of the cluster's head"),
        (["--ray-address", "somewhere"], "expected HOST:PORT of the cluster's head"),
        (["--ray-address", "127.0.0.1:1"], "no cluster answers there: Connection refused"),
        (["--ray-address", "127.0.0.1:999999"], "no cluster answers there"),
    ],
)
def test_flags_are_checked_before_ray_is_started(repository: Repository, flags: list[str], says: str) -> None:
    assert says in refused(repository.root, *flags)


def test_an_address_of_something_else_is_no_cluster(
    repository: Repository, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_ANSWER_TIMEOUT_S", 0.2)
    assert "not the head of a Ray cluster" in refused(repository.root, "--ray-address", f"127.0.0.1:{taken}")
    with grpc_server() as port:
        assert "not the head of a Ray cluster" in refused(repository.root, "--ray-address", f"127.0.0.1:{port}")


class grpc_server:  # noqa: N801
    """One that speaks gRPC and has no method."""

    def __enter__(self) -> int:
        self._threads = ThreadPoolExecutor(1)
        self._server = grpc.server(self._threads)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        return int(port)

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()
        self._threads.shutdown()


def test_the_command_says_it_in_one_line_and_ends_with_2(repository: Repository, taken: int) -> None:
    command = [sys.executable, "-m", "tutti", "serve", str(repository.root), "--ray", "--http-port", str(taken)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == UNUSABLE
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"cannot serve on Ray: cannot listen: 127.0.0.1:{taken}: Address already in use (--http-port)")


@pytest.mark.parametrize("library", ["ray", "fastapi", "psutil"])
def test_a_library_that_is_missing_is_said_in_a_line(
    repository: Repository, library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray without what its own extra `serve` brings, too."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    assert main(["serve", str(repository.root), "--ray"]) == UNUSABLE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tutti: --ray needs {library}: {extras.install('ray')}")


def test_replicas_that_find_no_room_are_refused() -> None:
    pools = [PoolSpec("gpu", 2, 2.0, 1.0), PoolSpec("cpu", 1, 0.5, 0.0)]
    check_cpus(pools, 2, 4.7)
    with pytest.raises(ConfigError, match=r"need 4.7 CPUs .*2 of 2 in gpu and 1 of 0.5 in cpu.* the cluster has 4:"):
        check_cpus(pools, 2, 4)


def test_what_ray_prints_is_a_line_of_the_log_until_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # it comes back
    stop = threading.Event()
    with caplog.at_level(logging.INFO, "tutti"):
        starting.quieten(stop)
        print("\x1b[33m(raylet)\x1b[0m A worker died. " + "Lease ID: " * 50)
        stop.set()
        print("(raylet) Another one died.")
    (record,) = caplog.records
    assert record.getMessage().startswith("Ray: (raylet) A worker died. Lease")
    assert len(record.getMessage()) < 250


class Counting:
    """A handle of gateways, which say these one after the other; None: nobody answers."""

    def __init__(self, *told: dict[str, int] | None) -> None:
        self.told = list(told)
        self.stop = threading.Event()
        self.replicas = self

    async def remote(self) -> dict[str, int]:
        counts = self.told.pop(0)
        if not self.told:
            self.stop.set()
        if counts is None:
            raise ConnectionError
        return counts


def test_pools_are_told_of_when_they_have_changed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one gateway says alone, before the other has heard of it, is said once."""
    monkeypatch.setattr(starting, "_POOLS_INTERVAL_S", 0.0)
    two, one = {"cpu": ["cpu-1", "cpu-2"]}, {"cpu": ["cpu-2"]}
    handle = Counting(two, two, one, two, one, None, one, one, two, two, two)
    with caplog.at_level(logging.INFO, "tutti"):
        asyncio.run(starting.tell_pools(handle, handle.stop))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "pool 'cpu' has 1 replica, it had 2: cpu-1 left"),
        ("INFO", "pool 'cpu' has 2 replicas, it had 1: cpu-1 came"),
    ]


class Memory:
    """A store in this process."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}
        self.has_entries = threading.Event()

    def replace(self, key: str, value: bytes) -> None:
        self.entries[key] = value
        self.has_entries.set()

    def clear(self, prefix: str) -> None:
        self.entries = {key: value for key, value in self.entries.items() if not key.startswith(prefix)}

    def under(self, prefix: str) -> list[bytes]:
        return [value for key, value in self.entries.items() if key.startswith(prefix)]


def test_one_that_starts_tells_how_far_it_is_and_then_nothing() -> None:
    store = Memory()

    async def start() -> list[Start]:
        async with Writer(News(store, "app"), "one", "cpu", lambda: (1, 3)):
            await asyncio.to_thread(store.has_entries.wait, 60)
            return News(store, "app").read()

    (told,) = asyncio.run(start())
    assert (told.deployment, told.done, told.total, told.failure) == ("cpu", 1, 3, "")
    assert News(store, "app").read() == []


def test_why_one_cannot_start_stays_to_be_read() -> None:
    store = Memory()

    async def start(error: Exception) -> None:
        async with Writer(News(store, "app"), "one", "cpu"):
            raise error

    with pytest.raises(ConfigError):
        asyncio.run(start(ConfigError("model 'm': no file")))
    assert [one.failure for one in News(store, "app").read()] == ["model 'm': no file"]
    assert News(store, "another").read() == []
    News(store, "app").forget()
    with pytest.raises(ValueError, match="of ours"):
        asyncio.run(start(ValueError("a mistake of ours")))
    assert News(store, "app").read() == [], "Serve has the traceback"


def test_one_that_fails_again_and_again_leaves_one_reason() -> None:
    """Serve tries for ever, each time with a process of another name."""
    store = Memory()

    async def start(process: str, deployment: str, error: str) -> None:
        async with Writer(News(store, "app"), process, deployment, lambda: (3, 10)):
            await asyncio.to_thread(store.has_entries.wait, 60)
            raise ConfigError(error)

    for number in range(5):
        for deployment in ("cpu", "cpu2"):
            with pytest.raises(ConfigError):
                asyncio.run(start(f"{deployment}-{number}", deployment, f"{deployment} fails, {number}"))
    assert len(store.entries) == 2
    assert sorted(one.failure for one in News(store, "app").read()) == ["cpu fails, 4", "cpu2 fails, 4"]


def test_one_that_was_killed_as_it_loaded_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(news, "time", SimpleNamespace(monotonic=lambda: now_s))
    store = Memory()
    reader, writer = News(store, "app"), News(store, "app")
    writer.tell("killed", Start("cpu", 3, 10))
    writer.tell_failure("failed", Start("gpu", failure="no file"))
    for second in range(30):
        writer.tell("alive", Start("cpu", 5, 10, second))
        told = [(one.done, one.failure) for one in reader.read()]
        assert (5, "") in told and (0, "no file") in told
        now_s += news.WRITE_INTERVAL_S
    assert (3, "") not in told
    assert "5 of 10" in news.progress(reader.read())


def test_a_store_that_fails_keeps_nobody_from_starting() -> None:
    class Failing(Memory):
        def replace(self, key: str, value: bytes) -> None:
            raise ConnectionError

        clear = replace  # type: ignore[assignment]

    async def start() -> str:
        async with Writer(News(Failing(), "app"), "one", "cpu"):
            await asyncio.sleep(0)
        return "started"

    assert asyncio.run(start()) == "started"


def test_progress_is_of_the_replica_that_has_most_to_do() -> None:
    starts = [Start("gpu", 3, 4, 3.0), Start("gpu", 1, 4, 30.0), Start("cpu", 0, 2), Start("gateway")]
    told = news.progress(starts)
    assert told == "cpu has loaded 0 of 2 models; gpu has loaded 1 of 4 models, about 30 s left"
    assert news.progress([Start("gateway")]) == ""


def test_the_table_says_where_each_model_is(repository: Repository) -> None:
    repository.add_onnx("both")
    repository.add_onnx("single", max_batch_size=1, extra="")
    specs = [PoolSpec("gpu", 0, 1, 1, max_replicas=4), PoolSpec("cpu", 2, 1, 0)]
    members = {name: Member(name, "cpu", models=frozenset(["both/1"]), is_up=True) for name in ("a", "b")}
    statuses = {"gpu": PoolStatus("gpu"), "cpu": PoolStatus("cpu", members)}
    loads = [Loads({"both/1": "2 on cpu"}, {"both/1": seconds}) for seconds in (0.5, 1.25)]
    with engine_over(repository.root) as engine:
        homes = {"both": ("gpu", "cpu"), "single": ("cpu",)}
        head, first, second = table(engine.models(), homes, specs, statuses, loads)
    assert head.split()[:4] == ["model", "version", "backend", "replicas"]
    assert " 0 of 0 to 4 in gpu, 2 in cpu  2 on cpu " in first
    assert first.endswith("up to 8  1.25 s"), "the replica that took longest"
    assert second.split("  ")[-1].strip() == "-"
    assert " 0 in cpu " in second, "no replica could load it"


def _of_pool(repository: Repository, spec: PoolSpec, up: int, having: int) -> str:
    """What the table says of a pool, of whose replicas so many are up, and so many of these have the model."""
    members = {
        f"r{n}": Member(f"r{n}", spec.name, models=frozenset(["add_one/1"] * (n < having)), is_up=n < up)
        for n in range(up + 1)  # the last one has not begun yet
    }
    with engine_over(repository.root) as engine:
        _, line = table(engine.models(), {"add_one": ("gpu",)}, [spec], {"gpu": PoolStatus("gpu", members)}, [])
    return line.partition("onnxruntime")[2].rpartition("  -  ")[0].strip()


@pytest.mark.parametrize(
    ("up", "having", "says"),
    [
        (0, 0, "0 of 2 in gpu (starting)"),
        (1, 1, "1 of 2 in gpu (starting)"),
        (1, 0, "0 of 2 in gpu (starting)"),
        (2, 2, "2 in gpu"),
        (2, 1, "1 in gpu"),  # one could not load it
    ],
)
@pytest.mark.parametrize("is_autoscaled", [False, True])
def test_the_table_says_of_a_pool_that_it_still_starts(
    repository: Repository, up: int, having: int, says: str, is_autoscaled: bool
) -> None:
    repository.add_onnx()
    told = _of_pool(repository, PoolSpec("gpu", 2, 1, 1, min_replicas=2, max_replicas=4 * is_autoscaled), up, having)
    assert told == (f"{having} of 2 to 4 in gpu{' (starting)' * (up < 2)}" if is_autoscaled else says)


def test_a_pool_that_may_be_empty_starts_nothing(repository: Repository) -> None:
    repository.add_onnx()
    assert _of_pool(repository, PoolSpec("gpu", 1, 1, 1, max_replicas=4), 0, 0) == "0 of 0 to 4 in gpu"
