"""The contract of backends finds what breaks it: one backend of another distribution, sound, and with each fault."""

from pathlib import Path

import numpy as np
import pytest

from tests.distributions import Install
from tests.models import Repository
from tests.serving import engine_over, infer
from tutti.core.errors import Internal
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.repository import backend_records
from tutti.serving import contract_model
from tutti.serving.backend_contract import BackendContract, Inputs

RECORD = """
    from tutti.backends.interface import BackendRecord, lacks_tensors
    RECORD = BackendRecord("plain", "plain_backend", ("plain.txt",), completes=lacks_tensors)
"""
BACKEND = """
    import threading
    import numpy as np
    from tutti.backends.interface import *

    FAULT = ""
    KEPT = []

    def load(folder, version, infer):
        path = model_file(folder, version, "plain.txt")
        if FAULT != "knows no file" and path.read_bytes() != b"plain":
            raise ConfigError(f"model '{folder.config.name}': not a plain file")
        placed = instances(folder.config, can_use_gpus=False)
        return [(Unchecked if FAULT.startswith("joins") else Plain)(folder.config, version)
                for _ in (placed if FAULT != "makes one" else placed[:1])]

    def complete(proto, path):
        for tensors, name in ((proto.input, "x"), (proto.output, "y" if FAULT != "completes" else "z")):
            if not tensors:
                tensors.add(name=name, data_type="TYPE_FP32", dims=[-1])

    class Plain:
        runs_inline = False
        kind = "cpu"

        def __init__(self, config, version):
            self.config, self.version = config, str(version)
            self.buffer = np.zeros((8, 64), np.float32)
            if FAULT == "keeps a thread":
                threading.Thread(target=threading.Event().wait, daemon=True).start()
            if FAULT == "keeps itself":
                KEPT.append(self)

        def execute(self, calls):
            if FAULT == "fails together" and any((call.request.inputs["x"].array() < -9).any() for call in calls):
                raise ValueError("one is wrong")
            answers = [self.answer(call.request) for call in calls]
            if FAULT == "mixes up":
                answers.reverse()
            return answers[:-1] if FAULT == "forgets" else answers

        def answer(self, request):
            x = request.inputs["x"].array()
            if (x < -9).any():
                return InvalidArgument("it is too low" if FAULT == "blames nobody" else f"{self.config.name}: too low")
            y = 2 * x + 1
            if FAULT == "reuses memory":
                self.buffer[: len(x), : x.shape[1]] = y
                y = self.buffer[: len(x), : x.shape[1]]
            if FAULT == "writes inputs":
                request.inputs["x"].array()[:] = 0
            if FAULT == "ignores shapes":
                y = y[:, :3]
            if FAULT == "ignores types":
                y = y.astype(np.float64)
            outputs = [Tensor.of("y", y)] if FAULT != "ignores names" else [Tensor.of("z", y)]
            version = self.version if FAULT != "is another" else "2"
            return InferResponse(self.config.name, version, outputs)

        def close(self):
            pass

    class Unchecked(JoinedBackend):
        library = "plain"

        def __init__(self, config, version):
            super().__init__(config, str(version))

        def run(self, names, feed):
            return [2 * feed["x"] + 1 for _ in (names if FAULT != "joins none" else ())]

        def check_outputs(self, requests, outputs):
            pass
"""


class Plain(BackendContract):
    config = """
        backend: "plain" max_batch_size: 8 dynamic_batching {}
        input { name: "x" data_type: TYPE_FP32 dims: -1 } output { name: "y" data_type: TYPE_FP32 dims: -1 }
    """

    def write(self, folder: Path) -> None:
        (folder / "plain.txt").write_text("plain")

    def inputs(self, rows: int, size: int, rng: np.random.Generator) -> Inputs:
        return {"x": rng.uniform(-1, 1, (rows, size)).astype(np.float32)}

    def outputs(self, inputs: Inputs) -> Inputs:
        return {"y": 2 * inputs["x"] + 1}

    def poison(self, inputs: Inputs) -> Inputs:
        return {"x": inputs["x"] - 100}


