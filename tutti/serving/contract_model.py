"""The model that a backend's author gives to the contract, and how its tests serve it, ask it and judge its answers."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from tutti.core.dtypes import Array
from tutti.core.errors import InferError, TuttiError
from tutti.core.types import Answer, Call, InferRequest, InferResponse, Tensor
from tutti.serving import local
from tutti.serving.engine import Engine

NAME = "contracted"
TIMEOUT_S = 120.0
SIZE = 5
Inputs = dict[str, Array]


class ContractModel:
    """A model of one backend, whose answers the author can tell; and how the tests serve and ask it.

    The model is batched, for 4 rows or more, and a row of its outputs depends on the same row of its inputs alone.
    """

    # config.pbtxt without the model's name; with `dynamic_batching`.
    config: ClassVar[str]
    # How far outputs may be from those expected, relatively.
    tolerance: ClassVar[float] = 1e-5
    # False where models answer for themselves, as Triton's python models do: an output is what the model says it is.
    has_checked_outputs: ClassVar[bool] = True
    # False where any bytes are a model.
    knows_its_files: ClassVar[bool] = True

    def write(self, folder: Path) -> None:
        """Write the model's files into the folder of a version."""
        raise NotImplementedError

    def inputs(self, rows: int, size: int, rng: np.random.Generator) -> Inputs:
        """Inputs of so many rows, with variable dimensions of `size`; no two calls give the same."""
        raise NotImplementedError

    def outputs(self, inputs: Inputs) -> Inputs:
        """What the model makes of them."""
        raise NotImplementedError

    def poison(self, inputs: Inputs) -> Inputs | None:
        """The inputs changed to such as the model fails on, and the server does not notice; None: there are none."""
        return None

    def proto(self) -> Any:
        return text_format.Parse(self.config, pb.ModelConfig())

    def is_variable(self) -> bool:
        return any(-1 in spec.dims for spec in self.proto().input)

    def folder(self, root: Path, proto: Any = None) -> Path:
        """A repository with the model, by its own configuration or another."""
        version = root / NAME / "1"
        version.mkdir(parents=True)
        self.write(version)
        (root / NAME / "config.pbtxt").write_text(text_format.MessageToString(proto or self.proto()))
        return root

    @contextlib.contextmanager
    def serving(self, root: Path) -> Iterator[Engine]:
        engine = local.make_engine(root, _timer, _no_ensembles, is_controllable=True)
        engine.load_all()
        try:
            yield engine
        finally:
            engine.close()

    @contextlib.contextmanager
    def engine(self, root: Path, proto: Any = None) -> Iterator[Engine]:
        with self.serving(self.folder(root, proto)) as engine:
            assert not engine.failures(), engine.failures()
            yield engine

    def assert_refused(self, root: Path) -> None:
        with self.serving(root) as engine:
            failures = engine.failures()
            assert failures, "it is served"
            assert NAME in failures[0], f"the error does not name the model: {failures[0]}"

    def request(self, rows: int, size: int) -> InferRequest:
        rng = np.random.default_rng(next(_seeds))
        return InferRequest(NAME, {name: Tensor.of(name, x) for name, x in self.inputs(rows, size, rng).items()})

    def ask(self, engine: Engine, sizes: Sequence[tuple[int, int]]) -> list[tuple[InferRequest, Answer]]:
        """Requests of these rows and sizes, sent together, and their answers."""
        requests = [self.request(*size) for size in sizes]
        return list(zip(requests, answers_of(engine, requests), strict=True))

    def ask_in_turns(self, engine: Engine, times: Sequence[int], threads: int = 1) -> None:
        """Each thread asks as soon as it has its answer."""
        failures: list[BaseException] = []

        def ask() -> None:
            try:
                for _ in times:
                    self.check(*self.ask(engine, [(1, SIZE)])[0])
            except BaseException as error:
                failures.append(error)

        asking = [threading.Thread(target=ask) for _ in range(threads)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(TIMEOUT_S)
        if failures:
            raise failures[0]

    def check(self, request: InferRequest, answer: Answer | None) -> None:
        """The answer is this request's, and complete."""
        assert isinstance(answer, InferResponse), f"expected an answer, got {answer!r}"
        assert (answer.model_name, answer.model_version) == (NAME, "1"), "the answer is another model's"
        expected = self.outputs({name: tensor.array() for name, tensor in request.inputs.items()})
        datatypes = {spec.name: pb.DataType.Name(spec.data_type) for spec in self.proto().output}
        wanted = [name for name in datatypes if not request.outputs or name in request.outputs]
        assert sorted(tensor.name for tensor in answer.outputs) == sorted(wanted), "other outputs than asked for"
        for name in wanted:
            tensor, right = answer.tensor(name), expected[name]
            datatype = datatypes[name].removeprefix("TYPE_").replace("STRING", "BYTES")
            assert tensor.datatype == datatype, f"output '{name}' is {tensor.datatype}, configured as {datatype}"
            assert tuple(tensor.shape) == right.shape, f"output '{name}' has shape {tensor.shape}, not {right.shape}"
            array = tensor.array()
            is_right = np.allclose(array, right, self.tolerance, self.tolerance) if array.dtype.kind in "fc" else (
                array.tolist() == right.tolist()
            )  # fmt: skip
            assert is_right, f"output '{name}': expected {right}, got {array}"

    def assert_names_model(self, answer: Answer | None) -> None:
        assert isinstance(answer, InferError), f"expected an error, got {answer!r}"
        assert NAME in answer.message, f"the error does not name the model: {answer.message}"

    def assert_fails_or_fits(self, root: Path, proto: Any) -> None:
        """It is not loaded, or answers with errors, or with outputs as this configuration has them."""
        with self.serving(root) as engine:
            if engine.failures():
                assert NAME in engine.failures()[0]
                return
            for _, answer in self.ask(engine, [(1, SIZE), (2, SIZE)]):
                if not isinstance(answer, InferResponse):
                    self.assert_names_model(answer)
                    continue
                spec, tensor = proto.output[0], answer.tensor(proto.output[0].name)
                assert f"TYPE_{tensor.datatype}".replace("BYTES", "STRING") == pb.DataType.Name(spec.data_type)
                assert len(tensor.shape) == 1 + len(spec.dims), f"{spec.dims} are configured, answered {tensor.shape}"


def _seed_numbers() -> Iterator[int]:
    number = 0
    while True:
        yield (number := number + 1)


_seeds = _seed_numbers()


class Settled:
    """A sink that waits for a number of calls, each settled once."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._condition = threading.Condition()

    def settle(self, calls: Sequence[Call]) -> None:
        with self._condition:
            self._left -= len(calls)
            self._condition.notify_all()

    def wait(self) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: self._left <= 0, TIMEOUT_S), f"{self._left} calls never settled"
            assert self._left == 0, "a call was settled more than once"


def answers_of(engine: Engine, requests: Sequence[InferRequest]) -> list[Answer]:
    sink = Settled(len(requests))
    calls = [Call(request, sink) for request in requests]
    engine(calls)
    sink.wait()
    return [call.answer for call in calls if call.answer is not None]


def _timer(delay_s: float, callback: Callable[[], None]) -> None:
    timer = threading.Timer(delay_s, callback)
    timer.daemon = True
    timer.start()


def _no_ensembles(*_: object) -> Any:
    raise TuttiError("the contract is no ensemble's")


def held() -> tuple[int, int, int]:
    """How many threads, open files and processes this process has; 0 where the system does not say."""
    children = [_read(path) for path in Path("/proc/self/task").glob("*/children")]
    return threading.active_count(), _open_files(), sum(len(numbers.split()) for numbers in children)


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


def _read(path: Path) -> str:
    """What the system says of a thread; "" of one that has ended meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ""


def wait_until(condition: Callable[[], bool], message: str) -> None:
    pause = threading.Event()
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, message
        pause.wait(0.01)
