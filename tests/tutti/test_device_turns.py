"""Python models take turns on a device, and give them up while they wait for each other. On a simulated GPU."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.devices.probe import Probe
from tests.devices.probe import probe as the_probe
from tests.models import IN_PROCESS, Repository
from tests.serving import Gather, engine_over, infer, wait_until
from tests.tutti.test_pytorch_backend import load_error, scripted
from tutti.core.errors import DeviceLost, Internal
from tutti.core.types import Answer, Call, InferRequest, InferResponse, Tensor
from tutti.devices import health, process_engines
from tutti.devices.engine import DeviceEngine
from tutti.serving.engine import Engine

pytestmark = [
    pytest.mark.usefixtures("simulated_gpu"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CONFIG = """
backend: "python" max_batch_size: 1
input {{ name: "x" data_type: TYPE_INT32 dims: 1 }}
output {{ name: "y" data_type: TYPE_INT32 dims: 1 }}
instance_group {{ kind: {kind} count: {count} }}
{extra}
"""
# y = x + 1, computed by itself.
ALONE = """
from tests.devices.probe import probe
x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
with probe.enter(request.model_name()):
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x + 1)])
"""
# y = x + 1, of what `inner` makes of x and of 0: it is asked in the way that `ask` says.
ASKS = """
from concurrent.futures import ThreadPoolExecutor
from tests.devices.probe import probe
x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()

def inner(value):
    return pb_utils.InferenceRequest(
        model_name="{inner}", requested_output_names=["y"], inputs=[pb_utils.Tensor("x", value)],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU))

def number(answer):
    if answer.has_error():
        raise pb_utils.TritonModelException(answer.error().message())
    return pb_utils.get_output_tensor_by_name(answer, "y").as_numpy()

{ask}
with probe.enter(request.model_name()):
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", first - second + 1)])
"""
WAYS = {
    "exec": "first, second = number(inner(x).exec()), number(inner(x * 0).exec())",
    "iterated": "first, second = (number(list(inner(v).exec(decoupled=True))[0]) for v in (x, x * 0))",
    "gathered": """
import asyncio
async def ask():
    return await asyncio.gather(*[inner(v).async_exec() for v in (x, x * 0)])
first, second = map(number, asyncio.run(ask()))
""",
    "of its making, in a pool": """
with ThreadPoolExecutor(2) as pool:
    requests = [inner(x), inner(x * 0)]
    first, second = [number(answer) for answer in pool.map(type(requests[0]).exec, requests)]
""",
    "in other threads": """
with ThreadPoolExecutor(2) as pool:
    first, second = pool.map(lambda value: number(inner(value).exec()), (x, x * 0))
""",
    "in another thread's loop": """
import asyncio, threading
loop = asyncio.new_event_loop()
thread = threading.Thread(target=loop.run_forever)
thread.start()
async def ask(value):
    return await inner(value).async_exec()
