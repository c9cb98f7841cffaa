"""How PyTorch's allocator is told to keep memory, and that a user's own settings stand."""

import os
import subprocess
import sys

import pytest

from tutti.devices import allocator


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": ""}),
    ],
)
def test_a_users_settings_stand(environment: dict[str, str], expected: dict[str, str]) -> None:
    allocator.choose(environment)
    assert environment == expected


def test_pytorch_is_not_imported_before() -> None:
    """It reads the settings when it is imported, or soon after."""
    code = "import sys, tutti.app.process; sys.exit('torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name not in allocator.SETTINGS}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.gpu
def test_pytorch_has_read_them() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    code = """
import os
from tutti.devices import allocator
allocator.choose()
import torch
kept = torch.empty(1 << 20, device="cuda")
print(any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()))
"""
    environment = {name: value for name, value in os.environ.items() if name not in allocator.SETTINGS}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True", done.stderr
