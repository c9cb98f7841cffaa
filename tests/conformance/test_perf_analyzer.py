"""NVIDIA's perf_analyzer, unmodified, against `tutti serve`.

The program is not on PyPI as such: TUTTI_PERF_ANALYZER says where it is, as the `tritonclient==2.51.0` wheel has it.
Without the variable these tests are skipped; they need nothing else.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance import corpus
from tests.models import Repository
from tests.serving import Served, serving

PROGRAM = os.environ.get("TUTTI_PERF_ANALYZER", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM, reason="TUTTI_PERF_ANALYZER does not name perf_analyzer"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    scratch = tmp_path_factory.mktemp("perf")
    repository = Repository(scratch / "models")
    repository.add_onnx()
    ends = 'input { name: "x" data_type: TYPE_INT32 dims: 1 } output { name: "y" data_type: TYPE_INT32 dims: 1 }'
    policy = "model_transaction_policy { decoupled: true }"
    repository.add("count", f'backend: "python" {ends} {policy}', {"model.py": corpus.COUNT})
    with serving(repository.root, scratch / "log", "--allow-client-shm") as made:
        yield made


def analyze(served: Served, protocol: str, model: str, *arguments: str) -> str:
    """What it prints. Stability is not what is tested here: a window of any noise will do."""
    command = [
        PROGRAM,
        "-m",
        model,
        "-u",
        getattr(served, protocol),
        "-i",
        protocol,
        "-p",
        "500",
        "-s",
        "99",
        "-r",
        "10",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [(), ("--shared-memory", "system")])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_plain_model(served: Served, protocol: str, arguments: tuple[str, ...]) -> None:
    shown = analyze(served, protocol, "add_one", "--concurrency-range", "4", *arguments)
    assert float(re.findall(r"throughput: ([0-9.]+) infer/sec", shown)[0]) > 0
    assert re.search(r"queue \d+ usec \+ compute input \d+ usec \+ compute infer \d+ usec", shown)
    assert int(re.findall(r"Inference count: (\d+)", shown)[0]) > 0


def test_streaming_of_a_decoupled_model(served: Served, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{"data": [{"x": [3]}]}')
    arguments = ("--streaming", "--input-data", str(tmp_path / "data.json"), "--concurrency-range", "2")
    shown = analyze(served, "grpc", "count", *arguments)
    requests, responses = (
        float(re.findall(rf"\n +{name}: ([0-9.]+) infer/sec", shown)[0])
        for name in ("Throughput", "Response Throughput")
    )
    assert responses / requests == pytest.approx(3, rel=0.1)
    assert re.search(r"queue \d+ usec", shown)
