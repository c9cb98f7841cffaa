"""What a server says when it has started: a table of its models, and a line to try that works."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import IN_PROCESS, Repository
from tests.serving import engine_over, serving
from tutti.app import overview
from tutti.app.front_end_server import Addresses, Tls

TENSOR = '{ name: "%s" data_type: TYPE_%s dims: [ %s ] }'


def add(repository: Repository, name: str, *inputs: str, extra: str = "") -> None:
    """A python model that answers with one number."""
    config = " ".join(f"input {one}" for one in inputs) + ' output { name: "n" data_type: TYPE_INT32 dims: [ 1 ] }'
    answer = 'return pb_utils.InferenceResponse([pb_utils.Tensor("n", np.ones(1, np.int32))])'
    repository.add_python(name, f'backend: "python" {config} {extra} {IN_PROCESS}', answer)


def test_the_table_has_a_line_for_each_model(repository: Repository) -> None:
    repository.add_onnx("add", extra="instance_group { count: 2 kind: KIND_CPU }")
    repository.add_onnx("single", max_batch_size=1, extra="")
    with engine_over(repository.root) as engine:
        head, first, second = overview.table(engine.models())
        assert head.split("  ")[0] == "model"
        assert re.split("  +", first)[:5] == ["add", "1", "onnxruntime", "2 on cpu", "up to 8"]
        assert "none" in second
        assert first.endswith(f" {engine.models()[0].load_s:.2f} s")
        assert engine.models()[0].load_s > 0
        assert len({line.index("onnxruntime") for line in (first, second)}) == 1, "aligned"


@pytest.mark.parametrize(
    ("inputs", "body"),
    [
        ([TENSOR % ("a", "FP32", 4)], '"shape": [4], "datatype": "FP32", "data": [0.0, 0.0, 0.0, 0.0]'),
        ([TENSOR % ("t", "STRING", -1)], '"datatype": "BYTES", "data": ["text"]'),
        ([TENSOR % ("b", "BOOL", 1), TENSOR % ("i", "INT64", "2, -1")], '"shape": [2, 1], "datatype": "INT64"'),
    ],
)
def test_the_line_to_try_is_answered(repository: Repository, tmp_path: Path, inputs: list[str], body: str) -> None:
    add(repository, "m", *inputs)
    add(repository, "bytes", *[TENSOR % (f"x{index}", "STRING", 2) for index in range(4)])
    log = tmp_path / "log"
    with serving(repository.root, log) as served:
        (line,) = [line for line in log.read_text().splitlines() if "try: " in line]
        command = line.partition("try: ")[2]
        assert f"http://{served.http}/v2/models/m/infer" in command
        assert body in command
        script = (
            "import sys, urllib.request as u; print(u.urlopen(u.Request(sys.argv[1], sys.argv[2].encode())).read())"
        )
        _, _, url, _, data = shlex.split(command)
        answer = subprocess.run([sys.executable, "-c", script, url, data], capture_output=True, text=True, check=True)
        assert '"data":[1]' in answer.stdout


@pytest.mark.parametrize(
    ("inputs", "extra"),
    [
        ([TENSOR % ("a", "FP32", 17)], ""),
        ([TENSOR % ("a", "FP16", 1)], ""),
        ([], ""),
        ([TENSOR % ("a", "FP32", 1)], "model_transaction_policy { decoupled: true }"),
    ],
)
def test_what_no_short_request_asks_is_shown(repository: Repository, inputs: list[str], extra: str) -> None:
    add(repository, "m", *inputs, extra=extra)
    with engine_over(repository.root) as engine:
        assert overview.example(engine.models(), "http://h:1") == "curl -s http://h:1/v2/models/m"


def test_without_models_there_is_nothing_to_try() -> None:
    assert overview.example([], "http://h:1") == ""


def test_no_command_asks_where_nobody_listens(repository: Repository) -> None:
    repository.add_onnx()
    with engine_over(repository.root) as engine:
        for port in (1, None):
            command = overview.example(engine.models(), Addresses(http_port=port).url)
            assert ("http://127.0.0.1:1/" in command) if port else not command


def test_a_client_of_this_machine_gets_an_address() -> None:
    assert Addresses("0.0.0.0", 1).url == "http://127.0.0.1:1"
    assert Addresses("::", 1).url == "http://[::1]:1"
    assert Addresses("fe80::1", 1, http_tls=Tls(Path("c"), Path("k"))).url == "https://[fe80::1]:1"


@pytest.mark.parametrize(("content", "status"), [(None, 0), (b"no graph", 1)])
def test_a_check_ends_with_its_verdict(repository: Repository, content: bytes | None, status: int) -> None:
    repository.add_onnx("good")
    repository.add_onnx("other")
    if content is not None:
        (repository.root / "other" / "1" / "model.onnx").write_bytes(content)
    command = [sys.executable, "-m", "tutti", "serve", str(repository.root), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert "good" in done.stderr
    assert ("not served: model 'other'" in done.stderr) == bool(status)
    assert "listening" not in done.stderr
