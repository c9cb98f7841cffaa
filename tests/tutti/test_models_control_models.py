"""What python models may have their server do to models: load, unload, and tell whether one is ready."""

import json
from collections.abc import Iterator

import numpy as np
import pytest

from tests.models import IN_PROCESS, Repository
from tests.serving import Gather, infer, timer, wait_until
from tests.tutti.test_python_processes import CONFIG, add, ask, y
from tutti import ensembles
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.serving import local
from tutti.serving.engine import Engine

LAB = """
backend: "python"
input { name: "CODE" data_type: TYPE_STRING dims: 1 }
output { name: "TOLD" data_type: TYPE_STRING dims: 1 }
"""
# Evaluates what it is sent, and tells its value, or what it raises.
EVALUATES = """
def execute(self, requests):
    return [self.told(pb_utils.get_input_tensor_by_name(r, "CODE").as_numpy()[0], r) for r in requests]

def told(self, code, request):
    try:
        value = repr(eval(code, {"pb_utils": pb_utils, "request": request, "threading": threading}))
    except BaseException as error:
        value = f"{type(error).__name__}: {error}"
    return pb_utils.InferenceResponse([pb_utils.Tensor("TOLD", np.array([value], dtype=object))])
"""
ENSEMBLE = """
platform: "ensemble"
input { name: "x" data_type: TYPE_FP32 dims: -1 }
output { name: "y" data_type: TYPE_FP32 dims: -1 }
ensemble_scheduling { step {
  model_name: "m" model_version: -1
  input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }
} }
"""


def constant(number: int) -> str:
    return f"def execute(self, requests): return [response({number}) for r in requests]"


def evaluate(engine: Engine, code: str, name: str = "lab") -> str:
    request = InferRequest(name, {"CODE": Tensor.of("CODE", np.array([code], dtype=object))})
    (answer,) = infer(engine, [request])
    assert isinstance(answer, InferResponse), answer
    (text,) = answer.tensor("TOLD").array().tolist()
    return str(text.decode() if isinstance(text, bytes) else text)


def controllable(repository: Repository, is_controllable: bool = True, refusal: str = "") -> Engine:
    return local.make_engine(
        repository.root, timer, ensembles.load, is_controllable=is_controllable, no_control_by_models=refusal
    )


@pytest.fixture(params=["", IN_PROCESS], ids=["process", "here"])
def engine(request: pytest.FixtureRequest, repository: Repository) -> Iterator[Engine]:
    """With a model that evaluates what it is sent; `m`, and an ensemble over it, lie beside it."""
    add(repository, "lab", EVALUATES, LAB + request.param)
    add(repository, "m", constant(1), CONFIG + request.param)
    repository.add("over", ENSEMBLE, {})
    engine = controllable(repository)
    engine.load_all(["lab"])
    yield engine
    engine.close()


def test_a_model_loads_asks_and_unloads_another(engine: Engine) -> None:
    assert evaluate(engine, "pb_utils.is_model_ready('m')") == "False"
    assert evaluate(engine, "pb_utils.load_model(model_name='m')") == "None"
    assert evaluate(engine, "pb_utils.is_model_ready('m')") == "True"
    assert evaluate(engine, "pb_utils.is_model_ready(model_name='m', model_version='1')") == "True"
    assert evaluate(engine, "pb_utils.is_model_ready('m', '2')") == "False"
    assert evaluate(engine, "pb_utils.is_model_ready('nosuch')") == "False"
    assert y(ask(engine, "m")) == [1]
    assert evaluate(engine, "pb_utils.unload_model('m')") == "None"
    assert evaluate(engine, "pb_utils.is_model_ready('m')") == "False"
    assert evaluate(engine, "pb_utils.unload_model('m')") == "None"


def test_an_ensemble_brings_its_models_and_takes_them_along(engine: Engine) -> None:
    assert evaluate(engine, "pb_utils.load_model('over')") == "None"
    assert y(ask(engine, "over")) == [1]
    assert evaluate(engine, "pb_utils.unload_model('over', unload_dependents=True)") == "None"
    assert evaluate(engine, "(pb_utils.is_model_ready('over'), pb_utils.is_model_ready('m'))") == "(False, False)"


def test_a_configuration_and_files_come_from_the_model(engine: Engine, repository: Repository) -> None:
    config = json.dumps(
        {
            "backend": "python",
            "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1]}],
            "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [-1]}],
        }
    )
    add(repository, "draft", constant(7))
    text = (repository.root / "draft" / "1" / "model.py").read_text()
    load = f"pb_utils.load_model('new', config={config!r}, files={{'file:3/model.py': {text.encode()!r}}})"
    assert evaluate(engine, load) == "None"
    assert y(ask(engine, "new")) == [7]
    assert engine.versions("new") == ["3"]


