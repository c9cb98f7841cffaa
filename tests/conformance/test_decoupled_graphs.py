"""Ensembles with decoupled steps in a real tritonserver and in tutti: the same answers in the same order."""

import queue
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from tests.models import Repository
from tests.peers import tritonserver
from tests.serving import serving

pytestmark = [pytest.mark.triton, pytest.mark.slow]

ONE = "data_type: TYPE_INT32 dims: 1"
# Answers n % 100 times, then fails if there are hundreds.
COUNT = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            n = int(x.reshape(-1)[0])
            for number in range(n % 100):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("y", np.full(x.shape, number, np.int32))]))
            if n >= 100:
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("too many")))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
ADD = """
    a, b = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in "ab")
    if (a == 7).any():
        return pb_utils.InferenceResponse(error=pb_utils.TritonError("no sevens"))
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", (a + b).astype(np.int32))])
"""


def step(model: str, out: str, made: str = "y", **inputs: str) -> str:
    maps = " ".join(f'input_map {{ key: "{key}" value: "{value}" }}' for key, value in inputs.items())
    return f'step {{ model_name: "{model}" model_version: -1 {maps} output_map {{ key: "{made}" value: "{out}" }} }}'


GRAPHS = {
    "alone": ([step("count", "OUT", x="X")], "OUT"),
    "then_add": ([step("count", "M", x="X"), step("add", "OUT", a="M", b="M")], "OUT"),
    "add_then": ([step("add", "S", a="X", b="X"), step("count", "OUT", x="S")], "OUT"),
    "twice": ([step("count", "M", x="X"), step("count", "OUT", x="M")], "OUT"),
    "two_outputs": ([step("count", "M", x="X"), step("add", "OUT", a="M", b="M")], "M OUT"),
    "nested": ([step("then_add", "OUT", "OUT", X="X")], "OUT"),
    "mixed": ([step("count", "M", x="X"), step("add", "OUT", a="M", b="X")], "OUT"),
    "two_sources": ([step("count", "M", x="X"), step("add", "N", a="X", b="X")], "M N"),
}
BATCHED = ("then_add", "twice")


def add_models(repository: Repository) -> None:
    for suffix, rows in (("", ""), ("_rows", "max_batch_size: 4 ")):
        head = f'backend: "python" {rows}'
        repository.add(
            f"count{suffix}",
            f'{head} input {{ name: "x" {ONE} }} output {{ name: "y" {ONE} }} '
            "model_transaction_policy { decoupled: true }",
            {"model.py": COUNT},
        )
        two = f'input {{ name: "a" {ONE} }} input {{ name: "b" {ONE} }}'
        repository.add_python(f"add{suffix}", f'{head} {two} output {{ name: "y" {ONE} }}', ADD)
        for name, (steps, outputs) in GRAPHS.items():
            if suffix and name not in BATCHED:
                continue
            made = " ".join(f'output {{ name: "{one}" {ONE} }}' for one in outputs.split())
            text = " ".join(steps).replace('"count"', f'"count{suffix}"').replace('"add"', f'"add{suffix}"')
            graph = f'platform: "ensemble" {rows} input {{ name: "X" {ONE} }} {made} ensemble_scheduling {{ {text} }}'
            repository.add(f"{name}{suffix}", graph, {".keep": ""})


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    tritonserver.require()
    scratch = tmp_path_factory.mktemp("decoupled")
    repository = Repository(scratch / "repository")
    add_models(repository)
    theirs = tritonserver.running(repository.root, scratch, "--exit-on-error=false", "--strict-readiness=false")
    ours = serving(repository.root, scratch / "tutti.log", "--exit-on-error=false", is_guarded=True)
    with theirs as triton, ours as tutti:
        yield tutti.grpc, triton.grpc


def answers(address: str, model: str, number: int, rows: int = 0) -> list[object]:
    """Each answer's outputs by name; an error is its text's end, and the last."""
    client = grpcclient.InferenceServerClient(address)
    arrived: queue.Queue[tuple[grpcclient.InferResult | None, Exception | None]] = queue.Queue()
    array = np.full((rows, 1) if rows else (1,), number, np.int32)
    given = grpcclient.InferInput("X", array.shape, "INT32")
    given.set_data_from_numpy(array)
    got: list[object] = []
    try:
        client.start_stream(lambda result, error: arrived.put((result, error)))
        client.async_stream_infer(model, [given], request_id="r", enable_empty_final_response=True)
        while True:
            result, error = arrived.get(timeout=20)
            if result is None:
                return [*got, str(error).rpartition(": ")[2].rpartition(", ")[2]]
            response = result.get_response()
            if response.outputs:
                got.append({one.name: result.as_numpy(one.name).tolist() for one in response.outputs})
            if response.parameters["triton_final_response"].bool_param:
                return got
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


@pytest.mark.parametrize("number", [0, 1, 3, 6])
@pytest.mark.parametrize("name", [name for name in GRAPHS if name not in ("mixed", "two_sources")])
def test_the_same_answers(addresses: tuple[str, str], name: str, number: int) -> None:
    ours, theirs = (answers(address, name, number) for address in addresses)
    assert ours == theirs


@pytest.mark.parametrize("name", BATCHED)
def test_the_same_answers_with_rows(addresses: tuple[str, str], name: str) -> None:
    ours, theirs = (answers(address, f"{name}_rows", 3, rows=2) for address in addresses)
    assert len(ours) >= 3
    assert ours == theirs


@pytest.mark.parametrize(("name", "number"), [("then_add", 9), ("add_then", 7), ("then_add", 100), ("nested", 100)])
def test_the_same_errors_in_the_end(addresses: tuple[str, str], name: str, number: int) -> None:
    ours, theirs = (answers(address, name, number) for address in addresses)
    assert ours == theirs
    assert ours[-1] in ("no sevens", "too many")


@pytest.mark.parametrize("name", ["mixed", "two_sources"])
def test_what_triton_does_not_load_is_not_loaded(addresses: tuple[str, str], name: str) -> None:
    for address in addresses:
        client = grpcclient.InferenceServerClient(address)
        assert not client.is_model_ready(name)
        client.close()


def test_both_say_that_the_graph_is_decoupled(addresses: tuple[str, str]) -> None:
    for address in addresses:
        client = grpcclient.InferenceServerClient(address)
        assert client.get_model_config("then_add").config.model_transaction_policy.decoupled
        client.close()
