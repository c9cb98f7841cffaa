"""The link between front-end processes and the engine's: both ends in this process, over a real socket."""

import asyncio
import gc
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from tests.models import IN_PROCESS, Repository, onnx_add_one
from tests.serving import Gather, engine_over, infer, wait_until
from tutti.core import rows
from tutti.core.errors import Cancelled, DeadlineExceeded, InferError, Internal, Unavailable
from tutti.core.types import Answer, Call, Columns, InferRequest, InferResponse, Raw, Spent, Tensor, now_ns
from tutti.frontends.processes import bursts, engine_link, shared_blocks
from tutti.frontends.processes.engine_link import EngineSide
from tutti.frontends.processes.link import FrontEnd
from tutti.frontends.v2.api import Api
from tutti.observing.statistics import BatchTimes
from tutti.observing.tracing import Tracer, parse_config
from tutti.serving.engine import Engine

WIDTH = 50_000
TELL = """
    seen = json.dumps([request.request_id(), json.loads(request.parameters())])
    return pb_utils.InferenceResponse([pb_utils.Tensor("seen", np.array([[seen.encode()]], dtype=object))])
"""


class Link:
    """An engine's end and any number of front-ends, on a loop in a thread of its own."""

    def __init__(self, engine: Engine, folder: Path, tracer: Tracer | None = None) -> None:
        self.folder = folder
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.api = Api(engine, tracer=tracer)
        self.side: EngineSide = self.call(self._new_side)
        self.fronts: list[FrontEnd] = []

    async def _new_side(self) -> EngineSide:
        side = EngineSide(self.api)
        await side.listen(self.folder / "engine")
        return side

    def call(self, what: Callable[..., Any], *arguments: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what(*arguments), self.loop).result(20)

    def front(self) -> FrontEnd:
        async def connect() -> FrontEnd:
            front = FrontEnd()
            await front.connect(self.folder)
            return front

        front: FrontEnd = self.call(connect)
        self.fronts.append(front)
        return front

    def arenas(self) -> list[shared_blocks.Arena]:
        ends = [end.arena for end in self.side._ends] + [f._connection.arena for f in self.fronts if f._connection]
        return [arena for arena in ends if arena is not None]

    def blocks_in_use(self) -> int:
        return sum(arena.in_use() for arena in self.arenas())

    def close(self) -> None:
        async def close() -> None:
            self.side.close()
            for front in self.fronts:
                if front._connection is not None:
                    front._connection.close()
            await asyncio.sleep(0)

        self.call(close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture
def repository(repository: Repository) -> Repository:
    repository.add_onnx()
    repository.add_onnx("unjoined", extra="")
    repository.add_onnx("cached", extra="dynamic_batching {} response_cache { enable: true }")
    repository.add_gather()
    wide = f"""
    backend: "onnxruntime" max_batch_size: 8
    input {{ name: "x" data_type: TYPE_FP32 dims: {WIDTH} }} output {{ name: "y" data_type: TYPE_FP32 dims: {WIDTH} }}
    dynamic_batching {{}}
    """
    repository.add("wide", wide, {"model.onnx": onnx_add_one(WIDTH)})
    echo = 'backend: "python" max_batch_size: 4 input { name: "t" data_type: TYPE_STRING dims: -1 }'
    echo += ' output { name: "seen" data_type: TYPE_STRING dims: 1 }' + IN_PROCESS
    repository.add_python("tells", echo, TELL)
    repository.add_slow()
    return repository


@contextmanager
def linked(engine: Engine, folder: Path, tracer: Tracer | None = None) -> Iterator[Link]:
    link = Link(engine, folder, tracer)
    try:
        yield link
    finally:
        link.close()


@pytest.fixture
def engine(repository: Repository) -> Iterator[Engine]:
    with engine_over(repository.root) as engine:
        yield engine


@pytest.fixture
def link(engine: Engine, tmp_path: Path) -> Iterator[Link]:
    with linked(engine, tmp_path) as link:
        yield link


def request(model: str = "add_one", value: float = 1.0, rows: int = 1, width: int = 4, **more: Any) -> InferRequest:
    x = np.full((rows, width), value, np.float32)
    signature = (model, rows, width, more.get("outputs", ())) if not more.get("id") else None
    return InferRequest(model, {"x": Tensor("x", "FP32", x.shape, x.tobytes())}, signature=signature, **more)


def gathered(*ids: int) -> InferRequest:
    data = np.array([ids], np.int64).tobytes()
    return InferRequest("gather", {"ids": Tensor("ids", "INT64", (1, len(ids)), data)}, signature=("gather", len(ids)))


def told(text: str, request_id: str = "", **parameters: Any) -> InferRequest:
    elements = np.array([[text.encode()]], dtype=object)
    inputs = {"t": Tensor("t", "BYTES", (1, 1), Tensor("t", "BYTES", (1, 1), elements).raw())}
    return InferRequest("tells", inputs, "", request_id, (), parameters, signature=("tells", len(text)))


def shown(answer: Answer) -> object:
    if isinstance(answer, InferError):
        return type(answer).__name__, answer.message
    outputs = [(t.name, t.datatype, t.shape, bytes(t.raw())) for t in answer.outputs]
    return answer.model_name, answer.model_version, answer.parameters, outputs


def counts(engine: Engine, model: str = "add_one") -> Any:
    return engine.model(model).statistics.counts


def random_request(rng: random.Random) -> InferRequest:
    """Mixed models, signatures, sizes, ids, outputs and parameters; some are wrong."""
    kind = rng.random()
    if kind < 0.1:
        return gathered(*[rng.randrange(5) for _ in range(rng.choice([1, 2]))])
    if kind < 0.2:
        return told(rng.choice(["a", "bb"]), rng.choice(["", "one", "two"]), **rng.choice([{}, {"p": 1}]))
    if kind < 0.3:
        return request("wide", rng.random(), rng.choice([1, 2, 9]), WIDTH)
    if kind < 0.33:
        return request("nowhere")
    model = rng.choice(["add_one", "add_one", "unjoined", "cached"])
    more: dict[str, Any] = {}
    if rng.random() < 0.2:
        more["id"] = rng.choice(["a", "b"])
    if rng.random() < 0.2:
        more["outputs"] = rng.choice([("y",), ("z",)])
    if rng.random() < 0.2:
        more["parameters"] = rng.choice([{"priority": 1}, {"timeout": 10_000_000}])
    return request(model, rng.randrange(5), rng.choice([1, 1, 1, 2, 3, 9]), rng.choice([4, 4, 4, 3]), **more)


@pytest.mark.parametrize("seed", range(3))
def test_a_mixture_through_two_front_ends_is_answered_as_in_process(engine: Engine, link: Link, seed: int) -> None:
    rng = random.Random(seed)
    fronts = [link.front(), link.front()]
    requests = [random_request(rng) for _ in range(500)]
    expected = [shown(answer) for one in requests for answer in infer(engine, [one])]
    before = {name: (counts(engine, name).success.count, counts(engine, name).fail.count) for name in MODELS}
    at, waiting = 0, []
    while at < len(requests):
        burst = requests[at : at + rng.randrange(1, 60)]
        gather = Gather(len(burst))
        calls = [Call(one, gather) for one in burst]
        rng.choice(fronts)(calls)
        waiting.append((gather, calls))
        at += len(burst)
    found = []
    for gather, calls in waiting:
        gather.wait()
        found += [shown(call.answer) for call in calls if call.answer is not None]
    assert found == expected
    for name, (success, fail) in before.items():
        # As many again as in process: nothing is counted twice.
        assert (counts(engine, name).success.count, counts(engine, name).fail.count) == (2 * success, 2 * fail), name
    del waiting, calls, burst
    # The thread that delivers an instance's answers has its last batch until there is another.
    wait_until(lambda: blocks_left(link) <= 8)


async def lose(front: FrontEnd) -> None:
    """End a front-end's connection."""
    assert front._connection is not None
    front._connection.close()
    await asyncio.sleep(0)


def blocks_left(link: Link) -> int:
    gc.collect()
    return link.blocks_in_use()


MODELS = ("add_one", "unjoined", "gather", "tells", "wide")


def test_equal_requests_of_a_burst_are_one_call_and_count_as_many(engine: Engine, link: Link) -> None:
    answers = infer(link.front(), [request(value=n) for n in range(16)])
    assert [answer.tensor("y").array().tolist() for answer in answers] == [[[n + 1.0] * 4] for n in range(16)]  # type: ignore[union-attr]
    assert counts(engine).success.count == counts(engine).inferences == 16
    assert all(isinstance(answer, InferResponse) and answer.columns is not None for answer in answers)


def test_a_culprit_among_them_fails_alone_and_is_counted_once(engine: Engine, link: Link) -> None:
    answers = infer(link.front(), [gathered(1), gathered(7), gathered(2), gathered(3)])
    assert [isinstance(answer, Internal) for answer in answers] == [False, True, False, False]
    assert answers[3].tensor("y").array().tolist() == [[30.0]]  # type: ignore[union-attr]
    assert (counts(engine, "gather").success.count, counts(engine, "gather").fail.count) == (3, 1)


def test_a_python_model_sees_each_request_with_its_id(link: Link) -> None:
    answers = infer(link.front(), [told("a", "1"), told("a", "2"), told("a"), told("a", "3", p=True)])
    seen = [answer.tensor("seen").array().item() for answer in answers]  # type: ignore[union-attr]
    assert seen == [b'["1", {}]', b'["2", {}]', b'["", {}]', b'["3", {"p": true}]']


def test_traced_requests_stay_single(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    tracer = Tracer(parse_config([f"triton,file={file}", "level=TIMESTAMPS", "rate=4"]))
    with linked(engine, tmp_path, tracer) as link:
        infer(link.front(), [request(value=n) for n in range(8)])
    tracer.close()
    assert file.read_text().count('"model_name": "add_one"') == 2


class Holding:
    """In an engine's place: keeps what comes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.calls: list[Call] = []

    def __call__(self, calls: Sequence[Call]) -> None:
        self.calls += calls

    def model(self, name: str, version: str = "") -> Any:
        return self._engine.model(name, version)

    def go_on(self) -> None:
        calls, self.calls = self.calls, []
        self._engine(calls)


@pytest.fixture
def held(engine: Engine, tmp_path: Path) -> Iterator[tuple[Link, Holding]]:
    holding = Holding(engine)
    with linked(holding, tmp_path) as link:  # type: ignore[arg-type]
        yield link, holding


def test_calls_take_a_part_of_a_batch_and_end_with_the_first_deadline(held: tuple[Link, Holding]) -> None:
    link, holding = held
    calls = [Call(request(value=n), Gather(1)) for n in range(7)]
    start = now_ns()
    for call in calls:
        call.deadline_ns = start + 10_000_000_000
    calls[6].deadline_ns = start + 20_000_000_000
    link.front()(calls)
    wait_until(lambda: len(holding.calls) == 3)
    assert [(call.requests, call.request.inputs["x"].shape[0]) for call in holding.calls] == [(4, 4), (2, 2), (1, 1)]
    assert [round((call.deadline_ns - start) / 1e9) for call in holding.calls] == [10, 10, 20]


def test_what_expires_together_is_refused_by_its_own_deadlines(held: tuple[Link, Holding]) -> None:
    link, holding = held
    gather = Gather(2)
    calls = [Call(request(value=n), gather) for n in range(2)]
    link.front()(calls)
    wait_until(lambda: holding.calls)
    (call,) = holding.calls
    holding.calls = []
    call.finish(DeadlineExceeded("too late"))
    wait_until(lambda: len(holding.calls) == 2)
    assert [one.requests for one in holding.calls] == [1, 1]
    holding.go_on()
    gather.wait()
    assert all(isinstance(call.answer, InferResponse) for call in calls)


def test_a_caller_that_leaves_does_not_take_the_others_along(held: tuple[Link, Holding]) -> None:
    link, holding = held
    gather = Gather(2)
    calls = [Call(request(value=n), gather) for n in range(2)]
    link.front()(calls)
    wait_until(lambda: holding.calls)
    calls[1].is_cancelled = True
    wait_until(lambda: holding.calls[0].token.gone)
    assert not holding.calls[0].is_cancelled
    calls[0].is_cancelled = True
    wait_until(lambda: holding.calls[0].is_cancelled)
    holding.go_on()
    wait_until(lambda: len(holding.calls) == 2)
    holding.go_on()  # one by one, each is counted
    gather.wait()
    assert all(isinstance(call.answer, Cancelled) for call in calls)


def test_a_front_end_that_goes_cancels_its_calls_and_frees_its_blocks(held: tuple[Link, Holding]) -> None:
    link, holding = held
    front = link.front()
    front([Call(request("wide", width=WIDTH), Gather(1)), *[Call(request(), Gather(1)) for _ in range(8)]])
    wait_until(lambda: len(holding.calls) == 3)

    link.call(lose, front)
    wait_until(lambda: all(call.is_cancelled for call in holding.calls))
    assert holding.calls[0].request.inputs["x"].array()[0, -1] == 1.0, "it can still be read"
    assert not link.side._ends
    mapping = Path("/proc/self/maps")
    assert mapping.read_text().count("tutti-blocks")
    holding.calls.clear()
    link.fronts.clear()
    del front
    wait_until(lambda: gc.collect() >= 0 and not mapping.read_text().count("tutti-blocks"))


def test_large_tensors_are_lent_both_ways_and_given_back(engine: Engine, link: Link) -> None:
    front = link.front()
    memory = front.memory(WIDTH * 4)
    np.frombuffer(memory, np.float32)[:] = 3.0
    assert link.blocks_in_use() == 1
    tensor = Tensor("x", "FP32", (1, WIDTH), memory)
    (answer,) = infer(front, [InferRequest("wide", {"x": tensor})])
    assert isinstance(answer, InferResponse)
    data: Any = answer.tensor("y").data
    assert isinstance(data.obj.base, shared_blocks._Lease), "the answer is where the engine wrote it"
    assert (answer.tensor("y").array() == 4.0).all()
    del memory, tensor, answer, data
    wait_until(lambda: not blocks_left(link))


def test_a_block_is_kept_as_long_as_the_engine_reads_it(held: tuple[Link, Holding]) -> None:
    link, holding = held
    front = link.front()
    calls = [Call(request("wide", value=7, width=WIDTH), Gather(1))]
    front(calls)
    wait_until(lambda: holding.calls)
    front._open.clear()
    del calls
    gc.collect()
    assert link.blocks_in_use() == 1
    others = [front.memory(WIDTH * 4) for _ in range(100)]
    for other in others:
        np.frombuffer(other, np.float32)[:] = 0.0
    assert (holding.calls[0].request.inputs["x"].array() == 7).all()


def test_without_a_free_block_everything_goes_in_band(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_blocks, "ARENA_BYTES", 4 * 256 * 1024)
    monkeypatch.setattr(shared_blocks.Arena.__init__, "__defaults__", (4 * 256 * 1024,))
    front = link.front()
    kept = [front.memory(WIDTH * 4) for _ in range(6)]
    assert link.blocks_in_use() == 4
    requests = [request("wide", value=n, width=WIDTH) for n in range(20)]
    for _ in range(2):
        answers = infer(front, requests)
        for n, answer in enumerate(answers):
            assert isinstance(answer, InferResponse)
            assert (answer.tensor("y").array() == n + 1).all()
        kept.clear()


def test_a_front_end_that_is_behind_gets_no_more_large_answers(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    front = link.front()
    monkeypatch.setattr(engine_link, "_MOST_UNSENT_BYTES", -1)
    large, small = infer(front, [request("wide", width=WIDTH), request()])
    assert isinstance(large, Unavailable) and "try again" in large.message
    assert isinstance(small, InferResponse)


def test_the_loss_of_an_engine_ends_its_blocks(held: tuple[Link, Holding]) -> None:
    link, holding = held
    front = link.front()
    gather = Gather(2)
    early = front.memory(WIDTH * 4)
    np.frombuffer(early, np.float32)[:] = 1.0
    front([Call(request("wide", width=WIDTH), gather), Call(request(), gather)])
    wait_until(lambda: len(holding.calls) == 2)

    link.call(lose, front)
    gather.wait()
    wait_until(lambda: front.folder is None)
    (refused,) = infer(front, [request()])
    assert isinstance(refused, Unavailable)
    assert isinstance(front.memory(WIDTH * 4).obj, np.ndarray)
    link.call(front.connect, link.folder)
    gather = Gather(1)
    call = Call(InferRequest("wide", {"x": Tensor("x", "FP32", (1, WIDTH), early)}), gather)
    holding.calls.clear()
    front([call])
    wait_until(lambda: holding.calls)
    holding.go_on()
    gather.wait()
    assert isinstance(call.answer, InferResponse), "what was received for the last engine goes to the next one"
    assert (call.answer.tensor("y").array() == 2.0).all()


def test_buddies_never_overlap_and_join_again() -> None:
    rng = random.Random(0)
    size, smallest = 1 << 16, 64
    buddies = shared_blocks.Buddies(size, smallest)
    taken: dict[int, int] = {}
    for _ in range(20_000):
        if taken and rng.random() < 0.5:
            at = rng.choice(list(taken))
            del taken[at]
            buddies.give(at)
            continue
        wanted = rng.choice([1, 64, 65, 500, 4096, 70_000])
        at = buddies.take(wanted)  # type: ignore[assignment]
        if at is None:
            stretch = max(smallest, 1 << (wanted - 1).bit_length())
            free = set(range(0, size, stretch)) if stretch <= size else set()
            assert not [a for a in free if all(b + n <= a or a + stretch <= b for b, n in taken.items())]
            continue
        assert at + wanted <= size
        assert all(b + n <= at or at + wanted <= b for b, n in taken.items())
        taken[at] = wanted
    for at in taken:
        buddies.give(at)
    assert not len(buddies)
    assert buddies.take(size) == 0


def test_a_peer_cannot_truncate_what_is_mapped() -> None:
    arena = shared_blocks.Arena(1 << 20)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.file, 4096)
    arena.close_file()


def asked(front: FrontEnd, requests: Sequence[InferRequest]) -> list[Call]:
    """The calls, settled."""
    gather = Gather(len(requests))
    calls = [Call(one, gather) for one in requests]
    front(calls)
    gather.wait()
    return calls


def test_the_engine_tells_where_the_time_went(link: Link) -> None:
    front = link.front()
    began = now_ns()
    calls = [
        *asked(front, [request(value=n) for n in range(8)]),
        *asked(front, [request("unjoined") for _ in range(8)]),
    ]
    passed = now_ns() - began
    for call in calls:
        assert isinstance(call.times, Spent), call.answer
        assert call.times.rows >= 1
        assert 0 < call.times.compute_ns + call.times.queue_ns < passed
        assert began <= call.arrived_ns <= began + passed
    assert [call.times for call in asked(front, [request("nowhere")])] == [None]
    assert [call.times for _ in range(2) for call in asked(front, [request("cached")])][1] == Spent(is_cached=True)


def test_each_of_a_batch_is_told_how_long_it_has_waited() -> None:
    columns = Columns([Tensor.of("y", np.zeros((4, 1), np.float32))])
    calls = []
    for number, (answer, arrived) in enumerate(zip(rows.parts("m", "1", columns, [1] * 4), (1, 1, 5, 8), strict=True)):
        call = Call(InferRequest("m", {}), Gather(1), number)
        call.answer, call.arrived_ns, call.times = answer, arrived, BatchTimes(10, 10, 30, 30, 4)
        calls.append(call)
    pieces: list[Raw] = []
    (packed,) = bursts.pack_answers(calls, lambda _: None, pieces)
    unpacking = bursts.Unpacking(memoryview(b"".join(pieces)), lambda *_: b"")
    timed = packed.timed(unpacking.answers(packed))
    assert [times for _, times in timed] == [Spent(queue, 20, 4) for queue in (9, 9, 5, 2)]
