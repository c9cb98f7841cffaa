"""Control and sequences across the cluster: every replica follows, also one that comes back; what is lost says so."""

import os
import queue
import signal
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from tests.conformance.test_every_method import COUNT, ENDLESS
from tests.ray_app.conftest import Application
from tests.ray_app.test_cluster import replicas
from tests.serving import wait_until
from tutti.ray_app.control import Change, Desired
from tutti.serving.interface import Override

X = np.array([[1, 2, 3, 4]], np.float32)


def test_only_the_last_change_of_a_model_counts() -> None:
    desired = Desired()
    desired.add(Change(1, "a", Override("1")))
    desired.add(Change(2, "b", Override()))
    desired.add(Change(3, "a"))
    desired.add(Change(4, "", logs={"log_info": False}))
    assert [(c.generation, c.model) for c in desired.since(0)] == [(2, "b"), (3, "a"), (4, "")]
    assert [c.model for c in desired.since(3)] == [""]
    last = desired.last("a")
    assert last is not None
    assert last.override is None


def infer(client: grpcclient.InferenceServerClient, model: str, array: np.ndarray, **options: object) -> np.ndarray:
    kind = "INT32" if array.dtype == np.int32 else "FP32"
    tensor = grpcclient.InferInput("x", list(array.shape), kind)
    tensor.set_data_from_numpy(array)
    return client.infer(model, [tensor], **options).as_numpy("y")


def index(client: grpcclient.InferenceServerClient) -> dict[str, tuple[str, str]]:
    return {m.name: (m.state, m.reason) for m in client.get_model_repository_index().models}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_every_replica_follows(application: Application, tmp_path: Path) -> None:
    served, repository = application.served, application.repository
    repository.add_onnx("later")
    repository.add_python(
        "fussy",
        """
        backend: "python" max_batch_size: 0
        input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }
        """,
        "return pb_utils.InferenceResponse([])",
        # Refuses in one replica of two: all must be as before then.
        f"""
        import os
        marker = {str(tmp_path / "first")!r}
        if not os.path.exists(marker):
            open(marker, "w").close()
            raise RuntimeError("only this one")
        """,
    )
    ends = 'input { name: "x" data_type: TYPE_INT32 dims: 1 } output { name: "y" data_type: TYPE_INT32 dims: 1 }'
    repository.add_python(
        "sums",
        f'backend: "python" max_batch_size: 1 {ends} sequence_batching {{ oldest {{ max_candidate_sequences: 8 }} }}',
        """
        import os
        self.sum = getattr(self, "sum", {})
        key = request.correlation_id()
        self.sum[key] = self.sum.get(key, 0) + int(pb_utils.get_input_tensor_by_name(request, "x").as_numpy().item())
        y = np.full((1, 1), self.sum[key], np.int32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", y)], parameters={"pid": os.getppid()})
        """,
    )
    with grpcclient.InferenceServerClient(served.grpc) as client:
        client.load_model("sums")
        client.load_model("later")
        client.unload_model("dropped")
        assert index(client)["later"] == ("READY", "")
        with pytest.raises(InferenceServerException, match="only this one"):
            client.load_model("fussy")
        assert index(client)["fussy"][0] != "READY"
        assert not client.is_model_ready("fussy")

        one = np.ones((1, 1), np.int32)
        homes = {}
        for key in range(1, 9):
            tensor = grpcclient.InferInput("x", [1, 1], "INT32")
            tensor.set_data_from_numpy(one)
            result = client.infer("sums", [tensor], sequence_id=key, sequence_start=True)
            homes[key] = result.get_response().parameters["pid"].int64_param
        pids = {process.pid for process in replicas(served, "cpu")}
        assert set(homes.values()) == pids, "sequences are spread over the replicas"
        for key in homes:
            assert infer(client, "sums", one, sequence_id=key).item() == 2

        victim = homes[1]
        os.kill(victim, signal.SIGKILL)
        for key, home in homes.items():
            if home == victim:
                with pytest.raises(InferenceServerException, match="lost"):
                    infer(client, "sums", one, sequence_id=key)
                # Once told, the client begins anew, elsewhere.
                assert infer(client, "sums", one, sequence_id=key, sequence_start=True).item() == 1
            else:
                assert infer(client, "sums", one, sequence_id=key).item() == 3

        # The replica that comes in its place is told what it has missed.
        def is_whole() -> bool:
            now = {process.pid for process in replicas(served, "cpu")}
            entries = index(client)
            return len(now - {victim}) == 2 and entries["later"] == ("READY", "") == entries["kept"]

        wait_until(is_whole, timeout_s=90)
        for _ in range(40):
            assert infer(client, "later", X).tolist() == (X + 1).tolist()
            with pytest.raises(InferenceServerException, match="no available versions"):
                infer(client, "dropped", X)
        assert index(client)["dropped"] == ("UNAVAILABLE", "unloaded")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_stream_whose_replica_dies_says_so(application: Application, tmp_path: Path) -> None:
    served, repository = application.served, application.repository
    ends = 'input { name: "x" data_type: TYPE_INT32 dims: 1 } output { name: "y" data_type: TYPE_INT32 dims: 1 }'
    decoupled = f'backend: "python" {ends} model_transaction_policy {{ decoupled: true }}'
    folder = f'parameters {{ key: "folder" value {{ string_value: "{tmp_path}" }} }}'
    repository.add("endless", f"{decoupled} {folder}", {"model.py": ENDLESS})
    repository.add("count", decoupled, {"model.py": COUNT})
    for model in ("endless", "count"):
        application.load(model)
    answers: queue.Queue[tuple[object, object]] = queue.Queue()
    with grpcclient.InferenceServerClient(served.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        tensor = grpcclient.InferInput("x", [1], "INT32")
        tensor.set_data_from_numpy(np.array([3], np.int32))
        client.async_stream_infer("endless", [tensor], request_id="a")
        assert answers.get(timeout=30)[1] is None
        for process in replicas(served, "cpu"):
            os.kill(process.pid, signal.SIGKILL)
        while (answer := answers.get(timeout=30))[1] is None:
            pass
        assert "was lost while it answered" in str(answer[1])
        # The stream itself goes on: what has not begun yet waits for the next replica. Where a machine needs more time
        # for one than a request waits, the client asks again.
        client.async_stream_infer("count", [tensor], request_id="b")
        while (first := answers.get(timeout=90))[1] is not None:
            assert "no replica is up" in str(first[1])
            client.async_stream_infer("count", [tensor], request_id="b")
        found = [first, *(answers.get(timeout=90) for _ in range(2))]
        assert [result.as_numpy("y").item() for result, _ in found] == [0, 1, 2]  # type: ignore[attr-defined]
        client.stop_stream()
