"""Python models with tensors on a GPU: on a fake one in process, and on a real one where there is one."""

from typing import Any

import numpy as np
import pytest

from tests.devices.fakes import CudaArray, FakeLibrary
from tests.models import Repository
from tests.serving import engine_over, infer
from tests.tutti.test_pytorch_backend import load_error
from tutti.backends.python import instances, loading, model
from tutti.backends.python import triton_python_backend_utils as pb_utils
from tutti.core.errors import DeviceLost, Internal, OutOfMemory
from tutti.core.types import Answer, InferRequest, InferResponse, Tensor
from tutti.devices import dlpack, process_engines, tensors
from tutti.devices import health as devices_health
from tutti.devices.health import DeviceHealth
from tutti.devices.tensors import DeviceTensor
from tutti.repository.model_config import InstanceGroup
from tutti.serving.engine import Engine

CONFIG = """
backend: "python" max_batch_size: {rows}
input {{ name: "x" data_type: TYPE_FP32 dims: 2 }}
output {{ name: "y" data_type: TYPE_FP32 dims: 2 }}
instance_group {{ kind: KIND_CPU }}
parameters {{ key: "tutti.isolate" value {{ string_value: "no" }} }}
{extra}
"""
ON_DEVICE = 'parameters { key: "FORCE_CPU_ONLY_INPUT_TENSORS" value { string_value: "no" } }'
PLUS_ONE_ON_CUDA = """
from tests.devices.fakes import CudaArray
x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
return pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("y", CudaArray(x + 1))])
"""
WHERE = """
tensor, (same,) = pb_utils.get_input_tensor_by_name(request, "x"), request.inputs()
assert tensor.is_cpu() == same.is_cpu() and tensor.shape() == same.shape() == [1, 2]
y = pb_utils.Tensor("y", np.zeros((1, 2), np.float32))
return pb_utils.InferenceResponse([y], parameters={"is_cpu": tensor.is_cpu()})
"""


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    library = FakeLibrary()
    monkeypatch.setattr(tensors, "library_for", lambda exporter: library)
    return library


@pytest.fixture
def health(monkeypatch: pytest.MonkeyPatch) -> DeviceHealth:
    health = DeviceHealth()
    monkeypatch.setattr(devices_health, "health", health)
    return health


def add(repository: Repository, name: str, execute: str, rows: int = 4, extra: str = "", setup: str = "pass") -> None:
    repository.add_python(name, CONFIG.format(rows=rows, extra=extra), execute, setup)


def request(model: str, *values: float, device: bool = False, takes: str = "") -> InferRequest:
    array = np.array([values], np.float32)
    data: Any = DeviceTensor.of(CudaArray(array)) if device else array
    outputs = frozenset({takes}) if takes else frozenset()
    return InferRequest(model, {"x": Tensor("x", "FP32", array.shape, data)}, device_outputs=outputs)


def ask(engine: Engine, sent: InferRequest) -> Answer:
    (answer,) = infer(engine, [sent])
    return answer


def response(answer: Answer) -> InferResponse:
    assert isinstance(answer, InferResponse), answer
    return answer


def test_an_output_on_a_device_comes_to_the_host_once(repository: Repository, library: FakeLibrary) -> None:
    add(repository, "m", PLUS_ONE_ON_CUDA)
    with engine_over(repository.root) as engine:
        tensor = response(ask(engine, request("m", 1, 2))).tensor("y")
        assert isinstance(tensor.data, np.ndarray)
        assert tensor.array().tolist() == [[2.0, 3.0]]
    assert library.log == ["waited", "to host"]


def test_an_output_stays_on_its_device_for_a_caller_that_takes_it(repository: Repository, library: FakeLibrary) -> None:
    add(repository, "m", PLUS_ONE_ON_CUDA)
    with engine_over(repository.root) as engine:
        tensor = response(ask(engine, request("m", 1, 2, takes="y"))).tensor("y")
        assert isinstance(tensor.data, DeviceTensor)
        assert (tensor.datatype, tensor.shape, tensor.data.device) == ("FP32", (1, 2), "cuda:0")
        assert "to host" not in library.log
        assert tensor.array().tolist() == [[2.0, 3.0]]
        other = response(ask(engine, request("m", 1, 2, takes="z"))).tensor("y")
        assert isinstance(other.data, np.ndarray)


