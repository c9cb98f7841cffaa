"""Which processes `tutti serve` starts, by its flags and the machine."""

import argparse
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from tests.models import Repository
from tests.serving import engine_over
from tutti.app import cli, front_end_setup, serve_options
from tutti.app.restarts import UNUSABLE
from tutti.core import extras
from tutti.core.errors import ConfigError
from tutti.frontends.v2.api import Api
from tutti.observing.logs import Logs


def count(*flags: str, has_gpu: bool = False, cores: int = 16) -> int:
    return cli.front_ends(serve_options.make_parser().parse_args(["models", *flags]), has_gpu, cores)


def options(arguments: list[str]) -> argparse.Namespace:
    return serve_options.parse(arguments)


def test_without_a_gpu_all_is_one_process() -> None:
    assert count() == 0
    assert count("--front-end-processes", "auto") == 0
    assert count("--front-end-processes", "1") == 0


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 1), (4, 1), (8, 2), (15, 3), (16, 4), (128, 4)])
def test_with_a_gpu_front_ends_get_a_quarter_of_the_cores(cores: int, processes: int) -> None:
    assert count(has_gpu=True, cores=cores) == processes
    assert count("--supervise", cores=cores) == processes


def test_what_is_asked_for_is_done() -> None:
    assert count("--front-end-processes", "1", has_gpu=True) == 0
    assert count("--front-end-processes", "3") == 3
    assert count("--front-end-processes", "1", "--supervise") == 1


@pytest.mark.parametrize(
    "flags", [["--grpc-use-ssl"], ["--grpc-use-ssl-mutual"], ["--grpc-server", "grpcio"], ["--ray"]]
)
def test_what_front_ends_cannot_do_is_done_in_one_process(flags: list[str]) -> None:
    assert count(*flags, has_gpu=True) == 0


@pytest.mark.parametrize("flags", [["--front-end-processes", "0"], ["--front-end-processes", "x"]])
def test_what_is_no_count_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        count(*flags)
    assert "expected 1 or more, or auto" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["models"],
        ["--http-port", "1", "models"],
        ["--model-repository", "models"],
        ["--http-port=1", "--model-repository=models"],
        ["--model-store=models"],
        ["--allow-client-shm", "models", "--http-port", "1"],
    ],
)
def test_the_repository_is_named_in_either_way(arguments: list[str]) -> None:
    assert str(options(arguments).model_repository) == "models"


