"""CUDA graphs: batches of some shapes are launched as a whole, in one call, where a model consists of many small ones.

A graph computes on arrays of its own, always the same. A batch is copied into them, behind it are rows that an earlier
batch has left, which are valid, and what is made of the batch's own rows is copied out before the next batch comes.
Graphs are captured when a model loads, while nothing else is under way on the device. A model that cannot be captured
would take the process with it: so a process that may die tries first (cuda_graphs_trial.py).
"""

import logging
import re
import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from tutti.backends import cuda_graphs_trial, graph_buckets
from tutti.backends.capturing import Capturing, CudaCapturing, Graph, Run, SimulatedCapturing, no_collections
from tutti.backends.graph_buckets import Bucket, GraphPlan, are_all_filled_up
from tutti.backends.on_device import DeviceBackend, Program
from tutti.core.types import OnDevice, Shape
from tutti.devices import cuda
from tutti.devices.engine import DeviceEngine
from tutti.devices.interface import Device, DeviceArray, Stream
from tutti.devices.pipeline import Pipeline
from tutti.devices.simulated import simulated_gpus
from tutti.devices.threads import run_and_wait
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import ModelConfig
from tutti.scheduling.captured_sizes import CapturedSizes

_log = logging.getLogger(__name__)

# Libraries choose and compile kernels in a shape's first executions.
_WARM_UPS = 3
# How often a graph is executed to know what it takes.
_REPLAYS = 3
# After so many executions of a shape that has no graph this is told.
_OFTEN = 1000
_MOST_COUNTED = 256
_QUOTED = re.compile(r"[\w.]*(Error|Exception): ")


class NotCaptured(Exception):
    """A capture has failed: PyTorch's allocator may be unusable from now on."""


class Captured:
    """One bucket's graph, with the arrays that it computes on."""

    def __init__(self, bucket: Bucket, inputs: Mapping[str, DeviceArray], graph: Graph, names: Sequence[str]) -> None:
        self.bucket = bucket
        self.graph = graph
        self._inputs = inputs
        self._index = {name: index for index, name in enumerate(names)}

    def execute(self, inputs: Mapping[str, DeviceArray], rows: int, names: Sequence[str]) -> list[DeviceArray]:
        """What is made of a batch, in arrays that are overwritten by the next."""
        part = slice(rows) if self.bucket.rows else ...
        for name, array in inputs.items():
            self._inputs[name][part] = array
        self.graph.replay()
        outputs = self.graph.outputs
        return [outputs[self._index[name]][part] for name in names]