@pytest.fixture
def faulty(install: Install, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Installs it; `faulty.setattr("plain_backend.FAULT", ...)` breaks it."""
    install("tutti-plain", "plain = plain:RECORD", plain=RECORD, plain_backend=BACKEND)
    return monkeypatch


TESTS = sorted(name for name in dir(Plain) if name.startswith("test_"))


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.usefixtures("faulty")
def test_a_sound_one_passes(name: str, tmp_path: Path) -> None:
    getattr(Plain(), name)(tmp_path / "m")


FAULTS = {
    "knows no file": "test_a_damaged_file_is_an_error_that_names_the_model",
    "makes one": "test_an_instance_is_made_for_each_that_is_configured",
    "completes": "test_what_the_file_tells_need_not_be_configured",
    "mixes up": "test_requests_of_a_batch_get_the_answers_to_their_own_rows",
    "forgets": "test_requests_of_a_batch_get_the_answers_to_their_own_rows",
    "is another": "test_a_request_is_answered",
    "ignores shapes": "test_requests_of_other_shapes_are_answered_beside_each_other",
    "writes inputs": "test_inputs_are_left_as_they_came",
    "reuses memory": "test_answers_stay_as_they_are_while_others_are_made",
    "joins unchecked": "test_outputs_other_than_configured_are_errors_that_name_the_model",
    "fails together": "test_a_request_that_fails_fails_alone",
    "blames nobody": "test_a_request_that_fails_fails_alone",
    "keeps a thread": "test_what_it_holds_is_given_back_when_it_is_closed",
    "keeps itself": "test_nobody_keeps_an_instance_that_is_closed",
}


@pytest.mark.parametrize(("fault", "name"), FAULTS.items())
def test_a_fault_is_found(faulty: pytest.MonkeyPatch, fault: str, name: str, tmp_path: Path) -> None:
    backend_records.find("plain", "m")
    faulty.setattr("plain_backend.FAULT", fault)
    faulty.setattr(contract_model, "TIMEOUT_S", 1.0)  # what is kept is kept
    with pytest.raises(AssertionError):
        getattr(Plain(), name)(tmp_path / "m")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("ignores names", "expected the outputs ['y'], got ['z']"),
        ("ignores types", "output 'y': expected FP32, got FP64 (float64)"),
        ("ignores shapes", "output 'y': expected the shape [1, 4], got [1, 3]"),
        ("forgets", "expected 1 answers of a batch, got 0"),
    ],
)
def test_what_another_distributions_backend_answers_is_checked(
    faulty: pytest.MonkeyPatch, repository: Repository, fault: str, says: str
) -> None:
    faulty.setattr("plain_backend.FAULT", fault)
    repository.add("m", Plain.config.replace("dims: -1", "dims: 4"), {"plain.txt": "plain"})
    with engine_over(repository.root) as engine:
        x = np.zeros((1, 4), np.float32)
        for _ in range(2):  # the instance lives on
            (answer,) = infer(engine, [InferRequest("m", {"x": Tensor.of("x", x)})])
            assert isinstance(answer, Internal)
            assert answer.message == f"model 'm': backend 'plain': {says}"


def test_one_that_joins_and_makes_other_arrays_is_told(faulty: pytest.MonkeyPatch, repository: Repository) -> None:
    faulty.setattr("plain_backend.FAULT", "joins none")
    repository.add("m", Plain.config, {"plain.txt": "plain"})
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [InferRequest("m", {"x": Tensor.of("x", np.zeros((1, 4), np.float32))})])
    assert isinstance(answer, Internal)
    assert answer.message.startswith("model 'm': plain failed on input 'x' FP32[1, 4]: zip() argument 2 is shorter")


def test_a_padded_model_of_another_distribution_is_checked_within(
    faulty: pytest.MonkeyPatch, repository: Repository
) -> None:
    """What the model makes is compared with what it was given, and what its clients get is of their length."""
    config = """
        backend: "plain" max_batch_size: 8
        input { name: "x" data_type: TYPE_FP32 dims: [ -1 ] } output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] }
        parameters { key: "tutti.buckets.x" value { string_value: "4,8" } }
        parameters { key: "tutti.unpad.y" value { string_value: "x" } }
    """
    repository.add("m", config, {"plain.txt": "plain"})
    with engine_over(repository.root) as engine:
        assert not engine.failures()
        (answer,) = infer(engine, [InferRequest("m", {"x": Tensor.of("x", np.ones((1, 3), np.float32))})])
        assert isinstance(answer, InferResponse), answer
        assert answer.tensor("y").array().tolist() == [[3, 3, 3]]
