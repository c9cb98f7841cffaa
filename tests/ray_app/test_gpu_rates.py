"""What a plan says that a GPU would serve."""

import re

import pytest
import yaml

from tests.models import Repository
from tutti.app.cli import main
from tutti.core.errors import ConfigError
from tutti.ray_app import gpu_rates
from tutti.repository import config

TEXT = """backend: "pytorch" max_batch_size: 64 dynamic_batching {{ }}
input {{ name: "x" data_type: TYPE_UINT8 dims: [ 3, 224, 224 ] }} output {{ name: "y" data_type: TYPE_FP32 dims: 1000 }}
parameters {{ key: "tutti.gpu_latency_ms" value {{ string_value: "{times}" }} }} {more}"""


def said(times: str, more: str = "") -> str:
    return gpu_rates.said(config.parse(TEXT.format(times=times, more=more), "m"))


def rate(text: str) -> float:
    match = re.match(r"([\d,]+) rows/s of 6[0-4] a batch on a GPU by itself, one request in \d+\.\d ms$", text)
    assert match, text
    return float(match[1].replace(",", ""))


def test_full_batches_follow_each_other() -> None:
    # 64 in 6.8 ms.
    assert rate(said("1:0.5, 64:6.8")) == pytest.approx(64 / 6.8e-3, rel=0.05)
    assert rate(said("1:0.5, 64:6.8", "optimization { cuda { graphs: true } }")) == pytest.approx(64 / 6.8e-3, rel=0.05)


def test_one_request_waits_for_its_execution_and_the_way() -> None:
    assert said("1:3, 64:9").endswith("one request in 3.6 ms")


@pytest.mark.parametrize("times", ["", "1:0.5"])
def test_without_times_nothing_is_said(times: str) -> None:
    assert said(times) == ""


def test_times_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model 'm': parameters.tutti.gpu_latency_ms: expected ROWS:MILLISECONDS"):
        said("fast")


def test_the_plan_says_it(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.add("m", TEXT.format(times="1:0.5, 64:6.8", more=""), {"model.pt": b"0" * 1000})
    assert main(["cluster", "plan", str(repository.root), "--gpus", "1"]) == 0
    placement, line = capsys.readouterr().out.rsplit("\n\n", 1)
    assert [pool["models"] for pool in yaml.safe_load(placement)["pools"]] == [["m"], ["*"]]
    assert line.startswith("m  gpu") and "rows/s of" in line
