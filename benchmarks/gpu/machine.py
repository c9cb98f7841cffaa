"""What a record was measured on: card, driver, PyTorch, processor, commit. Asked for in a process that may die."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import ROOT

_ASK = """
import json, sys
about = {}
try:
    import torch
    about["torch"] = torch.__version__
    if sys.argv[1] != "cpu" and torch.cuda.is_available():
        one = torch.cuda.get_device_properties(0)
        about.update(card=one.name, memory_gib=round(one.total_memory / 2**30, 1), cuda=torch.version.cuda,
                     capability=f"{one.major}.{one.minor}", multiprocessors=one.multi_processor_count)
except Exception as error:
    about["torch_error"] = str(error)[:300]
try:
    import pynvml
    pynvml.nvmlInit()
    about["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
except Exception:
    pass
print(json.dumps(about))
"""


def about(device: str) -> dict[str, Any]:
    """Without CUDA in this process: a context here would outlive the children's."""
    done = subprocess.run([sys.executable, "-c", _ASK, device], capture_output=True, text=True, check=False)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
    return {
        "card": "none", "driver": "none", "torch": "none", **told, "commit": commit(), "cpu": _cpu(),
        "cores": os.cpu_count(), "python": platform.python_version(),
    }  # fmt: skip


def commit() -> str:
    """The kit's, which has no history with it, or the repository's."""
    kept = ROOT / "COMMIT"
    if kept.exists():
        return kept.read_text().strip()
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return done.stdout.strip() or "unknown"


def sentence(about: dict[str, Any]) -> str:
    return (
        f"{about['card']}, driver {about['driver']}, torch {about['torch']}, Python {about['python']}, "
        f"{about['cpu']} with {about['cores']} cores, commit {about['commit']}"
    )


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
