"""The GPU kit's parts in their short form, on the processor: from the kit's folder alone, with no tutti and no network.

The environment is made as the GPU machine's is: a bare one, with what that machine has (PyTorch and the like) borrowed
from here, and without what it lacks, which must come from the kit.
"""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import kit, report

pytest.importorskip("torch")
pytestmark = pytest.mark.slow

SITE = next(path for path in map(Path, sys.path) if (path / "torch").is_dir())
# What that machine lacks, by the start of the name: it must not be found in what is borrowed.
LACKS = (
    "tutti", "__editable__", "tritonclient", "gevent", "rapidjson", "python_rapidjson", "pygrpc", "httptools", "orjson",
    "starlette", "anyio", "sniffio", "hpack", "ray", "locust", "greenlet", "zope", "brotli", "h2", "hyperframe",
)  # fmt: skip
# Loopback only, as on a machine without network.
GUARD = """
import socket

connect = socket.socket.connect


def guarded(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        raise OSError(f"no network here: {address}")
    return connect(self, address)


socket.socket.connect = guarded
"""


class Machine:
    """A folder with the kit, and an environment to run it in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        kit.make(root / "gpu-kit", sets=(), is_local=True)
        venv.create(root / "venv", with_pip=False, symlinks=True)
        packages = next((root / "venv" / "lib").glob("python3.*/site-packages"))
        (packages / "sitecustomize.py").write_text(GUARD)
        borrowed = root / "borrowed"
        borrowed.mkdir()
        for path in SITE.iterdir():
            if not path.name.lower().startswith(LACKS) and path.suffix != ".pth":
                (borrowed / path.name).symlink_to(path)
        (packages / "borrowed.pth").write_text(f"{borrowed}\n")
        self.python = root / "venv" / "bin" / "python"

    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "PATH") if name in os.environ}
        return {**kept, "PYTHON": str(self.python), "TUTTI_WORK": str(self.root / "work"), "PIP_NO_INDEX": "1"}

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [str(self.root / "gpu-kit" / "base" / "run.sh"), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment(), cwd=self.root, timeout=280, check=False
        )

    def part(self, name: str, *more: str) -> dict[str, Any]:
        """The record of a part that ended well."""
        done = self.run(name, "--device", "cpu", "--out", str(self.root / "out"), "--minutes", "4", *more)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        record: dict[str, Any] = json.loads((self.root / "out" / f"{name}.json").read_text())
        assert f"{name}:" in done.stdout, "the table comes last"
        return record


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


def rows(record: dict[str, Any], line: str) -> dict[str, dict[str, Any]]:
    (entry,) = (entry for entry in record["lines"] if entry["line"] == line)
    assert entry["status"] == "measured", entry
    return {row["name"]: row for row in entry["rows"]}


def statuses(record: dict[str, Any]) -> dict[str, str]:
    return {entry["line"]: entry["status"] for entry in record["lines"]}


def test_the_machine_has_nothing_of_tutti_and_no_network(machine: Machine) -> None:
    ask = "import importlib.util as u; print([n for n in ('tutti', 'tritonclient', 'orjson', 'ray') if u.find_spec(n)])"
    done = subprocess.run(
        [str(machine.python), "-c", ask], capture_output=True, text=True, env=machine.environment(), cwd="/", check=True
    )
    assert done.stdout.strip() == "[]"
    ask = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"
    done = subprocess.run([str(machine.python), "-c", ask], capture_output=True, text=True, cwd="/", check=False)
    assert "no network here" in done.stderr


def test_check(machine: Machine) -> None:
    record = machine.part("check")
    found = statuses(record)
    assert set(found.values()) <= {"measured", "needs a GPU", "not there yet"}, found
    answers = rows(record, "backends against float64")
    assert answers["minilm_fp32"]["off"] < 1e-5 < answers["minilm_bf16"]["off"] < 0.1
    assert rows(record, "ensembles on the device")["chain"]["requests/s"] > 0
    assert rows(record, "an id out of range")["answered, 2 front-ends"]["status"] >= 400
    assert rows(record, "load and unload")["answers"]["times"] == 4
    assert rows(record, "an id out of range, with bounds")["refused with 400"]["right"] is True
    assert "'hang'" in rows(record, "a kernel that does not end")["its caller"]["what"]
    assert found["CUDA shared memory"] == "needs a GPU"


def test_limits_then_served(machine: Machine) -> None:
    record = machine.part("limits")
    assert set(statuses(record).values()) == {"measured", "needs a GPU"}
    bare = rows(record, "minilm fp32")["batch 8"]
    assert bare["alone ms"] > 0 and bare["overlapped rows/s"] > 0
    record = machine.part("served")
    assert set(statuses(record).values()) == {"measured"}
    (line, tiny) = (rows(record, entry["line"]) for entry in record["lines"])
    assert line["answer"]["right"] is True
    for protocol in ("http", "grpc"):
        assert line[f"{protocol} 8 clients"]["of bare"] > 0, "it is compared with what limits measured"
        assert line[f"{protocol} 8 clients"]["p50 ms"] <= line[f"{protocol} 8 clients"]["p99 ms"]
        assert {f"{protocol}, {count} front-ends" for count in (1, 2)} <= set(tiny)


@pytest.mark.triton
def test_triton(machine: Machine) -> None:
    from tests.peers import tritonserver

    tritonserver.require()
    (machine.root / "gpu-kit" / "base" / "source" / ".venv-triton").symlink_to(tritonserver.ENVIRONMENT)
    record = machine.part("triton")
    found = rows(record, "minilm fp32")
    assert found["triton, 1 instances: answer"]["right"] is True
    assert found["tutti over triton, http 8 clients"]["times"] > 0


def test_onnxruntime(machine: Machine) -> None:
    record = machine.part("onnxruntime")
    assert set(statuses(record).values()) == {"measured"}
    assert rows(record, "minilm fp32")["answer"]["right"] is True


def test_report_of_a_short_run_reaches_no_target(machine: Machine) -> None:
    done = machine.run("report", str(machine.root / "out"), "--to", str(machine.root / "gpu.md"))
    assert done.returncode == 0, done.stderr
    page = (machine.root / "gpu.md").read_text()
    assert "No GPU was at hand" in page
    targets = [line for line in page.splitlines() if line.startswith("| ") and "at least" in line]
    assert len(targets) >= 10
    assert all(report.NOT_MEASURED in line for line in targets)