first, second = [number(asyncio.run_coroutine_threadsafe(ask(v), loop).result()) for v in (x, x * 0)]
loop.call_soon_threadsafe(loop.stop)
thread.join()
loop.close()
""",
}
# As many as wait for each other's turns would wait for ever.
LIMIT = 'parameters { key: "tutti.hang_timeout_s" value { string_value: "20" } }'
NO_TURNS = 'parameters { key: "tutti.device_turn" value { string_value: "no" } }'
ISOLATED = 'parameters { key: "tutti.isolate" value { string_value: "process" } }'
CLIENTS = 64


@pytest.fixture
def probe() -> Iterator[Probe]:
    the_probe.reset()
    yield the_probe
    the_probe.may_leave.set()


def add(
    repository: Repository, name: str, execute: str, count: int = 1, kind: str = "KIND_GPU", extra: str = LIMIT
) -> None:
    if kind != "KIND_GPU" and "tutti.isolate" not in extra:
        extra += IN_PROCESS  # the probe is there
    repository.add_python(name, CONFIG.format(kind=kind, count=count, extra=extra), execute)


def asks(inner: str, way: str = "exec") -> str:
    return ASKS.format(inner=inner, ask=WAYS[way].strip())


def request(model: str, value: int) -> InferRequest:
    return InferRequest(model, {"x": Tensor.of("x", np.array([[value]], np.int32))})


def number(answer: Answer) -> int:
    assert isinstance(answer, InferResponse), answer
    return int(answer.tensor("y").array()[0, 0])


def ask(engine: Engine, model: str, value: int) -> int:
    (answer,) = infer(engine, [request(model, value)])
    return number(answer)


def ask_by_many(engine: Engine, models: list[str], clients: int = CLIENTS, each: int = 4) -> None:
    """Clients of their own threads, each for the next of the models; every answer is right."""

    def client(index: int) -> None:
        for n in range(each):
            assert ask(engine, models[index % len(models)], index * 100 + n) == index * 100 + n + 1

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))


def device() -> DeviceEngine:
    (engine,) = process_engines.engines()
    return engine


@pytest.mark.parametrize(("kind", "told"), [("KIND_GPU", "GPU 0"), ("KIND_AUTO", "GPU 0"), ("KIND_CPU", "CPU 0")])
def test_an_instance_is_told_where_it_is(repository: Repository, kind: str, told: str) -> None:
    execute = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x)], parameters={"told": self.told})
    """
    setup = 'self.told = args["model_instance_kind"] + " " + args["model_instance_device_id"]'
    repository.add_python("m", CONFIG.format(kind=kind, count=1, extra=""), execute, setup)
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [request("m", 1)])
    assert isinstance(answer, InferResponse) and answer.parameters == {"told": told}


def test_the_time_of_an_instance_is_measured(repository: Repository, probe: Probe) -> None:
    add(repository, "m", ALONE, count=2)
    with engine_over(repository.root) as engine:
        assert ask(engine, "m", 4) == 5
        assert device().model_ns["m"] > 0
        assert 0 < device().busy_ns <= device().model_ns["m"]
        assert [pipeline.name for pipeline in device().pipelines()] == ["m", "m"]
    assert not device().pipelines()
    assert device().model_ns["m"] > 0, "it counts on when the model is loaded again"


def test_turns_are_taken(repository: Repository, probe: Probe) -> None:
    """One executes, and one more begins when the first is expected to end."""
    for name in ("a", "b"):
        add(repository, name, ALONE, count=4)
    with engine_over(repository.root) as engine:
        ask_by_many(engine, ["a", "b"])
    assert len(probe.entered) == CLIENTS * 4
    assert probe.most <= 2


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("KIND_GPU", NO_TURNS),
        ("KIND_CPU", ""),
        ("KIND_AUTO", ""),
    ],
)
def test_what_takes_no_turns(repository: Repository, probe: Probe, kind: str, extra: str) -> None:
    add(repository, "m", ALONE, count=4, kind=kind, extra=extra)
    probe.may_leave.clear()
    with engine_over(repository.root) as engine:
        gather = Gather(4)
        engine([Call(request("m", n), gather) for n in range(4)])
        wait_until(lambda: len(probe.inside) == 4)
        probe.may_leave.set()
        gather.wait()
    assert not process_engines.engines()


def test_what_was_not_said_to_be_on_a_gpu_takes_turns_where_it_asks(repository: Repository, probe: Probe) -> None:
    extra = 'parameters { key: "tutti.device_turn" value { string_value: "yes" } }'
    add(repository, "m", ALONE, kind="KIND_AUTO", extra=extra)
    with engine_over(repository.root) as engine:
        assert ask(engine, "m", 1) == 2
    assert device().model_ns["m"] > 0


def test_a_wrong_choice_is_refused(repository: Repository) -> None:
    add(repository, "m", ALONE, extra='parameters { key: "tutti.device_turn" value { string_value: "maybe" } }')
    assert "model 'm': parameters.tutti.device_turn: expected 'yes' or 'no', got 'maybe'" in load_error(repository)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("KIND_CPU", ""),
        ("KIND_AUTO", ""),
        ("KIND_GPU", NO_TURNS),
        ("KIND_GPU", "model_transaction_policy { decoupled: true }"),
    ],
)
def test_a_limit_that_nothing_would_keep_is_refused(repository: Repository, kind: str, extra: str) -> None:
    add(repository, "m", ALONE, kind=kind, extra=LIMIT + extra + IN_PROCESS)
    error = load_error(repository)
    assert "model 'm': parameters.tutti.hang_timeout_s: is for models in processes of their own" in error
    assert "and for KIND_GPU, whose instances take turns" in error