@pytest.mark.parametrize("takes", ["", "y"])
def test_a_model_may_use_its_memory_again(repository: Repository, library: FakeLibrary, takes: str) -> None:
    """As one with CUDA graphs does: all answers are made in the same memory."""
    again = """
    from tests.devices.fakes import CudaArray
    self.memory[:] = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    return pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("y", CudaArray(self.memory))])
    """
    add(repository, "m", again, setup="self.memory = np.zeros((1, 2), np.float32)")
    with engine_over(repository.root) as engine:
        first = response(ask(engine, request("m", 1, 1, takes=takes))).tensor("y")
        second = response(ask(engine, request("m", 2, 2, takes=takes))).tensor("y")
        assert first.array().tolist() == [[1.0, 1.0]]
        assert second.array().tolist() == [[2.0, 2.0]]


def test_an_output_that_is_not_asked_for_is_not_copied(repository: Repository, library: FakeLibrary) -> None:
    add(
        repository,
        "m",
        """
        from tests.devices.fakes import CudaArray
        made = [pb_utils.Tensor.from_dlpack(name, CudaArray(np.zeros((1, 2), np.float32))) for name in ("y", "z")]
        return pb_utils.InferenceResponse(made)
        """,
        extra='output { name: "z" data_type: TYPE_FP32 dims: 2 }',
    )
    with engine_over(repository.root) as engine:
        sent = request("m", 1, 2)
        sent.outputs = ("z",)
        assert [t.name for t in response(ask(engine, sent)).outputs] == ["z"]
    assert library.log.count("to host") == 1


def test_an_output_of_another_datatype_passes_as_the_model_made_it(
    repository: Repository, library: FakeLibrary
) -> None:
    add(repository, "m", PLUS_ONE_ON_CUDA.replace("x + 1", "x.astype(np.int64)"))
    with engine_over(repository.root) as engine:
        for takes in ("", "y"):
            (output,) = response(ask(engine, request("m", 1, 2, takes=takes))).outputs
            assert (output.datatype, output.array().tolist()) == ("INT64", [[1, 2]])


@pytest.mark.parametrize(("extra", "is_cpu"), [("", True), (ON_DEVICE, False), (ON_DEVICE.replace("no", "yes"), True)])
def test_inputs_on_a_device(repository: Repository, library: FakeLibrary, extra: str, is_cpu: bool) -> None:
    add(repository, "m", WHERE, extra=extra)
    with engine_over(repository.root) as engine:
        answer = response(ask(engine, request("m", 1, 2, device=True)))
        assert answer.parameters["is_cpu"] is is_cpu
        assert ("to host" in library.log) is is_cpu
        assert "waited" in library.log  # the elements are there before a model has them
        assert response(ask(engine, request("m", 1, 2))).parameters["is_cpu"] is True  # nobody moves them there


def test_a_wrong_choice_of_inputs_is_refused(repository: Repository) -> None:
    add(repository, "m", WHERE, extra=ON_DEVICE.replace('"no"', '"maybe"'))
    assert "model 'm': parameters.FORCE_CPU_ONLY_INPUT_TENSORS: expected 'yes' or 'no', got 'maybe'" in load_error(
        repository
    )


STICKY = "CUDA error: device-side assert triggered"


def test_a_device_that_fails_in_execute_is_reported(
    repository: Repository, library: FakeLibrary, health: DeviceHealth
) -> None:
    add(repository, "m", f"raise RuntimeError({STICKY!r})", extra="")
    with engine_over(repository.root) as engine:
        answer = ask(engine, request("m", 1, 2))
        assert isinstance(answer, DeviceLost)
        assert answer.message == f"model 'm': device cuda:0 has failed: RuntimeError: {STICKY}"
    assert health.failures() == {"cuda:0": f"model 'm': RuntimeError: {STICKY}"}


@pytest.mark.parametrize("takes", ["", "y"])
def test_a_device_that_fails_behind_an_answer_is_reported(
    repository: Repository, library: FakeLibrary, health: DeviceHealth, takes: str
) -> None:
    """A GPU's work is done later: execute has returned, and its answers are not there."""
    add(repository, "m", PLUS_ONE_ON_CUDA)
    with engine_over(repository.root) as engine:
        library.error = RuntimeError(STICKY)
        assert isinstance(ask(engine, request("m", 1, 2, takes=takes)), DeviceLost)
    assert list(health.failures()) == ["cuda:0"]