REFUSED = {
    "pb_utils.load_model('nosuch')": "failed to load 'nosuch'",
    "pb_utils.load_model('m', config='{')": "JSON does not parse",
    "pb_utils.load_model('m', files={'file:1/model.py': b''})": "without the parameter 'config'",
    "pb_utils.load_model('m', files={'1/model.py': b''})": "expected 'file:VERSION/FILE', got '1/model.py'",
    "pb_utils.load_model('m', config='{}', files={'file:../model.py': b''})": "expected VERSION/FILE",
    "pb_utils.is_model_ready('lab', 'x')": "version should be an integral value > 0",
}


def test_what_cannot_be_done_is_told_by_exceptions(engine: Engine) -> None:
    for code, told in REFUSED.items():
        answer = evaluate(engine, code)
        assert answer.startswith("TritonModelException: ") and told in answer, code


def test_a_model_may_replace_and_unload_itself(engine: Engine) -> None:
    """What it answers just now is not waited for: it would wait for itself."""
    assert evaluate(engine, "pb_utils.load_model('lab')") == "None"
    assert evaluate(engine, "pb_utils.unload_model('lab')") == "None"
    wait_until(lambda: "lab" not in {model.config.name for model in engine.models()})
    wait_until(lambda: not engine.unfinished())


def test_initialize_may_load_what_the_model_needs(repository: Repository) -> None:
    body = """
    def initialize(self, args):
        pb_utils.load_model("m")

    def execute(self, requests):
        asked = [
            pb_utils.InferenceRequest(model_name="m", requested_output_names=["y"], inputs=r.inputs()) for r in requests
        ]
        return [pb_utils.InferenceResponse(a.exec().output_tensors()) for a in asked]
    """
    add(repository, "m", constant(5))
    add(repository, "needs", body)
    engine = controllable(repository)
    try:
        engine.load_all(["needs"])
        assert y(ask(engine, "needs")) == [5]
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("is_controllable", "refusal", "told"),
    [(False, "", "--model-control-mode explicit"), (True, "not on this machine", "not on this machine")],
)
def test_where_nothing_may_be_loaded_models_are_told_so(
    repository: Repository, is_controllable: bool, refusal: str, told: str
) -> None:
    add(repository, "lab", EVALUATES, LAB)
    engine = controllable(repository, is_controllable, refusal)
    try:
        engine.load_all()
        for code in ("pb_utils.load_model('lab')", "pb_utils.unload_model('lab')"):
            answer = evaluate(engine, code)
            assert answer.startswith("TritonModelException: ") and told in answer
        assert evaluate(engine, "pb_utils.is_model_ready('lab')") == "True"
    finally:
        engine.close()


def test_a_load_does_not_hold_up_what_else_the_process_asks(engine: Engine, repository: Repository) -> None:
    """The load waits until its model is asked something by the process that loads it."""
    slow = """
    def initialize(self, args):
        import time
        begin = time.monotonic()
        while not os.path.exists(os.path.join(args["model_repository"], "go")) and time.monotonic() - begin < 60:
            time.sleep(0.01)
    """
    add(repository, "slow", slow + "\n    " + constant(3))
    go = repository.root / "slow" / "go"
    engine.load("m")
    code = f"""(
        (loading := threading.Thread(target=pb_utils.load_model, args=("slow",))).start(),
        pb_utils.InferenceRequest(
            model_name="m", requested_output_names=["y"],
            inputs=[pb_utils.Tensor("x", __import__("numpy").zeros(1, "float32"))],
        ).exec().has_error(),
        pb_utils.is_model_ready("slow"),
        request.is_cancelled(),
        open({str(go)!r}, "w").close(),
        loading.join(),
        pb_utils.is_model_ready("slow"),
    )"""
    assert evaluate(engine, code.replace("\n", " ").strip()) == "(None, False, False, False, None, None, True)"
    assert y(ask(engine, "slow")) == [3]


@pytest.mark.parametrize("extra", ["", IN_PROCESS])
def test_models_find_their_own_folders(repository: Repository, extra: str) -> None:
    body = """
    folder = pb_utils.get_model_dir() if os.path.exists("") else None
    def execute(self, requests):
        from helper import inner
        value = f"{pb_utils.get_model_dir()} {inner(pb_utils)}"
        return [pb_utils.InferenceResponse([pb_utils.Tensor("TOLD", np.array([value], object))]) for r in requests]
    """
    helper = "def inner(pb_utils): return pb_utils.get_model_dir()"
    if extra:
        body = body.replace("from helper import inner", "").replace("inner(pb_utils)", "pb_utils.get_model_dir()")
    for name in ("a", "b"):
        add(repository, name, body, LAB + extra, helper=helper)
    engine = controllable(repository)
    try:
        engine.load_all()
        for name in ("a", "b"):
            folder = repository.root / name / "1"
            assert evaluate(engine, "", name) == f"{folder} {folder}"
    finally:
        engine.close()