class GraphedProgram:
    """A Program (on_device.py) around another, which executes what there are no graphs for."""

    def __init__(self, config: ModelConfig, program: Program) -> None:
        self.library = program.library
        self.inputs = program.inputs
        self._config = config
        self._program = program
        self.outputs = [spec.name for spec in config.outputs]
        self.outputs += [state.output_name for state in config.sequences.states] if config.sequences is not None else []
        self._graphs: dict[tuple[Shape, ...], list[Captured]] = {}
        self._capturing: Capturing | None = None
        self._misses: Counter[tuple[Shape, ...]] = Counter()

    @property
    def graphs(self) -> list[Captured]:
        """From the smallest to the largest."""
        graphs = [captured for of_shape in self._graphs.values() for captured in of_shape]
        return sorted(graphs, key=lambda captured: captured.bucket.elements)

    # Executing.

    def execute(self, inputs: Mapping[str, DeviceArray], names: Sequence[str]) -> Sequence[DeviceArray]:
        rows, captured = self._find(inputs)
        if captured is None:
            return self._program.execute(inputs, names)
        assert self._capturing is not None
        return [self._capturing.copied(array) for array in captured.execute(inputs, rows, names)]

    def concatenate(self, arrays: Sequence[DeviceArray]) -> DeviceArray:
        return self._program.concatenate(arrays)

    def adopt(self, tensor: OnDevice) -> DeviceArray:
        return self._program.adopt(tensor)

    def close(self) -> None:
        """The graphs go first: they refer to what the program holds."""
        try:
            self._drop()
        finally:
            self._program.close()

    def _drop(self) -> None:
        graphs, self._graphs = self.graphs, {}
        for captured in graphs:
            captured.graph.close()

    def _find(self, inputs: Mapping[str, DeviceArray]) -> tuple[int, Captured | None]:
        """The smallest graph for the inputs, and how many rows they have."""
        if len(inputs) != len(self.inputs):
            return 0, None
        is_batched = self._config.is_batched
        shapes = [tuple(inputs[name].shape) for name in self.inputs]
        rows = shapes[0][0] if is_batched else 0
        key = tuple([shape[1:] for shape in shapes]) if is_batched else tuple(shapes)
        if not is_batched or [shape[0] for shape in shapes] == [rows] * len(shapes):
            for captured in self._graphs.get(key, ()):
                if captured.bucket.least <= rows <= captured.bucket.rows:
                    return rows, captured
        self._missed(tuple(shapes))
        return rows, None

    def _missed(self, shapes: tuple[Shape, ...]) -> None:
        if len(self._misses) >= _MOST_COUNTED and shapes not in self._misses:
            return
        self._misses[shapes] += 1
        if self._misses[shapes] == _OFTEN:
            shown = ", ".join(f"'{name}' {list(shape)}" for name, shape in zip(self.inputs, shapes, strict=True))
            message = "model '%s': %s has been executed %d times, and there is no CUDA graph for it"
            _log.info(message, self._config.name, shown, _OFTEN)

    # Capturing.

    def capture(self, buckets: Sequence[Bucket], capturing: Capturing, device: Device) -> dict[Bucket, str]:
        """Capture graphs, the largest first, in whose memory the others find room.

        In the submitting thread, the stream its current one. Returns which have none, as the model cannot execute them,
        and why. Raises NotCaptured where a capture fails, or the device is lost; there are no graphs then.
        """
        self._capturing = capturing
        inputs: dict[tuple[Shape, ...], dict[str, DeviceArray]] = {}
        left_out = {}
        for bucket in sorted(buckets, key=lambda bucket: bucket.elements, reverse=True):
            key = tuple([bucket.shapes[name] for name in self.inputs])
            is_warm = False
            try:
                largest = inputs.get(key) or self._filled(bucket)
                run = self._warmed_up(bucket, _first_rows(largest, bucket), device)
                is_warm = True
                captured = Captured(bucket, _first_rows(largest, bucket), capturing.capture(run), self.outputs)
                captured.graph.replay()  # the first one takes longer
                device.synchronize()
            except Exception as error:
                if is_warm or device.fault(error):
                    self._graphs = {}
                    raise NotCaptured(f"{bucket}: {reason(error)}") from error
                left_out[bucket] = reason(error)
            else:
                inputs[key] = largest
                self._graphs.setdefault(key, []).insert(0, captured)
        return left_out

    def measured(self, device: Device, stream: Stream) -> dict[Hashable, CapturedSizes]:
        """The sizes that there are for batches of each key (Call.key), and what they take on the device.

        In the submitting thread, the stream its current one, with nothing else under way.
        """
        sizes: dict[Hashable, CapturedSizes] = {}
        for graphs in self._graphs.values():
            if are_all_filled_up([captured.bucket for captured in graphs]):
                times = {captured.bucket.rows: _execution_ns(captured, device, stream) for captured in graphs}
                sizes[tuple(sorted(graphs[0].bucket.shapes.items()))] = CapturedSizes(list(times), times)
        return sizes

    def _filled(self, bucket: Bucket) -> dict[str, DeviceArray]:
        assert self._capturing is not None
        datatypes = {spec.name: spec.datatype for spec in self._config.inputs}
        return {
            name: self._capturing.filled(
                datatypes[name], bucket.shape(name), valid_value(self._config, name, datatypes[name])
            )
            for name in self.inputs
        }

    def _warmed_up(self, bucket: Bucket, inputs: Mapping[str, DeviceArray], device: Device) -> Run:
        """What is to be captured, once it has run. Raises what it fails with, and ValueError for what fits no graph."""
        assert self._capturing is not None
        capturing = self._capturing

        def run() -> Sequence[DeviceArray]:
            return self._program.execute(inputs, self.outputs)

        def run_on_copies() -> Sequence[DeviceArray]:
            copies = {name: capturing.copied(array) for name, array in inputs.items()}
            return self._program.execute(copies, self.outputs)

        stamps = [capturing.stamp(array) for array in inputs.values()]
        for name, output in zip(self.outputs, run(), strict=True):
            if bucket.rows and (not output.shape or output.shape[0] != bucket.rows):
                raise ValueError(f"output '{name}' has shape {list(output.shape)} for {bucket.rows} rows")
        to_capture: Run = run
        if stamps != [capturing.stamp(array) for array in inputs.values()]:
            # A model that writes to its inputs would go on with what its last execution has left of them.
            to_capture = run_on_copies
            for name, array in self._filled(bucket).items():
                inputs[name][...] = array
        for _ in range(_WARM_UPS):
            to_capture()
        device.synchronize()
        return to_capture


def _execution_ns(captured: Captured, device: Device, stream: Stream) -> int:
    """The least of some replays: others can only have added to it."""
    took = []
    for _ in range(_REPLAYS):
        begins, ends = device.event(), device.event()
        device.record(begins, stream)
        captured.graph.replay()
        device.record(ends, stream)
        device.synchronize()
        took.append(device.elapsed_ns(begins, ends))
    return min(took)