def test_a_device_that_fails_behind_a_sent_answer_is_reported(
    repository: Repository, library: FakeLibrary, health: DeviceHealth
) -> None:
    sends = PLUS_ONE_ON_CUDA.replace("return ", "answer = ") + (
        "request.get_response_sender().send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)\n"
    )
    add(repository, "m", sends)
    with engine_over(repository.root) as engine:
        assert response(ask(engine, request("m", 1, 2))).tensor("y").array().tolist() == [[2.0, 3.0]]
        library.error = RuntimeError(STICKY)
        assert isinstance(ask(engine, request("m", 1, 2)), DeviceLost)
    assert list(health.failures()) == ["cuda:0"]


def test_a_device_that_fails_in_initialize_is_reported(repository: Repository, health: DeviceHealth) -> None:
    add(repository, "m", WHERE, setup=f"raise RuntimeError({STICKY!r})")
    assert STICKY in load_error(repository)
    assert list(health.failures()) == ["cuda:0"]


def test_other_failures_are_the_models_own(repository: Repository, library: FakeLibrary, health: DeviceHealth) -> None:
    add(repository, "m", "raise ValueError('no')")
    add(repository, "full", "raise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')")
    with engine_over(repository.root) as engine:
        answer = ask(engine, request("m", 1, 2))
        assert isinstance(answer, Internal) and "execute raised ValueError: no" in answer.message
        assert isinstance(ask(engine, request("full", 1, 2)), OutOfMemory)
    assert health.failures() == {}


