"""How PyTorch's allocator is to keep a GPU's memory. Imports nothing: it must be said before PyTorch is imported."""

import os
from collections.abc import MutableMapping

# PyTorch reads the first in all its versions, and the second, where the first is not set, in newer ones (2.13's
# CUDAAllocatorConfig.h).
SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# Batches of changing sizes leave gaps in segments of fixed sizes, which no later batch fits into, until memory that is
# free cannot be used. Segments that grow have no such gaps. What CUDA cannot do with their memory is to export it by
# cudaIpcGetMemHandle, which this server never does: it opens other processes' memory.
_DEFAULT = "expandable_segments:True"


def choose(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what this server's models need, unless the user has set anything. Processes started from here inherit it."""
    if not any(name in environment for name in SETTINGS):
        environment[SETTINGS[0]] = _DEFAULT
