"""How work on a device is captured, to be submitted again as a whole: on GPUs as PyTorch's CUDA graphs.

Knows no model: who captures has the work executed before, on the same stream, and nothing else under way on the device.
"""

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from tutti.core.dtypes import NUMPY, Array
from tutti.core.types import Shape
from tutti.devices import cuda
from tutti.devices.interface import DeviceArray

Run = Callable[[], Sequence[DeviceArray]]


class Graph(Protocol):
    """Work that has been captured."""

    @property
    def outputs(self) -> Sequence[DeviceArray]:
        """What it computes: overwritten by each replay."""

    def replay(self) -> None:
        """Submit the work to the current stream."""

    def close(self) -> None:
        """Release what it holds on the device."""


class Capturing(Protocol):
    """How work on one stream is captured. Called in the device's submitting thread, the stream its current one."""

    def filled(self, datatype: str, shape: Shape, value: int) -> DeviceArray:
        """A new array of such values."""

    def copied(self, array: DeviceArray) -> DeviceArray:
        """A new array of the same elements, in the current stream's order."""

    def stamp(self, array: DeviceArray) -> Hashable:
        """Another value after the array has been written to."""

    def capture(self, run: Run) -> Graph:
        """What `run` submits; it has run before, and nothing else is under way on the device."""


@dataclass(frozen=True, slots=True)
class _CudaGraph:
    graph: Any
    outputs: Sequence[DeviceArray]

    def replay(self) -> None:
        self.graph.replay()

    def close(self) -> None:
        self.graph.reset()


class CudaCapturing:
    """On a GPU. All graphs of a stream share their memory: they never overlap."""

    def __init__(self, device: str, stream: Any) -> None:
        self._device = device
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()

    def filled(self, datatype: str, shape: Shape, value: int) -> Any:
        return torch.full(tuple(shape), value, dtype=cuda.TORCH[datatype], device=self._device)

    def copied(self, array: Any) -> Any:
        return array.clone()

    def stamp(self, array: Any) -> int:
        return int(array._version)

    def capture(self, run: Run) -> _CudaGraph:
        graph = torch.cuda.CUDAGraph()
        failure: Exception | None = None
        # What other threads ask of the driver meanwhile spoils nothing in this mode.
        begun = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with cuda.caches, begun:
                try:
                    outputs = run()
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:  # the capture's end, which fails then, too, says less
            raise failure or error from None
        return _CudaGraph(graph, outputs)


@contextmanager
def no_collections() -> Iterator[None]:
    """A graph that the garbage collector found would be destroyed while another is captured, which spoils that."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _SimulatedGraph:
    def __init__(self, run: Run) -> None:
        self._run = run
        self.outputs: Sequence[DeviceArray] = [np.array(output) for output in run()]

    def replay(self) -> None:
        for output, again in zip(self.outputs, self._run(), strict=True):
            output[...] = again

    def close(self) -> None:
        self.outputs = ()


class SimulatedCapturing:
    """On a simulated device a graph runs the same work again, on the same memory."""

    def filled(self, datatype: str, shape: Shape, value: int) -> Array:
        return np.full(shape, value, NUMPY[datatype])

    def copied(self, array: Array) -> Array:
        return np.array(array)

    def stamp(self, array: Array) -> bytes:
        return array.tobytes()

    def capture(self, run: Run) -> _SimulatedGraph:
        return _SimulatedGraph(run)
