"""The python backend's API as models use it, in a process and in the server's: senders, BLS, cancellation, ends."""

import json
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tests.models import IN_PROCESS, Repository
from tests.serving import Gather, engine_over, infer, wait_until
from tutti.backends import completion
from tutti.backends.python import instances, loading, model
from tutti.backends.python import triton_python_backend_utils as pb_utils
from tutti.core.errors import ConfigError, InferError, Internal, InvalidArgument, Unsupported
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.frontends.http import codec as http_codec
from tutti.frontends.v2.json_request import JSON_REPLY

ONE_TO_ONE = """
    backend: "python" max_batch_size: {rows}
    input {{ name: "x" data_type: TYPE_INT32 dims: 1 }}
    output {{ name: "y" data_type: TYPE_INT32 dims: 1 }}
    {extra}
"""
DECOUPLED = ONE_TO_ONE.format(rows=0, extra="model_transaction_policy { decoupled: true }")


_modes = [""]


@pytest.fixture(autouse=True, params=["", IN_PROCESS], ids=["process", "server"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the test's models are."""
    monkeypatch.setattr(f"{__name__}._modes", [request.param])
    monkeypatch.setattr("tutti.observing.custom_metrics._families", {})  # they are the process's, and outlive a server


def add(repository: Repository, name: str, body: str, config: str = ONE_TO_ONE.format(rows=0, extra="")) -> None:
    """A model from the body of its class."""
    config += _modes[0]
    source = "import json, threading\nimport numpy as np\nimport triton_python_backend_utils as pb_utils\n\n"
    source += "def value(request):\n    return pb_utils.get_input_tensor_by_name(request, 'x').as_numpy()\n\n"
    source += "def response(array, **more):\n"
    source += "    return pb_utils.InferenceResponse([pb_utils.Tensor('y', np.asarray(array, np.int32))], **more)\n\n"
    source += "class TritonPythonModel:\n" + textwrap.indent(textwrap.dedent(body), "    ")
    repository.add(name, config, {"model.py": source})


def request(model: str, *values: int, **parameters: object) -> InferRequest:
    x = Tensor.of("x", np.array(values, np.int32))
    return InferRequest(model, {"x": x}, parameters=dict(parameters))  # type: ignore[arg-type]


class Answers:
    """A caller that takes any number of answers."""

    def __init__(self) -> None:
        self.emitted: list[InferResponse] = []
        self.gather = Gather(1)

    def call(self, sent: InferRequest) -> Call:
        return Call(sent, self.gather, None, self.emitted.append)

    def values(self) -> list[int]:
        return [int(answer.tensor("y").array()[0]) for answer in self.emitted]


COUNT_DOWN = """
def execute(self, requests):
    for request in requests:
        threading.Thread(target=self.answer, args=(request.get_response_sender(), int(value(request)[0]))).start()

def answer(self, sender, count):
    for n in range(count):
        sender.send(response([n]))
    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_decoupled_model_sends_any_number_of_answers(repository: Repository, count: int) -> None:
    add(repository, "count", COUNT_DOWN, DECOUPLED)
    with engine_over(repository.root) as engine:
        answers = Answers()
        call = answers.call(request("count", count))
        engine([call])
        answers.gather.wait()
        assert answers.values() == list(range(count))
        assert isinstance(call.answer, InferResponse)
        assert call.answer.is_null


def test_a_decoupled_model_needs_a_caller_that_takes_several_answers(repository: Repository) -> None:
    add(repository, "count", COUNT_DOWN, DECOUPLED)
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request("count", 1)])
        assert isinstance(answer, Unsupported)
        assert "model 'count'" in answer.message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def execute(self, requests): pass", "dropped the request"),
        ("def execute(self, requests): raise ValueError('no')", "ValueError: no"),
        ("def execute(self, requests): return []", "the execute function must return None"),
        (
            "def execute(self, requests):\n"
            "    requests[0].get_response_sender().send(pb_utils.InferenceResponse(error=pb_utils.TritonError('bad')))",
            "bad",
        ),
    ],
)
def test_what_a_decoupled_model_forgets_is_an_error(repository: Repository, body: str, says: str) -> None:
    add(repository, "forgets", body, DECOUPLED)
    with engine_over(repository.root) as engine:
        answers = Answers()
        call = answers.call(request("forgets", 1))
        engine([call])
        answers.gather.wait()
        assert isinstance(call.answer, Internal)
        assert says in call.answer.message


def test_a_plain_model_may_answer_through_a_sender_and_after_execute(repository: Repository) -> None:
    add(
        repository,
        "later",
        """
        def execute(self, requests):
            threading.Timer(0.05, self.answer, [requests[0].get_response_sender(), value(requests[0])]).start()
            return [None]

        def answer(self, sender, x):
            sender.send(response(x + 1), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        """,
    )
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request("later", 41)])
        assert isinstance(answer, InferResponse)
        assert answer.tensor("y").array().tolist() == [42]


def test_errors_are_of_one_request_and_parameters_come_back(repository: Repository) -> None:
    add(
        repository,
        "mixed",
        """
        def execute(self, requests):
            return [self.answer(request) for request in requests]

        def answer(self, request):
            if value(request)[0, 0] < 0:
                error = pb_utils.TritonError("negative", pb_utils.TritonError.INVALID_ARG)
                return pb_utils.InferenceResponse(error=error)
            seen = json.loads(request.parameters())
            return response(value(request), parameters={"seen": json.dumps(seen), "timeout": request.timeout()})
        """,
        ONE_TO_ONE.format(rows=4, extra="dynamic_batching {}"),
    )
    with engine_over(repository.root) as engine:
        sent = [
            InferRequest(
                "mixed", {"x": Tensor.of("x", np.array([[n]], np.int32))}, parameters={"a": n, "timeout": 9_000_000}
            )
            for n in (-1, 2)
        ]
        bad, good = infer(engine, sent)
        assert isinstance(bad, InvalidArgument)
        assert bad.message == "negative"
        assert isinstance(good, InferResponse)
        assert good.parameters == {"seen": '{"a": 2}', "timeout": 9_000_000}


BLS = """
def execute(self, requests):
    return [self.answer(request) for request in requests]

def answer(self, request):
    inner = pb_utils.InferenceRequest(
        model_name="mode", requested_output_names=["y"], inputs=[pb_utils.Tensor("x", value(request))],
        parameters={"from": "bls"},
    )
    answer = inner.exec()
    if answer.has_error():
        return pb_utils.InferenceResponse(error=pb_utils.TritonError("inner: " + answer.error().message()))
    return response(pb_utils.get_output_tensor_by_name(answer, "y").as_numpy() * 10)
"""
ASYNC_BLS = """
async def execute(self, requests):
    import asyncio
    inner = [
        pb_utils.InferenceRequest(model_name="mode", inputs=[pb_utils.Tensor("x", value(r))]) for r in requests
    ]
    answers = await asyncio.gather(*[one.async_exec() for one in inner])
    return [response(pb_utils.get_output_tensor_by_name(a, "y").as_numpy() * 10) for a in answers]
"""
ADD_ONE = "def execute(self, requests): return [response(value(r) + 1) for r in requests]"


@pytest.mark.parametrize("body", [BLS, ASYNC_BLS])
def test_a_model_asks_another(repository: Repository, body: str) -> None:
    add(repository, "asks", body)
    add(repository, "mode", ADD_ONE)
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request("asks", 3)])
        assert isinstance(answer, InferResponse)
        assert answer.tensor("y").array().tolist() == [40]


def test_an_error_of_another_model_is_a_value(repository: Repository) -> None:
    add(repository, "asks", BLS)
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request("asks", 3)])
        assert isinstance(answer, InferError)
        assert "inner: Request for unknown model: 'mode' is not found" in answer.message


def test_a_model_iterates_over_a_decoupled_one(repository: Repository) -> None:
    add(repository, "count", COUNT_DOWN, DECOUPLED)
    add(
        repository,
        "sums",
        """
        def execute(self, requests):
            inner = pb_utils.InferenceRequest(model_name="count", inputs=[pb_utils.Tensor("x", value(requests[0]))])
            answers = [answer.output_tensors() for answer in inner.exec(decoupled=True)]
            assert answers.pop() == []
            return [response([sum(int(outputs[0].as_numpy()[0]) for outputs in answers)])]
        """,
    )
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request("sums", 5)])
        assert isinstance(answer, InferResponse)
        assert answer.tensor("y").array().tolist() == [10]


def test_a_model_that_asks_for_one_answer_of_a_decoupled_one_is_told_what_to_do(repository: Repository) -> None:
    add(repository, "mode", COUNT_DOWN, DECOUPLED)
    add(repository, "asks", BLS)
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request("asks", 3)])
        assert isinstance(answer, InferError)
        assert "doesn't support models with decoupled transaction policy" in answer.message
        assert "decoupled=True" in answer.message


def test_names_may_be_bytes_as_in_triton(repository: Repository) -> None:
    add(
        repository,
        "asks",
        """
        def execute(self, requests):
            x = pb_utils.get_input_tensor_by_name(requests[0], b"x")
            inner = pb_utils.InferenceRequest(
                model_name=b"mode", request_id=b"7", inputs=[pb_utils.Tensor(b"x", x.as_numpy())],
                requested_output_names=[b"y"],
            ).exec()
            assert not inner.has_error(), inner.error().message()
            return [response(pb_utils.get_output_tensor_by_name(inner, b"y").as_numpy())]
        """,
    )
    add(repository, "mode", ADD_ONE)
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request("asks", 3)])
        assert isinstance(answer, InferResponse), answer
        assert answer.tensor("y").array().tolist() == [4]


@pytest.mark.parametrize(
    ("made", "datatype", "shape", "values"),
    [
        ("np.array([3, 4], np.int64)", "INT64", (2,), [3, 4]),
        ("np.array([])", "FP64", (0,), []),
        ("np.zeros((0, 7), np.int32)", "INT32", (0, 7), []),
        ("np.int32(5)", "INT32", (), 5),
    ],
)
def test_outputs_are_what_the_model_made(
    repository: Repository, made: str, datatype: str, shape: tuple[int, ...], values: object
) -> None:
    body = f"""
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", {made})]) for _ in requests]
    """
    add(repository, "makes", body)
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request("makes", 1)])
        assert isinstance(answer, InferResponse), answer
        (output,) = answer.outputs
        assert (output.datatype, output.shape, output.array().tolist()) == (datatype, shape, values)
        (shown,) = json.loads(b"".join(http_codec.encode(answer, "", JSON_REPLY)[1]))["outputs"]
        assert (shown["datatype"], shown["shape"]) == (datatype, list(shape))


def test_a_response_may_lack_outputs(repository: Repository) -> None:
    two = ONE_TO_ONE.format(rows=0, extra='output { name: "z" data_type: TYPE_INT32 dims: 1 }')
    add(repository, "lacks", "def execute(self, requests): return [response(value(r)) for r in requests]", two)
    with engine_over(repository.root) as engine:
        asked = request("lacks", 1)
        asked.outputs = ("z",)
        both, one = infer(engine, [request("lacks", 1), asked])
        assert isinstance(both, InferResponse) and [tensor.name for tensor in both.outputs] == ["y"]
        assert isinstance(one, InferResponse) and one.outputs == []


FINAL = "flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("sender.send(response([1])); return [None]", 1),
        ("sender.send(response([1])); return None", 1),
        (f"sender.send(response([1])); sender.send({FINAL}); return [None]", 1),
        (f"sender.send(response([1]), {FINAL}); return [response([2])]", 1),
        ("sender.send(response([1])); sender.send(response([2])); return [None]", 1),
        (f"return [response([2])] if not sender.send(response([1]), {FINAL}) else None", 1),
        ("self.kept = sender; return [response([2])]", 2),
        (f"sender.send({FINAL}); return [None]", "Non-decoupled model cannot send complete final before sending"),
        ("sender.send(); return [None]", "must be provided when the response flags is set to zero"),
        ("sender.send(response([1]), flags=8); return [None]", "Unsupported flag provided"),
        ("return [response([1]), response([2])]", "and InferenceResponse(s) size is:2"),
        ("return [7]", "Expected an 'InferenceResponse' object in the execute function return list, found type 'int'"),
        ("return 7", "expected 1 responses in a list, got a int"),
    ],
)
def test_a_plain_model_answers_once_whichever_way_it_does(
    repository: Repository, steps: str, expected: int | str
) -> None:
    body = f"""
    def execute(self, requests):
        sender = requests[0].get_response_sender()
        {steps}
    """
    add(repository, "sends", body)
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request("sends", 1)])
        if isinstance(expected, str):
            assert isinstance(answer, Internal)
            assert expected in answer.message
        else:
            assert isinstance(answer, InferResponse), answer
            assert answer.tensor("y").array().tolist() == [expected]


def test_a_sender_that_was_taken_sends_nothing_after_its_model_has_returned_a_response(repository: Repository) -> None:
    add(
        repository,
        "late",
        """
        kept = None

        def execute(self, requests):
            if self.kept is None:
                TritonPythonModel.kept = requests[0].get_response_sender()
                return [response([1])]
            try:
                self.kept.send(response([2]))
            except pb_utils.TritonModelException as error:
                return [response([3 if "has been closed" in str(error) else 4])]
        """,
    )
    with engine_over(repository.root) as engine:
        values = [infer(engine, [request("late", 1)])[0].tensor("y").array().tolist() for _ in range(2)]  # type: ignore[union-attr]
        assert values == [[1], [3]]


def test_a_request_that_gets_neither_a_response_nor_a_sender_is_an_error(repository: Repository) -> None:
    add(repository, "silent", "def execute(self, requests): return None")
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request("silent", 1)])
        assert isinstance(answer, Internal)
        assert "model 'silent': execute returned no response" in answer.message


@pytest.mark.parametrize("rows", [0, 4])
def test_a_model_may_have_no_inputs(repository: Repository, rows: int) -> None:
    config = f'backend: "python" max_batch_size: {rows} output {{ name: "y" data_type: TYPE_INT32 dims: 1 }}'
    made = "[[7]]" if rows else "[7]"
    add(repository, "makes", f"def execute(self, requests): return [response({made}) for _ in requests]", config)
    with engine_over(repository.root) as engine:
        sent, _ = http_codec.decode("makes", "", b'{"inputs": []}', None)
        for answer in infer(engine, [sent, InferRequest("makes", {})]):
            assert isinstance(answer, InferResponse), answer
            assert answer.tensor("y").array().reshape(-1).tolist() == [7]
        (refused,) = infer(engine, [request("makes", 1)])
        assert isinstance(refused, InvalidArgument)
        assert "expected 0 inputs but got 1 inputs for model 'makes'. Got input(s) ['x']" in refused.message


def test_instances_are_named_as_in_triton(repository: Repository, tmp_path: Path) -> None:
    groups = 'instance_group [{ count: 2 kind: KIND_CPU }, { kind: KIND_CPU name: "own" }, { kind: KIND_CPU }]'
    body = f"""
    def initialize(self, args):
        with open({str(tmp_path / "names")!r}, "a") as file:
            file.write(args["model_instance_name"] + "\\n")

    def execute(self, requests):
        return [response([0]) for _ in requests]
    """
    add(repository, "told", body, ONE_TO_ONE.format(rows=0, extra=groups))
    with engine_over(repository.root) as engine:
        assert not engine.failures()
    assert sorted((tmp_path / "names").read_text().split()) == ["own_0", "told_0_0", "told_0_1", "told_2_0"]


def test_a_model_sees_that_its_caller_has_gone(repository: Repository) -> None:
    add(
        repository,
        "waits",
        """
        def execute(self, requests):
            for _ in range(400):
                if requests[0].is_cancelled():
                    error = pb_utils.TritonError("stopped", pb_utils.TritonError.CANCELLED)
                    return [pb_utils.InferenceResponse(error=error)]
                threading.Event().wait(0.01)
            return [response(value(requests[0]))]
        """,
    )
    with engine_over(repository.root) as engine:
        gather = Gather(1)
        call = Call(request("waits", 1), gather)
        engine([call])
        call.is_cancelled = True
        gather.wait()
        assert isinstance(call.answer, InferError)
        assert call.answer.message == "stopped"


def test_finalize_comes_after_the_last_answer(repository: Repository, tmp_path: Path) -> None:
    add(
        repository,
        "last",
        f"""
        def execute(self, requests):
            threading.Timer(0.2, self.answer, [requests[0].get_response_sender()]).start()

        def answer(self, sender):
            with open({str(tmp_path / "order")!r}, "a") as file:
                file.write("answer ")
            sender.send(response([1]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

        def finalize(self):
            with open({str(tmp_path / "order")!r}, "a") as file:
                file.write("finalize ")
        """,
        DECOUPLED,
    )
    with engine_over(repository.root) as engine:
        answers = Answers()
        engine([answers.call(request("last", 1))])
        wait_until(lambda: engine.model("last").statistics.counts.executions == 1)
    answers.gather.wait()
    assert (tmp_path / "order").read_text() == "answer finalize "


def test_auto_complete_config_fills_in_what_is_missing(repository: Repository) -> None:
    add(
        repository,
        "auto",
        """
        @staticmethod
        def auto_complete_config(config):
            assert config.as_dict()["name"] == "auto"
            config.set_max_batch_size(8)
            config.add_input({"name": "x", "data_type": "TYPE_INT32", "dims": [1]})
            config.add_output({"name": "y", "data_type": "TYPE_INT32", "dims": [1]})
            config.set_dynamic_batching()
            return config

        def execute(self, requests):
            return [response(value(r)) for r in requests]
        """,
        "",
    )
    (repository.root / "auto" / "config.pbtxt").unlink()
    config = completion.open_model(repository.root, "auto").config
    assert (config.backend, config.max_batch_size, config.batching is not None) == ("python", 8, True)
    assert [spec.name for spec in (*config.inputs, *config.outputs)] == ["x", "y"]


def test_auto_complete_config_that_contradicts_the_configuration_is_refused(repository: Repository) -> None:
    add(
        repository,
        "auto",
        """
        @staticmethod
        def auto_complete_config(config):
            config.add_input({"name": "x", "data_type": "TYPE_FP32", "dims": [1]})
            return config

        def execute(self, requests): return []
        """,
    )
    with pytest.raises(ConfigError, match="auto_complete_config"):
        completion.open_model(repository.root, "auto")


@pytest.mark.parametrize(
    ("config", "call", "arguments", "outcome"),
    [
        ("max_batch_size: 2", "set_max_batch_size", [4], (4, False, False)),
        ("max_batch_size: 4", "set_max_batch_size", [4], (4, False, False)),
        ("max_batch_size: 8", "set_max_batch_size", [4], "configuration specified max_batch_size 8, .* takes 4"),
        ("max_batch_size: 8", "set_max_batch_size", [0], "configuration specified max_batch_size 8, .* takes 0"),
        ("max_batch_size: 4", "set_dynamic_batching", [], (4, True, False)),
        (
            "max_batch_size: 4 dynamic_batching { preserve_ordering: true }",
            "set_dynamic_batching",
            [],
            (4, True, False),
        ),
        (
            "max_batch_size: 4 sequence_batching {}",
            "set_dynamic_batching",
            [],
            "scheduling_choice as 'sequence_batching'",
        ),
        ("", "set_model_transaction_policy", [{"decoupled": True}], (0, False, True)),
        ("", "set_model_transaction_policy", [{}], (0, False, False)),
        ("model_transaction_policy { decoupled: true }", "set_model_transaction_policy", [{}], (0, False, True)),
        (
            "model_transaction_policy { decoupled: true }",
            "set_model_transaction_policy",
            [{"decoupled": False}],
            "trying to change decoupled property",
        ),
        ("", "set_model_transaction_policy", [{"x": True}], r"unknown \['x'\]"),
    ],
)
def test_auto_complete_config_changes_as_much_as_in_triton(
    config: str, call: str, arguments: list, outcome: object
) -> None:
    """What a configuration asks for may grow, but is never taken from it without a word."""
    proto = text_format.Parse(config, model_config_pb2.ModelConfig())
    change = getattr(pb_utils.ModelConfig(proto), call)
    if isinstance(outcome, str):
        before = proto.SerializeToString()
        with pytest.raises(ValueError, match=outcome):
            change(*arguments)
        assert proto.SerializeToString() == before
        return
    change(*arguments)
    decoupled = proto.model_transaction_policy.decoupled
    assert (proto.max_batch_size, proto.HasField("dynamic_batching"), decoupled) == outcome


def test_arguments_of_initialize(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (instances, loading, model):
        monkeypatch.setattr(module, "gpu_count", lambda: 0)
    add(
        repository,
        "told",
        """
        def initialize(self, args):
            config = json.loads(args["model_config"])
            assert config["max_batch_size"] == 0
            assert pb_utils.get_output_config_by_name(config, "y")["data_type"] == "TYPE_INT32"
            self.args = {key: args[key] for key in sorted(args) if key != "model_config"}

        def execute(self, requests):
            return [response(value(r), parameters={"args": json.dumps(self.args)}) for r in requests]
        """,
    )
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request("told", 1)])
        assert isinstance(answer, InferResponse)
        assert json.loads(str(answer.parameters["args"])) == {
            "model_instance_device_id": "0",
            "model_instance_kind": "CPU",
            "model_instance_name": "told_0_0",
            "model_name": "told",
            "model_repository": str(repository.root / "told"),
            "model_version": "1",
        }


def test_dlpack_both_ways(repository: Repository) -> None:
    from tutti.backends.python.triton_python_backend_utils import Tensor as PbTensor

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    there = PbTensor.from_dlpack("x", PbTensor("x", array))
    np.testing.assert_array_equal(there.as_numpy(), array)
    assert there.as_numpy().base is not None


def test_no_thread_is_left_when_a_model_stops(repository: Repository) -> None:
    add(repository, "mode", ADD_ONE)
    before = threading.active_count()
    with engine_over(repository.root) as engine:
        infer(engine, [request("mode", 1)])
    assert threading.active_count() == before


def test_a_models_own_metrics_are_on_the_metrics_page(repository: Repository) -> None:
    from tutti.frontends.v2.metrics_page import Metrics

    add(
        repository,
        "counts",
        """
        def initialize(self, args):
            family = pb_utils.MetricFamily
            self.seen = family("own_seen", "Seen", family.COUNTER).Metric({"model": "counts"})
            self.ended = family("own_ended_total", "Ended", family.COUNTER).Metric({"model": "counts"})
            self.last = family("own_last", "Last", family.GAUGE).Metric({"model": "counts"})
            self.sizes = family("own_sizes", "Sizes", family.HISTOGRAM).Metric({"model": "counts"}, [1, 10])

        def execute(self, requests):
            for request in requests:
                self.seen.increment(1)
                self.ended.increment(1)
                self.last.set(float(value(request)[0]))
                self.sizes.observe(float(value(request)[0]))
            return [response(value(r)) for r in requests]
        """,
    )
    with engine_over(repository.root) as engine:
        infer(engine, [request("counts", 5), request("counts", 50)])
        page = Metrics(engine).render()[0].decode()
    assert 'own_seen{model="counts"} 2.0' in page and "own_seen_total" not in page
    assert "# TYPE own_seen counter" in page
    assert 'own_ended_total{model="counts"} 2.0' in page
    assert 'own_last{model="counts"} 50.0' in page
    assert 'own_sizes_bucket{le="10",model="counts"} 1.0' in page
    assert 'own_sizes_sum{model="counts"} 55.0' in page


REFUSES = """
def execute(self, requests):
    ok = pb_utils.Tensor("y", np.zeros(1, np.int32))
    family = lambda kind: pb_utils.MetricFamily(f"refused_{kind}", "For a test.", kind)
    counter, gauge, histogram = (pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE,
                                 pb_utils.MetricFamily.HISTOGRAM)
    asked = lambda **more: pb_utils.InferenceRequest(
        **{"model_name": "m", "inputs": [ok], "requested_output_names": ["y"], **more})
    tries = {
        "TypeError": [
            lambda: pb_utils.Tensor(None, np.zeros(1)), lambda: pb_utils.Tensor("y", None),
            lambda: pb_utils.Tensor("", None), lambda: pb_utils.InferenceResponse(output_tensors=None),
            lambda: asked(inputs=None), lambda: asked(model_name=None), lambda: asked(requested_output_names=[None]),
            lambda: asked(requested_output_names=None), lambda: asked(correlation_id=None), lambda: asked(flags=None),
            lambda: asked(request_id=None), lambda: asked(model_version=None), lambda: pb_utils.Logger.log("m", None),
            lambda: pb_utils.Logger.log("m", 1), lambda: pb_utils.Logger.log(None),
            lambda: pb_utils.Logger.log_info(None), lambda: pb_utils.Logger.log_warn(7),
            lambda: pb_utils.Logger.log_error(None), lambda: pb_utils.Logger.log_verbose(None),
        ],
        "TritonModelException": [
            lambda: pb_utils.InferenceResponse([None]), lambda: pb_utils.InferenceResponse([ok, 7]),
            lambda: asked(inputs=[None]), lambda: pb_utils.Tensor.from_dlpack("y", None),
            lambda: pb_utils.Tensor.from_dlpack("", None),
            lambda: pb_utils.InferenceResponse([ok], parameters={7: 1}),
            lambda: pb_utils.InferenceResponse([ok], parameters={"a": None}), lambda: asked(parameters={"a": [1]}),
            lambda: family(counter).Metric().increment(-1), lambda: family(counter).Metric().set(1),
            lambda: family(gauge).Metric().observe(1), lambda: family(gauge).Metric(buckets=[1]),
            lambda: family(histogram).Metric(), lambda: family(histogram).Metric(buckets=[1, 1]),
            lambda: family(histogram).Metric(buckets=[2, 1]), lambda: family(histogram).Metric(buckets=[]).value(),
            lambda: family(histogram).Metric(buckets=[]).increment(1),
            lambda: pb_utils.MetricFamily("refused_0", "Of another kind.", gauge),
        ],
        "none": [
            lambda: pb_utils.InferenceResponse([]), lambda: asked(inputs=[], requested_output_names=[]),
            lambda: pb_utils.Logger.log("m"), lambda: pb_utils.Logger.log(b"m", pb_utils.Logger.VERBOSE),
            lambda: pb_utils.InferenceResponse([ok], parameters={"a": 1, "b": True, "c": "d", "e": 0.5}),
        ],
    }
    wrong = []
    for expected, each in tries.items():
        for at, one in enumerate(each):
            try:
                one()
                came = "none"
            except Exception as error:
                came = type(error).__name__
            if came != expected:
                wrong.append(f"{expected} {at}: {came}")
    return [pb_utils.InferenceResponse([ok], parameters={"wrong": "; ".join(wrong)}) for _ in requests]
"""


def test_arguments_are_refused_as_triton_refuses_them(repository: Repository) -> None:
    add(repository, "m", REFUSES)
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request("m", 1)])
    assert isinstance(answer, InferResponse)
    assert answer.parameters == {"wrong": ""}
