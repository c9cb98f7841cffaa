"""An engine over real files: models load, answer, fail alone, and say what they are."""

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import engine_over, infer
from tutti.core.errors import InferError, Internal, InvalidArgument, NotFound, Unavailable
from tutti.core.types import InferRequest, InferResponse, Tensor

TEXT_MODEL = """
    backend: "python" max_batch_size: 8
    input { name: "t" data_type: TYPE_STRING dims: 1 }
    output { name: "n" data_type: TYPE_INT32 dims: 1 }
    dynamic_batching {}
"""
COUNT_LETTERS = """
    texts = pb_utils.get_input_tensor_by_name(request, "t").as_numpy()
    if texts[0, 0] == b"raise":
        raise ValueError("asked to")
    if texts[0, 0] == b"bad":
        error = pb_utils.TritonError("this text is bad", pb_utils.TritonError.INVALID_ARG)
        return pb_utils.InferenceResponse([], error)
    lengths = np.array([[len(t)] for t in texts.ravel()], dtype=np.int32)
    return pb_utils.InferenceResponse([pb_utils.Tensor("n", lengths)])
"""


def add_one(rows: int = 1, value: float = 0.0, **fields: object) -> InferRequest:
    x = Tensor.of("x", np.full((rows, 4), value, np.float32))
    return InferRequest("add_one", {"x": x}, **fields)  # type: ignore[arg-type]


def text(value: str) -> InferRequest:
    return InferRequest("letters", {"t": Tensor.of("t", np.array([[value.encode()]], dtype=object))})


def outputs(answer: object, name: str) -> list:
    assert isinstance(answer, InferResponse), answer
    return answer.tensor(name).array().tolist()


def test_requests_are_joined_and_split(repository: Repository) -> None:
    repository.add_onnx()
    with engine_over(repository.root) as engine:
        answers = infer(engine, [add_one(1, 1.0), add_one(3, 2.0), add_one(2, 3.0)])
        assert [outputs(answer, "y") for answer in answers] == [[[2.0] * 4], [[3.0] * 4] * 3, [[4.0] * 4] * 2]
        counts = engine.model("add_one").statistics.counts
        assert (counts.inferences, counts.success.count) == (6, 3)
        assert counts.executions <= 3


def test_only_the_culprit_of_a_failing_batch_fails(repository: Repository) -> None:
    repository.add_gather()

    def ids(*values: int) -> InferRequest:
        return InferRequest("gather", {"ids": Tensor.of("ids", np.array([values], dtype=np.int64))})

    with engine_over(repository.root) as engine:
        good, bad, other = infer(engine, [ids(1, 2), ids(1, 99), ids(3, 0)])
        assert outputs(good, "y") == [[10, 20]]
        assert outputs(other, "y") == [[30, 0]]
        assert isinstance(bad, Internal)
        assert "model 'gather'" in bad.message
        assert "'ids' INT64[1, 2]" in bad.message


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (
            InferRequest("add_one", {}),
            "expected 1 inputs but got 0 inputs for model 'add_one'. Got input(s) [], but missing",
        ),
        (InferRequest("add_one", {"z": Tensor.of("z", np.zeros((1, 4), np.float32))}), "required input(s) ['x']"),
        (
            InferRequest("add_one", {"x": Tensor.of("x", np.zeros((1, 4)))}),
            "inference input 'x' data-type is 'FP64', but model 'add_one' expects 'FP32'",
        ),
        (InferRequest("add_one", {"x": Tensor.of("x", np.zeros((1, 5), np.float32))}), "Expected [-1,4], got [1,5]"),
        (InferRequest("add_one", {"x": Tensor.of("x", np.zeros(4, np.float32))}), "Expected [-1,4], got [4]"),
        (add_one(9), "inference request batch-size must be <= 8 for 'add_one'"),
        (add_one(0), "at least 1, got 0"),
        (add_one(outputs=("nope",)), "unexpected inference output 'nope' for model 'add_one'"),
    ],
)
def test_bad_requests_are_told_what_is_wrong_and_their_mates_succeed(
    repository: Repository, request_: InferRequest, says: str
) -> None:
    repository.add_onnx()
    with engine_over(repository.root) as engine:
        first, bad, last = infer(engine, [add_one(), request_, add_one()])
        assert isinstance(bad, InvalidArgument)
        assert "'add_one'" in bad.message
        assert says in bad.message
        assert outputs(first, "y") == outputs(last, "y") == [[1.0] * 4]


def test_unknown_models_and_versions(repository: Repository) -> None:
    repository.add_onnx()
    with engine_over(repository.root) as engine:
        unknown, version = infer(engine, [InferRequest("nope", {}), InferRequest("add_one", {}, model_version="9")])
        assert isinstance(unknown, NotFound)
        assert isinstance(version, NotFound)
        assert version.message == "Request for unknown model: 'add_one' version 9 is not found"