@pytest.mark.parametrize("arguments", [[], ["models", "--model-repository", "others"]])
def test_there_is_one_repository(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(arguments)
    assert "expected one model repository" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "is_on"),
    [("", False), ("--allow-client-shm", True), ("--allow-client-shm=true", True), ("--allow-client-shm=False", False)],
)
def test_switches_may_have_a_value(flag: str, is_on: bool) -> None:
    assert options(["models", *filter(None, [flag])]).allow_client_shm == is_on


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--allow-client-shm=perhaps", "argument --allow-client-shm: expected true or false, got 'perhaps'"),
        ("--http-max-input-size=0", "--http-max-input-size: expected bytes, which must be greater than 0, got '0'"),
        ("--http-max-input-size=-1", "must be greater than 0, got '-1'"),
        ("--grpc-max-message-size=x", "must be greater than 0, got 'x'"),
        ("--max-inflight-bytes=-1", "must be greater than 0, got '-1'"),
        ("--http-port=99999", "--http-port: expected a port from 0 (any that is free) to 65535, got '99999'"),
        ("--grpc-port=-1", "--grpc-port: expected a port from 0 (any that is free) to 65535, got '-1'"),
        ("--metrics-port=80a", "got '80a'"),
        ("--http-port=\u0661", "got '\u0661'"),
        ("--exit-timeout-secs=nan", "--exit-timeout-secs: expected seconds, more than 0, got 'nan'"),
        ("--control-timeout-secs=0", "expected seconds, more than 0, got '0'"),
        ("--repository-poll-secs=-1", "expected seconds, more than 0, got '-1'"),
        ("--hang-timeout-secs=inf", "expected seconds, more than 0, got 'inf'"),
        ("--gateways=0", "--gateways: expected 1 or more, got '0'"),
        ("--cpu-replicas=-1", "--cpu-replicas: expected 0 or more, got '-1'"),
        ("--log-verbose=x", "--log-verbose: expected 0 or more, got 'x'"),
        ("--http-prot=1", "unknown: '--http-prot=1' (did you mean --http-port?)"),
        ("others", "unknown: 'others'"),
    ],
)
def test_values_that_make_no_sense_are_refused(flag: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        options(["models", flag])
    assert ended.value.code == UNUSABLE
    told = capsys.readouterr().err
    assert told.startswith("usage: tutti serve MODEL_REPOSITORY")
    assert says in told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["srve", "models"], "no command 'srve'; did you mean serve?"),
        (["xyz"], f"no command 'xyz'; there are {', '.join(cli.COMMANDS)}"),
        (["--http-port"], "no command '--http-port'"),
        (["cluster", "plan"], "usage: tutti cluster plan"),
        (["ensemble", "chek"], "usage: tutti ensemble"),
        (["export", "adio"], "usage: tutti export"),
    ],
)
def test_a_wrong_command_shows_its_own_usage(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == UNUSABLE
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_needs_no_extra(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        cli.main([*filter(None, [command]), "--help"])
    assert ended.value.code == 0
    assert "usage: tutti" in capsys.readouterr().out


def test_what_an_extra_brings_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert cli.main(["cluster", "plan", "models", "--gpus", "1"]) == 1
    named = f"cluster needs ray and psutil and yaml and pydantic: {extras.install('ray')}"
    assert named in capsys.readouterr().err


def test_a_repository_that_is_not_there_is_told_in_a_line(tmp_path: Path) -> None:
    ports = ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    command = [sys.executable, "-m", "tutti", "serve", str(tmp_path / "none"), *ports]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == UNUSABLE
    assert done.stderr.endswith(f"tutti: model repository '{tmp_path / 'none'}' is not a folder\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port", "--metrics-port"])
def test_a_port_in_use_is_told_before_models_are_loaded(flag: str, repository: Repository, tmp_path: Path) -> None:
    repository.add_onnx()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"--http-port": 0, "--grpc-port": 0, "--metrics-port": 0, flag: port}
        flags = [f"{name}={number}" for name, number in ports.items()]
        command = [sys.executable, "-m", "tutti", "serve", str(repository.root), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == UNUSABLE
    assert f"cannot listen: [Errno 98] 127.0.0.1:{port}: Address already in use ({flag})" in done.stderr
    assert "loaded model" not in done.stderr


@pytest.mark.parametrize("more", [[], ["--check"], ["--supervise"], ["--front-end-processes", "2"], ["--ray"]])
@pytest.mark.parametrize(
    ("flags", "one", "other"),
    [
        (["--http-port=9000", "--grpc-port=9000"], "--http-port", "--grpc-port"),
        (["--http-port=9000", "--metrics-port=9000"], "--http-port", "--metrics-port"),
        (["--grpc-port=9000", "--metrics-port=9000", "--grpc-address=0.0.0.0"], "--grpc-port", "--metrics-port"),
        (["--http-port=9000", "--metrics-port=9000", "--metrics-address=localhost"], "--http-port", "--metrics-port"),
    ],
)
def test_a_port_that_is_given_twice_is_told_before_anything_is_done(
    flags: list[str], one: str, other: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        options(["models", *flags, *more])
    assert ended.value.code == UNUSABLE
    says = f"{one} and {other} are both 9000: expected a port for each, or 0 for any that is free\n"
    assert capsys.readouterr().err.endswith(says)
    given = options(["models"])
    for flag in flags:
        name, _, value = flag.removeprefix("--").partition("=")
        setattr(given, name.replace("-", "_"), int(value) if value.isdecimal() else value)
    with pytest.raises(ConfigError, match=f"{one} and {other} are both 9000"):  # as an application's file on Ray has it
        front_end_setup.check(given)


@pytest.mark.parametrize(
    "flags",
    [
        ["--http-port=0", "--grpc-port=0", "--metrics-port=0"],
        ["--http-port=9000", "--grpc-port=9000", "--allow-grpc=false"],
        ["--http-port=9000", "--metrics-port=9000", "--metrics-address=127.0.0.2"],
    ],
)
def test_ports_that_are_apart_are_not_refused(flags: list[str]) -> None:
    front_end_setup.check(options(["models", *flags]))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    for name in ("own", "other"):
        made = authority.issue_cert("localhost")
        made.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        made.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
    (folder / "binary.pem").write_bytes(bytes(range(256)))
    return folder


TLS_FILES = [
    # (certificate, key, root, what is told of which flag)
    ("none.pem", "own.key", "", "-server-cert {0}/none.pem: No such file or directory"),
    ("own.pem", "none.key", "", "-server-key {0}/none.key: No such file or directory"),
    ("own.pem", "own.key", "none.pem", "-root-cert {0}/none.pem: No such file or directory"),
    (".", "own.key", "", "-server-cert {0}: Is a directory"),
    ("binary.pem", "own.key", "", "-server-cert {0}/binary.pem: byte 0 is a zero; expected a text in UTF-8"),
    ("own.pem", "own.pem", "", "-server-key {0}/own.pem: expected a file in PEM, with -----BEGIN KEY-----"),
    ("own.pem", "own.key", "own.key", "-root-cert {0}/own.key: expected a file in PEM, with -----BEGIN CERTIFICATE"),
    ("own.pem", "other.key", "", "-server-key {0}/other.key: no certificate and its key: key values mismatch"),
]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize(("certificate", "key", "root", "says"), TLS_FILES)
def test_a_file_of_tls_is_told_with_its_flag(
    certificates: Path, protocol: str, certificate: str, key: str, root: str, says: str
) -> None:
    files = {"server-cert": certificate, "server-key": key, **({"root-cert": root} if root else {})}
    flags = [f"--{protocol}-{flag}={certificates / file}" for flag, file in files.items()]
    given = options(["models", *flags, f"--{protocol}-use-ssl{'-mutual' if root else ''}"])
    for check in (front_end_setup.addresses, front_end_setup.check):
        with pytest.raises(ConfigError) as error:
            check(given)
        assert f"--{protocol}{says.format(certificates)}" in str(error.value)


@pytest.mark.parametrize("more", [[], ["--supervise"]])
def test_a_certificate_that_is_not_its_keys_is_told_before_models_are_loaded(
    certificates: Path, repository: Repository, more: list[str]
) -> None:
    repository.add_onnx()
    tls = [
        "--http-use-ssl",
        f"--http-server-cert={certificates}/own.pem",
        f"--http-server-key={certificates}/other.key",
    ]
    ports = ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    command = [sys.executable, "-m", "tutti", "serve", str(repository.root), *ports, *tls, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == UNUSABLE
    assert "no certificate and its key: key values mismatch" in done.stderr
    assert "loaded model" not in done.stderr and "Traceback" not in done.stderr


def test_the_server_has_the_name_that_it_is_given(repository: Repository) -> None:
    given = options([str(repository.root), "--server-name", "triton"])
    with engine_over(repository.root) as engine:
        assert front_end_setup.make_api(engine, given, Logs()).server_metadata()["name"] == "triton"
        assert Api(engine).server_metadata()["name"] == "tutti"


@pytest.mark.parametrize(
    ("pattern", "matches"), [("MY_.*", ["my_x", "MY_x"]), ("(?-i)MY_.*", ["MY_x"]), ("(?-i)my_.*", ["my_x"])]
)
def test_a_pattern_of_headers_has_no_case_unless_it_says_so(
    repository: Repository, pattern: str, matches: list[str]
) -> None:
    given = options([str(repository.root), f"--http-header-forward-pattern={pattern}"])
    with engine_over(repository.root) as engine:
        forward = front_end_setup.make_api(engine, given, Logs()).http.forward
    assert forward is not None
    assert [name for name in ("my_x", "MY_x") if forward.fullmatch(name)] == matches


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (1024, 4096, 4096),
        (1024, 1 << 20, 65536),
        (1024, resource.RLIM_INFINITY, 65536),
        (100_000, 1 << 20, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
    ],
)
def test_a_server_may_open_as_many_files_as_it_can(
    soft: int, hard: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    cli.allow_files()
    assert limits == [(soft, hard)] + ([] if expected is None else [(expected, hard)])