@pytest.mark.parametrize("is_lost", [True, False])
def test_after_an_unclear_failure_the_device_is_asked(
    repository: Repository, health: DeviceHealth, monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    monkeypatch.setattr(tensors, "failure", lambda device: STICKY if is_lost else "")
    add(repository, "m", "raise RuntimeError('CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm')")
    with engine_over(repository.root) as engine:
        answer = ask(engine, request("m", 1, 2))
    assert isinstance(answer, DeviceLost) is is_lost
    assert bool(health.failures()) is is_lost


ASKS = """
memory = {memory}
inner = pb_utils.InferenceRequest(
    model_name="inner", requested_output_names={names}, inputs=[pb_utils.get_input_tensor_by_name(request, "x")],
    **({{}} if memory is None else {{"preferred_memory": memory}}))
y = pb_utils.get_output_tensor_by_name(inner.exec(), "y")
device = y.__dlpack_device__()
return pb_utils.InferenceResponse([y], parameters={{"is_cpu": y.is_cpu(), "number": device[1], "kind": device[0]}})
"""
CPU = "pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU)"


@pytest.mark.parametrize(
    ("inner", "memory", "names", "expected"),
    [
        (PLUS_ONE_ON_CUDA, "None", ["y"], (dlpack.CUDA, 0)),
        (PLUS_ONE_ON_CUDA, CPU, ["y"], (dlpack.CPU, 0)),
        (PLUS_ONE_ON_CUDA, "pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_GPU)", ["y"], (dlpack.CUDA, 0)),
        (PLUS_ONE_ON_CUDA, "pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_GPU, 1)", ["y"], (dlpack.CUDA, 1)),
        (PLUS_ONE_ON_CUDA, "pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_GPU, 9)", ["y"], (dlpack.CUDA, 0)),
        (PLUS_ONE_ON_CUDA, "None", [], (dlpack.CPU, 0)),
        (PLUS_ONE_ON_CUDA.replace("CudaArray(x + 1)", "x + 1"), "None", ["y"], (dlpack.CPU, 0)),
        (
            PLUS_ONE_ON_CUDA.replace("CudaArray(x + 1)", "x + 1"),
            "pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_GPU, 1)",
            ["y"],
            (dlpack.CUDA, 1),
        ),
    ],
)
def test_a_model_that_asks_another_says_where_it_wants_the_answer(
    repository: Repository, library: FakeLibrary, inner: str, memory: str, names: list[str], expected: tuple[int, int]
) -> None:
    add(repository, "inner", inner)
    add(repository, "outer", ASKS.format(memory=memory, names=names))
    with engine_over(repository.root) as engine:
        answer = response(ask(engine, request("outer", 1, 2)))
    assert answer.tensor("y").array().tolist() == [[2.0, 3.0]]
    assert (answer.parameters["kind"], answer.parameters["number"]) == expected
    assert answer.parameters["is_cpu"] is (expected[0] == dlpack.CPU)


def test_a_model_hands_a_tensor_on_a_device_to_another(repository: Repository, library: FakeLibrary) -> None:
    add(repository, "inner", WHERE, extra=ON_DEVICE)
    asks = ASKS.format(memory="None", names=["y"]).replace(
        'pb_utils.get_input_tensor_by_name(request, "x")', 'pb_utils.Tensor.from_dlpack("x", made)'
    )
    asks = "from tests.devices.fakes import CudaArray\nmade = CudaArray(np.ones((1, 2), np.float32))\n" + asks
    asks = asks.replace(
        'y = pb_utils.get_output_tensor_by_name(inner.exec(), "y")',
        (
            'answer = inner.exec()\ny = pb_utils.get_output_tensor_by_name(answer, "y")\n'
            'assert json.loads(answer.parameters())["is_cpu"] is False'
        ),
    )
    add(repository, "outer", asks)
    with engine_over(repository.root) as engine:
        response(ask(engine, request("outer", 1, 2)))


def test_other_backends_take_it_from_the_host(repository: Repository, library: FakeLibrary) -> None:
    repository.add_onnx("inner")
    with engine_over(repository.root) as engine:
        arrays = [np.full((1, 4), i, np.float32) for i in range(3)]
        inputs = [DeviceTensor.of(CudaArray(arrays[0])), arrays[1].tobytes(), DeviceTensor.of(CudaArray(arrays[2]))]
        sent = [InferRequest("inner", {"x": Tensor("x", "FP32", (1, 4), data)}) for data in inputs]
        for answer, array in zip(infer(engine, sent), arrays, strict=True):
            assert response(answer).tensor("y").array().tolist() == (array + 1).tolist()


@pytest.mark.parametrize(
    ("kind", "listed", "gpus", "expected"),
    [
        ("auto", (), 0, "CPU"),
        ("auto", (), 1, "GPU"),
        ("auto", (0, 1), 2, "GPU"),
        ("auto", (0, 1), 1, "CPU"),
        ("cpu", (), 2, "CPU"),
        ("gpu", (1,), 2, "GPU"),
    ],
)
def test_kinds_of_instances(kind: str, listed: tuple[int, ...], gpus: int, expected: str) -> None:
    assert instances.instance_kind(InstanceGroup(kind, 1, listed), gpus) == expected


@pytest.mark.parametrize(("gpus", "expected"), [(0, ["CPU", "0"]), (2, ["GPU", "1"])])
def test_an_instance_is_told_its_kind_and_device(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, gpus: int, expected: list[str]
) -> None:
    for module in (instances, loading, model):
        monkeypatch.setattr(module, "gpu_count", lambda: gpus)
    config = CONFIG.replace("kind: KIND_CPU", "gpus: 1").format(rows=4, extra="")
    repository.add_python(
        "m",
        config,
        'y = pb_utils.Tensor("y", np.zeros((1, 2), np.float32))\n'
        'return pb_utils.InferenceResponse([y], parameters={"told": json.dumps(self.told)})',
        'self.told = [args["model_instance_kind"], args["model_instance_device_id"]]',
    )
    with engine_over(repository.root) as engine:
        assert response(ask(engine, request("m", 1, 2))).parameters["told"] == str(expected).replace("'", '"')


class TestTensor:
    """pb_utils.Tensor by itself."""

    def test_on_a_device(self, library: FakeLibrary) -> None:
        for made in (CudaArray(np.ones((2, 3), np.int32), 1), CudaArray(np.ones((2, 3), np.int32), 1).__dlpack__()):
            tensor = pb_utils.Tensor.from_dlpack("x", made)
            assert not tensor.is_cpu()
            assert (tensor.name(), tensor.shape(), tensor.triton_dtype()) == ("x", [2, 3], 8)
            assert tensor.__dlpack_device__() == (dlpack.CUDA, 1)
            for capsule in (tensor.to_dlpack(), tensor.__dlpack__(stream=1), tensor.__dlpack__()):
                assert dlpack.describe(capsule) == dlpack.Description(dlpack.CUDA, 1, "INT32", (2, 3))
            with pytest.raises(pb_utils.TritonModelException, match="stored in GPU and cannot be converted to NumPy"):
                tensor.as_numpy()

    @pytest.mark.parametrize("is_capsule", [True, False])
    @pytest.mark.parametrize("shape", [(2, 3), (), (0, 4)])
    @pytest.mark.parametrize(("name", "number"), [("float32", 11), ("bool", 1), ("int64", 9), ("bfloat16", 14)])
    def test_torch_both_ways(self, name: str, number: int, shape: Any, is_capsule: bool) -> None:
        torch = pytest.importorskip("torch")
        source = torch.ones(shape, dtype=getattr(torch, name))
        made = torch.utils.dlpack.to_dlpack(source) if is_capsule else source
        tensor = pb_utils.Tensor.from_dlpack("x", made)
        assert tensor.is_cpu()
        assert (tensor.shape(), tensor.triton_dtype()) == (list(shape), number)
        assert tensor.__dlpack_device__() == (dlpack.CPU, 0)
        for back in (torch.from_dlpack(tensor), torch.utils.dlpack.from_dlpack(tensor.to_dlpack())):
            assert back.dtype == source.dtype
            assert torch.equal(back, source)
        if name == "bfloat16":
            with pytest.raises(pb_utils.TritonModelException, match=r"dtype is BF16 and .* Use to_dlpack\(\)"):
                tensor.as_numpy()
        else:
            assert np.array_equal(tensor.as_numpy(), source.numpy())

    def test_no_byte_is_copied(self) -> None:
        torch = pytest.importorskip("torch")
        source = torch.zeros(3)
        tensor = pb_utils.Tensor.from_dlpack("x", source)
        source += 1
        assert tensor.as_numpy().tolist() == [1.0, 1.0, 1.0]
        numbers = np.zeros(3, np.float32)
        there = torch.from_dlpack(pb_utils.Tensor("x", numbers))
        numbers += 2
        assert there.tolist() == [2.0, 2.0, 2.0]

    def test_read_only_arrays(self) -> None:
        numbers = np.frombuffer(np.ones(2, np.float32).tobytes(), np.float32)
        assert pb_utils.Tensor.from_dlpack("x", numbers).as_numpy().tolist() == [1.0, 1.0]
        assert np.from_dlpack(pb_utils.Tensor("x", numbers)).tolist() == [1.0, 1.0]

    def test_text_has_no_dlpack(self) -> None:
        for array in (np.array([b"a"], dtype=object), np.array(["a"])):
            with pytest.raises(pb_utils.TritonModelException, match="not have support for string tensors"):
                pb_utils.Tensor("x", array).to_dlpack()

    @pytest.mark.parametrize(
        ("made", "says"),
        [
            (np.zeros((2, 3)).T, "tensor 'x': DLPack tensor is not contiguous"),
            (np.zeros(2, np.complex64), "tensor 'x': DLPack tensor has elements of a type"),
            ([1, 2], "tensor 'x': Provided tensor is not supported.* got a list"),
        ],
    )
    def test_what_is_refused(self, made: Any, says: str) -> None:
        with pytest.raises(pb_utils.TritonModelException, match=says):
            pb_utils.Tensor.from_dlpack("x", made)

    def test_other_devices_and_no_name_are_refused(self, library: FakeLibrary) -> None:
        class Elsewhere(CudaArray):
            def __dlpack_device__(self) -> tuple[int, int]:
                return 8, 0

        with pytest.raises(pb_utils.TritonModelException, match="DLDevice type 8 is not support"):
            pb_utils.Tensor.from_dlpack("x", Elsewhere(np.zeros(1)))
        for make in (pb_utils.Tensor, pb_utils.Tensor.from_dlpack):
            with pytest.raises(pb_utils.TritonModelException, match="cannot be an empty string"):
                make("", np.zeros(1))
        with pytest.raises(pb_utils.TritonModelException, match="unknown memory type 7"):
            pb_utils.PreferredMemory(7)


BF16 = """
backend: "python"
input { name: "x" data_type: TYPE_BF16 dims: 2 }
output { name: "y" data_type: TYPE_BF16 dims: 2 }
instance_group { kind: KIND_CPU }
"""


def test_bf16_goes_through_a_model(repository: Repository) -> None:
    pytest.importorskip("torch")
    repository.add_python(
        "m",
        BF16,
        """
        import torch
        x = torch.from_dlpack(pb_utils.get_input_tensor_by_name(request, "x").to_dlpack())
        assert x.dtype == torch.bfloat16
        return pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("y", x * 2)])
        """,
    )
    numbers = np.array([0x3F80, 0x4000], np.uint16)
    with engine_over(repository.root) as engine:
        answer = response(ask(engine, InferRequest("m", {"x": Tensor("x", "BF16", (2,), numbers.tobytes())})))
        assert answer.tensor("y").datatype == "BF16"
        assert answer.tensor("y").array().tolist() == [0x4000, 0x4080]


@pytest.fixture
def cuda() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch


TORCH_STEP = """
import torch
tensor = pb_utils.get_input_tensor_by_name(request, "x")
x = torch.from_dlpack(tensor.to_dlpack()).to("cuda")
y = pb_utils.Tensor.from_dlpack("y", {made})
assert not y.is_cpu()
return pb_utils.InferenceResponse([y], parameters={{"is_cpu": tensor.is_cpu()}})
"""
CHAIN = """
platform: "ensemble" max_batch_size: 4
input { name: "IN" data_type: TYPE_FP32 dims: 2 }
output { name: "OUT" data_type: TYPE_FP32 dims: 2 }
ensemble_scheduling {
  step { model_name: "first" model_version: -1
         input_map { key: "x" value: "IN" } output_map { key: "y" value: "between" } }
  step { model_name: "second" model_version: -1
         input_map { key: "x" value: "between" } output_map { key: "y" value: "OUT" } }
}
"""


@pytest.mark.gpu
def test_a_chain_of_two_models_on_a_real_gpu(repository: Repository, cuda: Any) -> None:
    add(repository, "first", TORCH_STEP.format(made="x * 3"))
    add(repository, "second", TORCH_STEP.format(made="torch.utils.dlpack.to_dlpack(x + 1)"), extra=ON_DEVICE)
    repository.add("chain", CHAIN, {})
    with engine_over(repository.root) as engine:
        sent = [InferRequest("chain", {"IN": request("", i, 2).inputs["x"]}) for i in range(64)]
        for answer, i in zip(infer(engine, sent), range(64), strict=True):
            assert response(answer).tensor("OUT").array().tolist() == [[3.0 * i + 1, 7.0]]


@pytest.mark.gpu
def test_a_real_tensor_is_handed_from_model_to_model_on_the_gpu(repository: Repository, cuda: Any) -> None:
    add(repository, "first", TORCH_STEP.format(made="x * 3"))
    add(repository, "second", TORCH_STEP.format(made="x + 1"), extra=ON_DEVICE)
    with engine_over(repository.root) as engine:
        between = response(ask(engine, request("first", 1, 2, takes="y"))).tensor("y")
        assert isinstance(between.data, DeviceTensor)
        sent = InferRequest("second", {"x": Tensor("x", "FP32", between.shape, between.data)})
        answer = response(ask(engine, sent))
        assert answer.parameters["is_cpu"] is False
        assert answer.tensor("y").array().tolist() == [[4.0, 7.0]]


@pytest.mark.gpu
@pytest.mark.parametrize(("memory", "is_cpu"), [("None", False), (CPU, True)])
def test_a_real_model_asks_another(repository: Repository, cuda: Any, memory: str, is_cpu: bool) -> None:
    add(repository, "inner", TORCH_STEP.format(made="x + 1"))
    add(repository, "outer", ASKS.format(memory=memory, names=["y"]))
    with engine_over(repository.root) as engine:
        answer = response(ask(engine, request("outer", 1, 2)))
        assert answer.parameters["is_cpu"] is is_cpu
        assert answer.tensor("y").array().tolist() == [[2.0, 3.0]]


@pytest.mark.gpu
def test_models_on_a_real_gpu_take_turns(repository: Repository, cuda: Any) -> None:
    asks = ASKS.format(memory="None", names=["y"])
    for name, execute in (("inner", TORCH_STEP.format(made="x + 1")), ("outer", asks)):
        config = CONFIG.replace("KIND_CPU", "KIND_GPU count: 2").format(rows=4, extra=ON_DEVICE)
        repository.add_python(name, config, execute)
    with engine_over(repository.root) as engine:
        sent = [request(name, i, 2) for i in range(32) for name in ("inner", "outer")]
        for i, answer in enumerate(infer(engine, sent)):
            assert response(answer).tensor("y").array().tolist() == [[i // 2 + 1.0, 3.0]]
        assert set(process_engines.engine_of("cuda:0").model_ns) >= {"inner", "outer"}
        assert not process_engines.engine_of("cuda:0").lost