def test_an_empty_input_is_named(repository: Repository) -> None:
    repository.add_gather()
    with engine_over(repository.root) as engine:
        empty = InferRequest("gather", {"ids": Tensor.of("ids", np.zeros((1, 0), np.int64))})
        (answer,) = infer(engine, [empty])
        # A gather of nothing is nothing: the graph accepts it.
        assert outputs(answer, "y") == [[]]


def test_a_python_model_fails_request_by_request(repository: Repository) -> None:
    repository.add_python("letters", TEXT_MODEL, COUNT_LETTERS)
    with engine_over(repository.root) as engine:
        good, bad, other = infer(engine, [text("four"), text("bad"), text("a")])
        assert outputs(good, "n") == [[4]]
        assert outputs(other, "n") == [[1]]
        assert isinstance(bad, InvalidArgument)
        assert bad.message == "this text is bad"


def test_a_python_model_that_raises_names_itself(repository: Repository) -> None:
    repository.add_python("letters", TEXT_MODEL, COUNT_LETTERS)
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [text("raise")])
        assert isinstance(answer, Internal)
        says = "Failed to process the request(s) for model 'letters': execute raised ValueError: asked to"
        assert answer.message == says


def test_broken_bytes_fail_alone(repository: Repository) -> None:
    repository.add_python("letters", TEXT_MODEL, COUNT_LETTERS)
    broken = InferRequest("letters", {"t": Tensor("t", "BYTES", (1, 1), b"\x09\x00\x00\x00ab")})
    with engine_over(repository.root) as engine:
        bad, good = infer(engine, [broken, text("four")])
        assert outputs(good, "n") == [[4]]
        assert isinstance(bad, InvalidArgument)
        assert "tensor 't'" in bad.message


def test_every_version_of_the_policy_is_served(repository: Repository) -> None:
    repository.add_onnx(extra="version_policy { all {} }")
    (repository.root / "add_one" / "3").mkdir()
    (repository.root / "add_one" / "3" / "model.onnx").write_bytes(
        (repository.root / "add_one" / "1" / "model.onnx").read_bytes()
    )
    with engine_over(repository.root) as engine:
        assert engine.versions("add_one") == ["1", "3"]
        newest, old = infer(engine, [add_one(), add_one(model_version="1")])
        assert isinstance(newest, InferResponse)
        assert newest.model_version == "3"
        assert isinstance(old, InferResponse)
        assert old.model_version == "1"


def test_a_model_that_cannot_load_is_shown_and_the_others_are_served(repository: Repository) -> None:
    repository.add_onnx()
    repository.add_onnx("broken")
    (repository.root / "broken" / "1" / "model.onnx").write_bytes(b"not a graph")
    with engine_over(repository.root) as engine:
        assert not engine.is_ready()
        states = {entry.name: (entry.state, entry.reason) for entry in engine.index()}
        assert states["add_one"] == ("READY", "")
        assert states["broken"][0] == "UNAVAILABLE"
        assert "onnxruntime cannot load model.onnx" in states["broken"][1]
        (answer,) = infer(engine, [InferRequest("broken", {})])
        assert isinstance(answer, NotFound)
        assert "not ready" in answer.message


def test_an_empty_repository_is_ready(repository: Repository) -> None:
    with engine_over(repository.root) as engine:
        assert engine.is_ready()


def test_a_closed_model_refuses(repository: Repository) -> None:
    repository.add_onnx()
    with engine_over(repository.root) as engine:
        engine.close()
        (answer,) = infer(engine, [add_one()])
        assert isinstance(answer, Unavailable)


def test_a_configuration_that_does_not_fit_the_graph_is_refused(repository: Repository) -> None:
    repository.add_onnx()
    path = repository.root / "add_one" / "config.pbtxt"
    path.write_text(path.read_text().replace("TYPE_FP32", "TYPE_FP64", 1))
    with engine_over(repository.root) as engine:
        assert "configured as FP64, the graph has FP32" in engine.failures()[0]


def test_many_concurrent_callers_each_get_their_own_answer(repository: Repository) -> None:
    from concurrent.futures import ThreadPoolExecutor

    repository.add_onnx(extra="dynamic_batching {} instance_group { count: 2 }")
    with engine_over(repository.root) as engine, ThreadPoolExecutor(16) as pool:

        def ask(number: int) -> bool:
            (answer,) = infer(engine, [add_one(1 + number % 3, float(number))])
            return not isinstance(answer, InferError) and outputs(answer, "y")[0][0] == number + 1

        assert all(pool.map(ask, range(400)))
