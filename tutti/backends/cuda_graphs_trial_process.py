"""The process that tries a model's CUDA graphs (cuda_graphs_trial.py): run as a module, it may die of them.

It loads the model, captures all graphs, and compares them with the model on random inputs.
"""

import importlib
import json
import os
import pickle
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tutti.backends import graph_buckets
from tutti.backends.cuda_graphs_trial import Result
from tutti.backends.graph_buckets import Bucket
from tutti.backends.on_device import Program
from tutti.core.dtypes import NUMPY, Array
from tutti.core.lifeline import end_with
from tutti.core.types import Shape
from tutti.devices.interface import Device, DeviceArray
from tutti.devices.process_engines import engine_of
from tutti.repository import config
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import ModelConfig, TensorSpec

if TYPE_CHECKING:
    from tutti.backends.cuda_graphs import GraphedProgram

_SEED = 0
# Kernels differ a little with the memory they have for working.
_TOLERANCE = 0.02
_MOST_UNEQUAL = 0.01


def main() -> None:
    """The process: reads what to try, and writes the Result. Its argument is a pipe that closes with the server."""
    end_with(int(sys.argv[1]))
    output = os.dup(1)
    os.dup2(2, 1)  # libraries print, too
    path, text, versions, version, device, deadline_s = pickle.loads(sys.stdin.buffer.read())
    signal.setitimer(signal.ITIMER_REAL, deadline_s)  # which ends it, whatever it does by then
    folder = ModelFolder(Path(path), config.parse(text, Path(path).name), versions)
    os.write(output, json.dumps(asdict(attempt(folder, version, device))).encode())
    os._exit(0)  # what has failed might not end


def attempt(folder: ModelFolder, version: int, device: str) -> Result:
    """Load the model and capture its graphs. After a failure nothing more may be asked of the device."""
    from tutti.backends import cuda_graphs  # with PyTorch: the lifeline and the deadline come first

    buckets = graph_buckets.plan(folder.config).buckets
    try:
        engine = engine_of(device)
        inner = _program(folder, version, device)
        program = cuda_graphs.GraphedProgram(folder.config, inner)
        pipeline = engine.pipeline(folder.config.name)
        left_out = cuda_graphs.capture(engine, pipeline, program, buckets)
        if not program.graphs:
            return Result(next(iter(left_out.values())))
        comparison = _Comparison(folder.config, program, inner, engine.device)
        engine.device.call(lambda: engine.device.forward(comparison.run, engine.stream_of(pipeline)))
    except Exception as error:
        return Result(cuda_graphs.reason(error))
    return Result(comparison.difference, {buckets.index(bucket): why for bucket, why in left_out.items()})


def _program(folder: ModelFolder, version: int, device: str) -> Program:
    backend = importlib.import_module(f"tutti.backends.{folder.config.backend}")
    program: Program = backend.program(folder, version, device)
    return program


class _Comparison:
    """Executes random batches with graphs and without: full ones, and such that are filled up.

    A model whose rows depend on each other may do well without filled up batches, but not with them.
    """

    def __init__(self, config: ModelConfig, program: "GraphedProgram", inner: Program, device: Device) -> None:
        self.difference = ""
        self._config = config
        self._program = program
        self._inner = inner
        self._device = device
        self._rng = np.random.default_rng(_SEED)

    def run(self) -> None:
        """In the submitting thread, on the stream that the graphs are of."""
        for captured in self._program.graphs:
            bucket = captured.bucket
            self._compare(bucket, bucket.rows)
            if bucket.least != bucket.rows:  # behind these rows are some of before
                self._compare(bucket, bucket.least)

    def _compare(self, bucket: Bucket, rows: int) -> None:
        names = self._program.outputs
        inputs = {spec.name: self._random(spec, bucket.shape(spec.name)) for spec in self._config.inputs}
        if rows:
            inputs = {name: array[:rows] for name, array in inputs.items()}
        replayed = [self._device.read(array) for array in self._program.execute(inputs, names)]
        expected = [self._device.read(array) for array in self._inner.execute(inputs, names)]
        datatypes = {spec.name: spec.datatype for spec in self._config.outputs}
        for name, array, other in zip(names, replayed, expected, strict=True):
            why = unequal(other, array, datatypes.get(name) == "BF16")
            if why and not self.difference:
                of_rows = f" with {rows} rows" if rows != bucket.rows else ""
                self.difference = f"the graph for {bucket} makes another output '{name}' than the model{of_rows}: {why}"

    def _random(self, spec: TensorSpec, shape: Shape) -> DeviceArray:
        """Valid values: random ones where it is known which are valid. Bits where numpy has no such type."""
        limit = self._config.bounds.ranges.get(spec.name)
        dtype = NUMPY[spec.datatype]
        if spec.datatype == "BF16":
            array = (self._rng.random(shape, np.float32).view(np.uint32) >> 16).astype(dtype)
        elif dtype.kind == "f":
            array = self._rng.random(shape).astype(dtype)
        elif limit is not None:
            array = self._rng.integers(limit.low, limit.high, shape, dtype, endpoint=True)
        else:
            array = np.ones(shape, dtype)
        return self._there(spec.datatype, array)

    def _there(self, datatype: str, array: Array) -> DeviceArray:
        """The array in the device's memory."""
        host, block = self._device.host_block(array.nbytes), self._device.device_block(array.nbytes)
        host.array[: array.nbytes] = array.reshape(-1).view(np.uint8)
        self._device.copy_in(host, block, array.nbytes, self._device.stream())
        self._device.synchronize()
        return self._device.view(block, 0, datatype, array.shape)


def unequal(expected: Array, actual: Array, is_bfloat: bool = False) -> str:
    """In what two outputs differ, beyond what kernels for other numbers of rows may differ in; "" for nothing."""
    if expected.shape != actual.shape:
        return f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    if is_bfloat:
        expected, actual = ((array.astype(np.uint32) << 16).view(np.float32) for array in (expected, actual))
    if expected.dtype.kind != "f":
        share = float(np.mean(expected != actual)) if expected.size else 0.0
        return f"{share:.0%} of its values are others" if share > _MOST_UNEQUAL else ""
    expected, actual = expected.astype(np.float64), actual.astype(np.float64)
    is_finite = np.isfinite(expected)
    if not np.array_equal(is_finite, np.isfinite(actual)):
        return "values are finite in one of them only"
    off = np.abs(expected - actual, where=is_finite, out=np.zeros(expected.shape)).max(initial=0)
    scale = np.abs(expected, where=is_finite, out=np.zeros(expected.shape)).max(initial=0)
    return f"it is off by {off:.3g}, its largest value is {scale:.3g}" if off > _TOLERANCE * scale else ""


if __name__ == "__main__":
    main()
