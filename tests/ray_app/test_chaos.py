"""Every kind of fault on a cluster of several nodes: nothing is lost or wrong. `make chaos` is the long run."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_kind_of_fault() -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--minutes", "6", "--faults", "10", "--when-whole"]
    # Others may take most of the machine once its capacity has been measured: what cannot be done in time is no loss.
    command += ["--share", "0.2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "1 poison" in done.stdout
