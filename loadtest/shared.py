"""Inputs in system shared memory: one region with all payloads, which the server reads instead of the wire."""

import os
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
import tritonclient.utils.shared_memory as shm

from tutti.loadtest.scenario import Target


class Region:
    """Filled first, then registered with every address of the target."""

    def __init__(self, target: Target) -> None:
        self.name = f"tutti_loadtest_{os.getpid()}"
        self._target = target
        self._data = bytearray()
        self._handle: Any = None

    def place(self, raw: bytes) -> int:
        """The offset at which these bytes will be."""
        offset = len(self._data)
        self._data += raw
        return offset

    def register(self) -> None:
        """Make it, and tell the servers, which need --allow-client-shm. Raises what tritonclient raises."""
        size = max(1, len(self._data))
        self._handle = shm.create_shared_memory_region(self.name, f"/{self.name}", size)
        shm.set_shared_memory_region(self._handle, [np.frombuffer(bytes(self._data) or b"\0", np.uint8)])
        for client in self._clients():
            client.register_system_shared_memory(self.name, f"/{self.name}", size, headers=self._target.headers)
            client.close()

    def close(self) -> None:
        """The servers forget it, and it goes."""
        for client in self._clients():
            client.unregister_system_shared_memory(self.name, headers=self._target.headers)
            client.close()
        shm.destroy_shared_memory_region(self._handle)

    def _clients(self) -> list[Any]:
        library = httpclient if self._target.protocol == "http" else grpcclient
        return [library.InferenceServerClient(url) for url in self._target.urls]