@pytest.mark.parametrize("extra", [NO_TURNS, ISOLATED])
def test_with_and_without_turns_a_model_is_refused_once_its_device_has_failed(
    repository: Repository, probe: Probe, extra: str
) -> None:
    add(repository, "m", ALONE, extra=extra)
    add(repository, "other", ALONE, kind="KIND_CPU", extra="")
    with engine_over(repository.root) as engine:
        assert ask(engine, "m", 1) == 2
        health.health.fail("cuda:0", "test")
        assert not engine.model("m").is_ready() and engine.model("other").is_ready()
        (answer,) = infer(engine, [request("m", 1)])
        assert isinstance(answer, DeviceLost)
        assert ask(engine, "other", 1) == 2


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'torch'"), AssertionError("no CUDA")])
def test_without_a_pytorch_for_the_device_no_turns_are_taken(
    repository: Repository, probe: Probe, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from tutti.backends.python import instances as python

    def engine_of(name: str) -> DeviceEngine:
        raise error

    monkeypatch.setattr(python, "engine_of", engine_of)
    add(repository, "m", ALONE)
    with engine_over(repository.root) as engine:
        assert ask(engine, "m", 1) == 2


@pytest.mark.parametrize("way", WAYS)
def test_models_that_wait_for_others_hold_no_turn_meanwhile(repository: Repository, probe: Probe, way: str) -> None:
    add(repository, "inner", ALONE, count=2)
    add(repository, "middle", asks("inner", way), count=2)
    add(repository, "outer", asks("middle", way), count=4)
    with engine_over(repository.root) as engine:
        ask_by_many(engine, ["outer", "middle", "inner", "outer"], clients=16)
    # A thread of unknown origin gives up the turns of all executions of its model: one more may compute then.
    assert probe.most <= 2 or "other" in way
    assert not health.health.failures()


def test_nested_requests_of_many_clients(repository: Repository, probe: Probe) -> None:
    add(repository, "inner", ALONE)
    add(repository, "middle", asks("inner"))
    add(repository, "outer", asks("middle"))
    with engine_over(repository.root) as engine:
        ask_by_many(engine, ["outer", "middle", "inner"])
        assert {"outer", "middle", "inner"} == set(device().model_ns)
    assert probe.most <= 2


def test_models_that_ask_each_other(repository: Repository, probe: Probe) -> None:
    mutual = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    left = int(x[0, 0]) // 1000
    if left:
        asked = pb_utils.InferenceRequest(
            model_name="{other}", requested_output_names=["y"], inputs=[pb_utils.Tensor("x", x - 1000)])
        answer = asked.exec()
        x = pb_utils.get_output_tensor_by_name(answer, "y").as_numpy() - 1
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x + 1)])
    """
    add(repository, "a", mutual.format(other="b"), count=8)
    add(repository, "b", mutual.format(other="a"), count=8)

    def client(index: int) -> None:
        for n in range(8):
            assert ask(engine, "ab"[(index + n) % 2], 3000 + n) == n + 1

    with engine_over(repository.root) as engine, ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))
    assert not health.health.failures()


def test_errors_leave_no_turn_behind(repository: Repository, probe: Probe) -> None:
    add(repository, "raises", "raise ValueError('no')")
    add(repository, "asks", asks("raises"))
    add(repository, "raises_later", asks("alone") + "\n    raise ValueError('late')")
    add(repository, "alone", ALONE)
    with engine_over(repository.root) as engine:
        for _ in range(3):
            for name, says in (("raises", "no"), ("asks", "model 'raises'"), ("raises_later", "late")):
                (answer,) = infer(engine, [request(name, 1)])
                if name != "raises_later":
                    assert isinstance(answer, Internal) and says in answer.message
        assert ask(engine, "alone", 1) == 2
        assert device().ahead_ns(device().device.now_ns()) == 0, "nothing is under way"
    assert not device().pipelines()


def test_a_decoupled_model_holds_no_turn(repository: Repository, probe: Probe) -> None:
    source = """
    from tests.devices.probe import probe
    sender = request.get_response_sender()
    with probe.enter("m"):
        sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("y", np.zeros((1, 1), np.int32))]))
    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    """
    add(repository, "m", source, count=4, extra="model_transaction_policy { decoupled: true }")
    path = repository.root / "m/1/model.py"
    path.write_text(path.read_text().replace("return [self.answer(request)", "[self.answer(request)"))
    probe.may_leave.clear()
    with engine_over(repository.root) as engine:
        gather = Gather(4)
        engine([Call(request("m", n), gather, None, lambda answer: None) for n in range(4)])
        wait_until(lambda: len(probe.inside) == 4)
        probe.may_leave.set()
        gather.wait()
    assert not process_engines.engines()


def test_a_model_beside_one_of_pytorch(repository: Repository, probe: Probe) -> None:
    torch = pytest.importorskip("torch")

    class PlusOne(torch.nn.Module):  # type: ignore[name-defined]
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[name-defined]
            return x + 1

    config = CONFIG.format(kind="KIND_GPU", count=2, extra="dynamic_batching { }").replace("python", "pytorch")
    repository.add("torch", config.replace("max_batch_size: 1", "max_batch_size: 8"), {"model.pt": scripted(PlusOne())})
    add(repository, "alone", ALONE, count=2)
    add(repository, "asks", asks("torch"), count=2)
    with engine_over(repository.root) as engine:
        ask_by_many(engine, ["torch", "alone", "asks"])
        assert {"torch", "alone", "asks"} <= set(device().model_ns)


def test_a_device_that_is_lost_answers_everybody_who_waits_for_a_turn(repository: Repository, probe: Probe) -> None:
    add(repository, "holds", ALONE, count=4)
    add(repository, "inner", ALONE, kind="KIND_CPU", extra="")
    add(repository, "asks", asks("inner"))
    with engine_over(repository.root) as engine:
        probe.may_leave.clear()
        asking = Gather(1)
        asks_call = Call(request("asks", 1), asking)
        engine([asks_call])
        wait_until(lambda: probe.inside == ["inner"])
        holding = Gather(8)
        calls = [Call(request("holds", n), holding) for n in range(8)]
        engine(calls)
        wait_until(lambda: probe.inside.count("holds") == 2)
        health.health.fail("cuda:0", "test")
        # Those that have no turn are answered at once, the two that have one when they end.
        wait_until(lambda: sum(isinstance(call.answer, DeviceLost) for call in calls) == 6)
        probe.may_leave.set()
        holding.wait()
        asking.wait()
        assert isinstance(asks_call.answer, DeviceLost)
        assert "'asks'" in asks_call.answer.message and "cuda:0 has failed (test)" in asks_call.answer.message
        (later,) = infer(engine, [request("holds", 1)])
        assert isinstance(later, DeviceLost)


@pytest.mark.parametrize("is_limited", [True, False])
def test_one_that_hangs_is_found(repository: Repository, probe: Probe, is_limited: bool) -> None:
    limit = LIMIT.replace('"20"', '"0.1"' if is_limited else '"0"')
    add(repository, "m", ALONE, extra=limit)
    probe.may_leave.clear()
    with engine_over(repository.root) as engine:
        gather = Gather(1)
        engine([Call(request("m", 1), gather)])
        if is_limited:
            wait_until(lambda: health.health.failures())
            assert "an execution of 'm' has not ended after" in health.health.reason("cuda:0")
            assert not engine.is_ready()
        else:
            wait_until(lambda: probe.inside)
            (pipeline,) = device().pipelines()
            assert pipeline.hang_ns == 0
        probe.may_leave.set()
        gather.wait()


def test_waiting_for_another_model_is_no_hang(repository: Repository, probe: Probe) -> None:
    """Only who holds a turn is looked at."""
    looked = threading.Event()
    add(repository, "inner", ALONE, kind="KIND_CPU", extra="")
    add(repository, "outer", asks("inner"), extra=LIMIT.replace('"20"', '"0.1"'))
    probe.may_leave.clear()
    with engine_over(repository.root) as engine:
        gather = Gather(1)
        engine([Call(request("outer", 1), gather)])
        wait_until(lambda: probe.inside == ["inner"])
        device().device.alarm(300_000_000, looked.set)
        assert looked.wait(30)
        assert not health.health.failures()
        probe.may_leave.set()
        gather.wait()
