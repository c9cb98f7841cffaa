"""Which processes `tutti serve` starts, by its flags and the machine."""

import argparse

import pytest

from tests.models import Repository
from tests.serving import engine_over
from tutti import cli
from tutti.frontends import setup
from tutti.frontends.api import Api
from tutti.logs import Logs


def count(*flags: str, has_gpu: bool = False, cores: int = 16) -> int:
    options = cli.make_parser().parse_args(["serve", "models", *flags])
    return cli.front_ends(options, has_gpu, cores)


def options(arguments: list[str]) -> argparse.Namespace:
    return cli.parse(arguments)[0]


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
        ["serve", "models"],
        ["serve", "--http-port", "1", "models"],
        ["serve", "--model-repository", "models"],
        ["serve", "--http-port=1", "--model-repository=models"],
        ["serve", "--model-store=models"],
        ["serve", "--allow-client-shm", "models", "--http-port", "1"],
    ],
)
def test_the_repository_is_named_in_either_way(arguments: list[str]) -> None:
    assert str(options(arguments).model_repository) == "models"


@pytest.mark.parametrize("arguments", [["serve"], ["serve", "models", "--model-repository", "others"]])
def test_there_is_one_repository(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(arguments)
    assert "expected one model repository" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "is_on"),
    [("", False), ("--allow-client-shm", True), ("--allow-client-shm=true", True), ("--allow-client-shm=False", False)],
)
def test_switches_may_have_a_value(flag: str, is_on: bool) -> None:
    assert options(["serve", "models", *filter(None, [flag])]).allow_client_shm == is_on


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--allow-client-shm=perhaps", "argument --allow-client-shm: expected true or false, got 'perhaps'"),
        ("--http-max-input-size=0", "argument --http-max-input-size: must be greater than 0, got '0'"),
        ("--http-max-input-size=-1", "must be greater than 0, got '-1'"),
        ("--grpc-max-message-size=x", "must be greater than 0, got 'x'"),
    ],
)
def test_values_that_make_no_sense_are_refused(flag: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(["serve", "models", flag])
    assert says in capsys.readouterr().err


def test_the_server_has_the_name_that_it_is_given(repository: Repository) -> None:
    given = options(["serve", str(repository.root), "--server-name", "triton"])
    with engine_over(repository.root) as engine:
        assert setup.make_api(engine, given, Logs()).server_metadata()["name"] == "triton"
        assert Api(engine).server_metadata()["name"] == "tutti"


@pytest.mark.parametrize(
    ("pattern", "matches"), [("MY_.*", ["my_x", "MY_x"]), ("(?-i)MY_.*", ["MY_x"]), ("(?-i)my_.*", ["my_x"])]
)
def test_a_pattern_of_headers_has_no_case_unless_it_says_so(
    repository: Repository, pattern: str, matches: list[str]
) -> None:
    given = options(["serve", str(repository.root), f"--http-header-forward-pattern={pattern}"])
    with engine_over(repository.root) as engine:
        forward = setup.make_api(engine, given, Logs()).http.forward
    assert forward is not None
    assert [name for name in ("my_x", "MY_x") if forward.fullmatch(name)] == matches
