"""Whether this machine has GPUs that a process may use, told without a library that would touch them."""

import os
from collections.abc import Mapping
from pathlib import Path


def has_gpu(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> bool:
    """Whether the driver shows a device, and CUDA_VISIBLE_DEVICES hides not all of them.

    CUDA shows the devices in front of the first that it does not know: an empty list, or one that begins with -1, hides
    all.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.partition(",")[0].strip() in ("", "-1"):
        return False
    return any((root / "dev").glob("nvidia[0-9]*")) or any((root / "proc/driver/nvidia/gpus").glob("*"))