EVALUATED = {
    "[(level.name, int(level)) for level in pb_utils.Logger.LogLevel]": (
        "[('INFO', 0), ('WARNING', 1), ('ERROR', 2), ('VERBOSE', 3)]"
    ),
    "pb_utils.Logger.WARNING is pb_utils.Logger.LogLevel.WARNING": "True",
    "pb_utils.Logger.log('a', pb_utils.Logger.LogLevel.ERROR)": "None",
    "pb_utils.Logger.log(message='b')": "None",
    "(request.set_flags(2), request.flags())": "(None, 2)",
    "(lambda r: (r.flags(), r.set_flags(3), r.flags(), r.set_flags(0), r.flags()))"
    "(pb_utils.InferenceRequest(model_name='m', flags=1))": "(1, None, 3, None, 0)",
    "[pb_utils.TRITON_STRING_TO_NUMPY[f'TYPE_{n}'].__name__ for n in ('BOOL', 'FP16', 'INT64', 'STRING')]": (
        "['bool', 'float16', 'int64', 'object_']"
    ),
}


def test_what_else_triton_gives_its_models(engine: Engine) -> None:
    assert {code: evaluate(engine, code) for code in EVALUATED} == EVALUATED


def test_execution_timeout_is_for_all_answers(repository: Repository) -> None:
    """A model that gives answer after answer, each soon, is not waited for beyond it; nor one that gives none."""
    stream = """
    def execute(self, requests):
        for r in requests:
            threading.Thread(target=self.go, args=(r.get_response_sender(),), daemon=True).start()

    def go(self, sender):
        import time
        begin = time.monotonic()
        while not sender.is_cancelled() and time.monotonic() - begin < 60:
            sender.send(response(1))
            time.sleep(0.005)
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    """
    silent = """
    def execute(self, requests):
        import time
        begin = time.monotonic()
        while not requests[0].is_cancelled() and time.monotonic() - begin < 60:
            time.sleep(0.005)
        return [response(1) for r in requests]
    """
    asks = """
    async def execute(self, requests):
        made = lambda name: pb_utils.InferenceRequest(
            model_name=name, requested_output_names=["y"], inputs=requests[0].inputs()
        )
        limit = {"execution_timeout": 300_000_000}
        last = [
            list(made("stream").exec(decoupled=True, **limit))[-1],
            list(await made("stream").async_exec(decoupled=True, **limit))[-1],
            made("silent").exec(**limit),
            await made("silent").async_exec(**limit),
        ]
        told = [each.error().message() if each.has_error() else "" for each in last]
        return [response(*("execution_timeout" in text for text in told)) for r in requests]
    """
    add(repository, "stream", stream, CONFIG + "model_transaction_policy { decoupled: true }")
    add(repository, "silent", silent, CONFIG + "instance_group { count: 2 kind: KIND_CPU }")
    add(repository, "asks", asks)
    engine = controllable(repository)
    try:
        engine.load_all()
        assert y(ask(engine, "asks")) == [1, 1, 1, 1]
    finally:
        engine.close()


def test_a_model_that_waits_no_longer_costs_no_other_caller_its_answer(repository: Repository) -> None:
    """What the model has asked for is answered later, in one batch with what others have asked for."""
    slow = """
    async_folder = None
    def execute(self, requests):
        import time
        folder = os.path.dirname(os.path.dirname(__file__))
        open(os.path.join(folder, "began"), "w").close()
        begin = time.monotonic()
        while not os.path.exists(os.path.join(folder, "go")) and time.monotonic() - begin < 60:
            time.sleep(0.005)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x_of(r) + len(requests))]) for r in requests]
    """
    asks = """
    async def execute(self, requests):
        made = pb_utils.InferenceRequest(
            model_name="slow", requested_output_names=["y"], inputs=[pb_utils.Tensor("x", np.ones((1, 1), np.float32))]
        )
        try:
            await asyncio.wait_for(made.async_exec(), 0.05)
            return [response(0) for r in requests]
        except asyncio.TimeoutError:
            return [response(1) for r in requests]
    """
    batched = CONFIG.replace("dims: -1", "dims: 1") + "max_batch_size: 4 dynamic_batching {}" + IN_PROCESS
    add(repository, "slow", slow.replace("    async_folder = None\n", ""), batched)
    add(repository, "asks", asks, CONFIG + IN_PROCESS)
    engine = controllable(repository)
    rows = {"x": Tensor.of("x", np.ones((1, 1), np.float32))}
    first, second = (Call(InferRequest("slow", dict(rows)), Gather(1)) for _ in range(2))
    try:
        engine.load_all()
        engine([first])
        wait_until((repository.root / "slow" / "began").exists)
        assert y(ask(engine, "asks")) == [1]
        engine([second])
        (repository.root / "slow" / "go").touch()
        for call, together in ((first, 1), (second, 2)):
            call.sink.wait()  # type: ignore[attr-defined]
            assert isinstance(call.answer, InferResponse), call.answer
            assert call.answer.tensor("y").array().tolist() == [[1 + together]]
    finally:
        engine.close()
