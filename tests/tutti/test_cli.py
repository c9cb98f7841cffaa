"""Which processes `tutti serve` starts, by its flags and the machine."""

import pytest

from tutti import cli


def count(*flags: str, has_gpu: bool = False, cores: int = 16) -> int:
    options = cli.make_parser().parse_args(["serve", "models", *flags])
    return cli.front_ends(options, has_gpu, cores)


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
