"""The Locust suite: its payloads, and a short headless run with a report. Locust stays in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loadtest.payloads import Payloads, TensorInfo
from loadtest.process import free_ports

ROOT = Path(__file__).parents[2]


def test_payloads_are_seeded_and_fit_their_tensors() -> None:
    infos = [
        TensorInfo("AUDIO", "FP32", (-1, -1)),
        TensorInfo("TEXT", "BYTES", (-1, 1)),
        TensorInfo("IMAGE", "BYTES", (-1, 1)),
        TensorInfo("ids", "INT64", (-1, -1)),
        TensorInfo("pixels", "UINT8", (-1, 3, 8, 8)),
    ]
    first, again = Payloads(5).draw(infos), Payloads(5).draw(infos)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    assert first["AUDIO"].shape == (1, 32_000)
    assert first["IMAGE"][0, 0][:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0")
    assert first["pixels"].shape == (1, 3, 8, 8)
    assert first["ids"].dtype == np.int64


@pytest.mark.slow
def test_a_headless_run_against_the_ensemble_and_each_model(sample_repository: Path, tmp_path: Path) -> None:
    http, grpc = free_ports(2)
    report, table = tmp_path / "report.html", tmp_path / "run"
    command = [sys.executable, "-m", "loadtest.run", "--repository", str(sample_repository), "--users", "4"]
    command += ["--seconds", "5", "--http-port", str(http), "--grpc-port", str(grpc), "--html", str(report)]
    command += ["--json-file", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "content_intelligence" in report.read_text()
    rows = json.loads(table.with_suffix(".json").read_text())
    asked = {(row["method"], row["name"]) for row in rows}
    models = {path.parent.name for path in sample_repository.glob("*/config.pbtxt")}
    assert asked == {(protocol, model) for protocol in ("http", "grpc") for model in models}
    assert all(row["num_failures"] == 0 and row["num_requests"] > 0 for row in rows)