def _first_rows(inputs: Mapping[str, DeviceArray], bucket: Bucket) -> Mapping[str, DeviceArray]:
    return {name: array[: bucket.rows] for name, array in inputs.items()} if bucket.rows else inputs


def valid_value(config: ModelConfig, name: str, datatype: str) -> int:
    """What an input may hold everywhere: in bounds, 1 for integers, as masks that are all 0 make no sense, else 0."""
    if datatype.startswith(("FP", "BF")):
        return 0
    limit = config.bounds.ranges.get(name)
    return 1 if limit is None else min(max(1, limit.low), limit.high)


def reason(error: BaseException) -> str:
    """The line of an error that tells most: TorchScript quotes the one that it has met behind its own words."""
    first, *others = str(error).strip().splitlines() or [""]
    if isinstance(error, NotCaptured):
        return first
    quoted = [line for line in others if _QUOTED.match(line)]
    return quoted[-1].removeprefix("builtins.") if quoted else f"{type(error).__name__}: {first}".removesuffix(": ")


def capture(
    engine: DeviceEngine, pipeline: Pipeline, program: GraphedProgram, buckets: Sequence[Bucket]
) -> dict[Bucket, str]:
    """Capture graphs of a pipeline's executions, when the device has nothing else to do. Blocks until then.

    Returns and raises what GraphedProgram.capture does.
    """
    left_out: dict[Bucket, str] = {}

    def work() -> None:
        stream, device = engine.stream_of(pipeline), engine.device
        capturing = SimulatedCapturing() if simulated_gpus() else CudaCapturing(device.name, stream)
        with no_collections():
            left_out.update(device.forward(lambda: program.capture(buckets, capturing, device), stream))

    with cuda.loading:
        run_and_wait(engine.alone, work)
    return left_out


def measure(engine: DeviceEngine, pipeline: Pipeline, program: GraphedProgram) -> dict[Hashable, CapturedSizes]:
    """As GraphedProgram.measured, when the device has nothing else to do. Blocks until then."""
    sizes: dict[Hashable, CapturedSizes] = {}

    def work() -> None:
        stream, device = engine.stream_of(pipeline), engine.device
        sizes.update(device.forward(lambda: program.measured(device, stream), stream))

    run_and_wait(engine.alone, work)
    return sizes


class ModelGraphs:
    """The graphs of one model's instances: none where it does not ask for any."""

    def __init__(self, folder: ModelFolder, version: int) -> None:
        """Raises ConfigError for what cannot be."""
        self._folder = folder
        self._version = version
        self._plan = graph_buckets.plan(folder.config) if graph_buckets.are_wanted(folder.config) else GraphPlan()
        self._buckets: dict[str, Sequence[Bucket]] = {}
        self._are_notes_told = False

    @property
    def are_planned(self) -> bool:
        return bool(self._plan.buckets)

    def try_on(self, device: str) -> None:
        """Find out what can be captured there. Best done before the weights are loaded: the trial loads its own."""
        name = self._folder.config.name
        for note in () if self._are_notes_told else self._plan.notes:
            _log.warning("model '%s': %s", name, note)
        self._are_notes_told = True
        if device in self._buckets or not self._plan.buckets:
            return
        result = cuda_graphs_trial.run(self._folder, self._version, device)
        if result.failure:
            _log.warning("model '%s': it runs on %s without CUDA graphs: %s", name, device, result.failure)
        left_out = {self._plan.buckets[index]: why for index, why in result.left_out.items()}
        self._tell(device, left_out)
        self._buckets[device] = (
            [] if result.failure else [bucket for bucket in self._plan.buckets if bucket not in left_out]
        )

    def add_to(self, backend: DeviceBackend) -> None:
        """Capture an instance's graphs, before it serves."""
        self.try_on(backend.device)
        buckets = self._buckets.get(backend.device)
        if not buckets:
            return
        start = time.monotonic()
        program = GraphedProgram(backend.config, backend.program)
        name, device = backend.config.name, backend.device
        try:
            left_out = capture(backend.engine, backend.pipeline, program, buckets)
            backend.pipeline.captured = measure(backend.engine, backend.pipeline, program)
        except Exception as error:
            if not backend.engine.report(error):
                message = (
                    "model '%s': it runs on %s without CUDA graphs, a capture has failed; start the server anew: %s"
                )
                _log.error(message, name, device, reason(error))
            return
        self._tell(device, left_out)
        backend.program = program
        seconds = time.monotonic() - start
        _log.info("model '%s': %d CUDA graphs on %s in %.1f s", name, len(program.graphs), device, seconds)

    def _tell(self, device: str, left_out: Mapping[Bucket, str]) -> None:
        for bucket, why in left_out.items():
            _log.warning("model '%s': no CUDA graph on %s for %s: %s", self._folder.config.name, device, bucket, why)
