"""The serving core alone, in an environment of its own without torch, transformers and Ray, serves the repository."""

import subprocess
import sys
from pathlib import Path

import pytest

from demo.client import Client, load_items
from tests.serving import serving

ROOT = Path(__file__).parents[1]
ABSENT = ("torch", "transformers", "ray", "onnx", "sklearn")


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_core_serves_the_sample_repository(sample_repository: Path, tmp_path: Path) -> None:
    environment = tmp_path / "core"
    python = environment / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    pip = [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "--quiet", "--disable-pip-version-check", "-e", str(ROOT)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    probe = f"import importlib.util as u; print([m for m in {ABSENT!r} if u.find_spec(m)])"
    found = subprocess.run([python, "-c", probe], check=True, capture_output=True, text=True, cwd="/")
    assert found.stdout.strip() == "[]"
    with serving(sample_repository, tmp_path / "log", python=str(python)) as served:
        item = load_items()[0]
        for protocol in ("http", "grpc"):
            answer, _ = Client(protocol, getattr(served, protocol)).infer("content_intelligence", item.inputs())
            assert int(answer["IMAGE_SCORES"].argmax()) == item.digit
            assert answer["SEGMENTS"].shape == (1, len(item.segments_s), 2)
