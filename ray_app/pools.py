"""Pools of replicas: which are up, which one takes the next batch, and batches on their way.

A batch goes to the first of its model's pools, in order of preference, that is up and that it has not failed on.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ray_app import control, merging
from ray_app.control import Change, Desired
from ray_app.replica import Description
from tutti import wire
from tutti.cost import Costs
from tutti.errors import Cancelled, DeadlineExceeded, InferError, Internal, Unavailable
from tutti.scheduler import Scheduler, trace
from tutti.statistics import BatchTimes, ModelStatistics
from tutti.types import Answer, Call, InferResponse, now_ns, settle

_log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 0.25
PROBE_TIMEOUT_S = 2.0
CANCEL_INTERVAL_S = 0.1
MAX_SENDS = 3
NO_POOL_TIMEOUT_S = 10.0
POOL_PARAMETER = "tutti_pool"


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """What a replica says of itself when probed. `models` are "name/version" of those ready."""

    replica: str
    models: frozenset[str]
    id: str = ""
    generation: int = 0


@dataclass(slots=True)
class PoolStatus:
    """What is known of one pool. Pure: told of probes and failures, answers whether to use it."""

    name: str
    is_up: bool = False
    replicas: tuple[ReplicaState, ...] = ()
    requests: int = 0
    fallbacks: int = 0
    failed_probes: int = 0

    def saw(self, replicas: Sequence[ReplicaState]) -> None:
        """A probe's result. No replica means down at once."""
        self.failed_probes = 0
        self.replicas = tuple(replicas)
        self._set_up(bool(replicas))

    def missed(self) -> None:
        """A probe that did not come back. One may be chance; two in a row mean down."""
        self.failed_probes += 1
        if self.failed_probes >= 2:
            self.replicas = ()
            self._set_up(False)

    def failed(self) -> None:
        """A batch was lost: down, until a probe says otherwise."""
        self._set_up(False)

    def lost(self, replica: str) -> None:
        """One replica, by id, is gone: the others are not to blame."""
        self.replicas = tuple(one for one in self.replicas if one.id != replica)

    def has_model(self, key: str) -> bool:
        return self.is_up and any(key in replica.models for replica in self.replicas)

    def _set_up(self, is_up: bool) -> None:
        if is_up != self.is_up:
            _log.warning("pool '%s' is %s, %d replicas", self.name, "up" if is_up else "down", len(self.replicas))
            self.is_up = is_up


@dataclass(slots=True)
class Pool:
    """A pool's status and its Serve handle. `in_flight` are tasks that wait for a replica's answer.

    `slots` is how many batches of each model may be on their way to it at a time.
    """

    status: PoolStatus
    handle: Any
    send: Any
    stream: Any = None
    slots: int = 2
    is_catching_up: bool = False
    in_flight: set[asyncio.Task[Any]] = field(default_factory=set)


def choose(pools: Sequence[Pool], failed: Sequence[Pool]) -> Pool | None:
    """The pool for a batch that has failed on some already: the first that is up, untried ones before others."""
    up = [pool for pool in pools if pool.status.is_up]
    untried = [pool for pool in up if pool not in failed]
    return next(iter(untried or up), None)


class Router:
    """Sends batches to pools, retries what was lost, and keeps the pools' status by probing. Lives on one loop."""

    def __init__(self, pools: Sequence[Pool], loop: asyncio.AbstractEventLoop) -> None:
        self.pools = tuple(pools)
        self._loop = loop
        self._thread = threading.get_ident()
        self._changed = asyncio.Condition()
        self._wake = {pool.status.name: asyncio.Event() for pool in pools}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.desired = Desired()

    def start(self) -> None:
        """Begin to probe."""
        for pool in self.pools:
            self.spawn(self._probe_forever(pool))

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def spawn(self, work: Any) -> None:
        """Run a coroutine on the loop, from any thread."""
        if threading.get_ident() == self._thread:
            self._keep(work)
        else:
            self._loop.call_soon_threadsafe(self._keep, work)

    def of(self, names: Sequence[str]) -> tuple[Pool, ...]:
        """The pools of these names, in order of preference."""
        return tuple(pool for pool in self.pools if pool.status.name in names)

    def reason(self, key: str, pools: Sequence[Pool]) -> str:
        """Why a model is not everywhere in its pools; "" when it is."""
        replicas = [replica for pool in pools if pool.status.is_up for replica in pool.status.replicas]
        have = sum(key in replica.models for replica in replicas)
        if not replicas:
            return "no replica is up"
        return "" if have == len(replicas) else f"ready on {have} of {len(replicas)} replicas"

    def places(self, model: str) -> list[tuple[Pool, str]]:
        """The replicas, by id, of the first pool that is up and has the model, whichever version."""
        for pool in self.pools:
            found = [r.id for r in pool.status.replicas if any(key.split("/")[0] == model for key in r.models)]
            if pool.status.is_up and found:
                return [(pool, replica) for replica in found]
        return []

    async def control(self, change: Change) -> list[str]:
        """Have every replica apply a change of `desired`; returns why some could not.

        A replica that does not answer now is told when it does.
        """
        failures: list[str] = []
        for pool in self.pools:
            if not pool.status.replicas:
                continue
            try:
                answers = await pool.handle.broadcast("apply", self.desired.since(0)).results_async(
                    timeout_s=control.TIMEOUT_S, return_exceptions=True
                )
            except Exception as error:
                _log.warning("pool '%s' did not take a change: %s", pool.status.name, error)
                continue
            failures += [answer for answer in answers if isinstance(answer, str) and answer]
        for pool in self.pools:  # what is known of them has changed
            await self._probe(pool)
        return failures

    async def send_to(self, pool: Pool, replica: str, calls: Sequence[Call]) -> list[Answer]:
        """As `infer`, by one replica and no other. Raises Unavailable when it is lost."""
        message = wire.pack_calls(calls, now_ns())
        try:
            answer = await self._call(pool, message, replica)
            if isinstance(answer, str):
                pool.status.lost(replica)
                raise Unavailable("it is gone")
        except InferError:
            raise
        except asyncio.CancelledError:
            if pool.status.is_up:
                raise
            raise Unavailable("its pool went down") from None
        except Exception as error:
            pool.status.lost(replica)
            self._wake[pool.status.name].set()
            raise Unavailable(f"{type(error).__name__}") from None
        self._count(pool, self.pools, len(calls))
        return [_marked(one, pool) for one in wire.unpack_answers(answer)]

    async def stream(self, call: Call, pools: Sequence[Pool]) -> Answer:
        """Emit the answers of a decoupled call but the last, which is returned.

        A stream that is lost before its first answer begins anew elsewhere.
        """
        message = wire.pack_calls([call], now_ns())
        failed: list[Pool] = []
        deadline = self._loop.time() + NO_POOL_TIMEOUT_S
        while True:
            pool = choose(pools, failed) or await self._wait_for(pools)
            answered = False
            try:
                async with aclosing(self._stream(pool, message, call)) as answers:
                    async for one in answers:
                        if isinstance(one, str):
                            self._check_behind(pool, deadline)
                            await self._catch_up(pool)
                            break
                        answer, is_final = _marked(one[0], pool), one[1]
                        if is_final:
                            self._count(pool, pools, 1)
                            return answer
                        answered = True
                        if isinstance(answer, InferResponse) and call.emit is not None:
                            call.emit(answer)
            except InferError:
                raise
            except Exception as error:
                self._fail(pool)
                failed.append(pool)
                if answered or len(failed) >= MAX_SENDS:
                    what = f"the replica was lost while it answered: {type(error).__name__}"
                    raise Unavailable(f"model '{call.request.model_name}': {what}") from None

    async def _stream(
        self, pool: Pool, message: wire.BatchMessage, call: Call
    ) -> AsyncGenerator[str | tuple[Answer, bool], None]:
        """Answers, each with whether it is the last. Raises Cancelled when the caller has gone.

        However it ends before the last answer, the replica is told to stop.
        """
        source = pool.stream.remote(message, self.desired.generation)
        iterator = aiter(source)
        ahead: asyncio.Task[Any] | None = None
        has_ended = False
        try:
            while not has_ended:
                ahead = ahead or asyncio.ensure_future(anext(iterator, None))
                await asyncio.wait({ahead}, timeout=CANCEL_INTERVAL_S)
                if call.is_cancelled:
                    raise Cancelled(f"the request to model '{call.request.model_name}' was cancelled by its caller")
                if not ahead.done():
                    continue
                got, ahead = ahead.result(), None
                if got is None:
                    raise ConnectionError("the stream ended before its last answer")
                if isinstance(got, str):
                    has_ended = True
                    yield got
                else:
                    (answer,) = wire.unpack_answers(got[0])
                    has_ended = got[1]
                    yield answer, has_ended
        finally:
            if ahead is not None:
                ahead.cancel()
            if not has_ended:
                source.cancel()

    async def infer(self, calls: Sequence[Call], pools: Sequence[Pool], most_rows: int = 1) -> list[Answer]:
        """One answer per call, from one of `pools`; calls that may travel as one request of `most_rows` rows do.

        Raises Unavailable when no pool comes up in time, Internal when every send was lost.
        """
        groups = merging.groups(calls, most_rows)
        answers: dict[Call, Answer] = {}
        for group, answer in zip(groups, await self._infer(groups, pools), strict=True):
            own: Sequence[Answer] = [answer] * len(group)
            if isinstance(answer, InferResponse):
                own = merging.split(group, answer)
            elif len(group) > 1 and not isinstance(answer, Unavailable | DeadlineExceeded):
                own = await self.infer(group, pools)  # one of them may be to blame: the others are not to pay for it
            answers.update(zip(group, own, strict=True))
        return [answers[call] for call in calls]

    async def _infer(self, groups: Sequence[Sequence[Call]], pools: Sequence[Pool]) -> list[Answer]:
        message = wire.pack_calls([merging.merge(group) for group in groups], now_ns())
        count = sum(map(len, groups))
        failed: list[Pool] = []
        lost = ""
        while len(failed) < MAX_SENDS:
            pool = choose(pools, failed) or await self._wait_for(pools)
            try:
                answer = await self._call(pool, message)
                assert not isinstance(answer, str), "any replica may take it"
                answers = wire.unpack_answers(answer)
            except Unavailable:
                raise
            except asyncio.CancelledError:
                if pool.status.is_up:
                    raise
                lost = f"the {pool.status.name} pool went down"
            except Exception as error:
                lost = f"{type(error).__name__}: {error}"
                self._fail(pool)
            else:
                self._count(pool, pools, count)
                return [_marked(answer, pool) for answer in answers]
            _log.info("a batch of %d was lost in pool '%s', sending it again: %s", count, pool.status.name, lost)
            failed.append(pool)
        raise Internal(f"model '{message[0]}': {MAX_SENDS} replicas were lost while they held the request: {lost}")

    async def _catch_up(self, pool: Pool) -> None:
        """Tell the pool's replicas what they have missed, unless somebody does so already."""
        if pool.is_catching_up:
            await asyncio.sleep(PROBE_INTERVAL_S / 5)
            return
        pool.is_catching_up = True
        try:
            await pool.handle.broadcast("apply", self.desired.since(0)).results_async(
                timeout_s=control.TIMEOUT_S, return_exceptions=True
            )
        except Exception as error:
            _log.debug("pool '%s' could not be told of changes: %s", pool.status.name, error)
            await asyncio.sleep(PROBE_INTERVAL_S)
        finally:
            pool.is_catching_up = False

    async def _call(self, pool: Pool, message: wire.BatchMessage, to: str = "") -> wire.AnswerMessage | str:
        """A replica's answers, or GONE. One that is behind is told what it has missed, and asked again.

        Raises Unavailable when it does not catch up in time.
        """
        deadline = self._loop.time() + NO_POOL_TIMEOUT_S
        while (answer := await self._send(pool, message, to)) == wire.BEHIND:
            self._check_behind(pool, deadline)
            await self._catch_up(pool)
        return answer

    def _check_behind(self, pool: Pool, deadline: float) -> None:
        if self._loop.time() > deadline:
            raise Unavailable(f"the {pool.status.name} pool's replicas have not caught up in {NO_POOL_TIMEOUT_S:g} s")

    async def _send(self, pool: Pool, message: wire.BatchMessage, to: str) -> wire.AnswerMessage | str:
        task = asyncio.current_task()
        assert task is not None
        pool.in_flight.add(task)
        try:
            answer: wire.AnswerMessage | str = await pool.send.remote(message, self.desired.generation, to=to)
            return answer
        finally:
            pool.in_flight.discard(task)

    def _count(self, pool: Pool, pools: Sequence[Pool], requests: int) -> None:
        pool.status.requests += requests
        if pool is not pools[0]:
            pool.status.fallbacks += requests

    def _fail(self, pool: Pool) -> None:
        pool.status.failed()
        self._wake[pool.status.name].set()

    async def _wait_for(self, pools: Sequence[Pool]) -> Pool:
        try:
            async with asyncio.timeout(NO_POOL_TIMEOUT_S), self._changed:
                while (pool := choose(pools, ())) is None:
                    await self._changed.wait()
                return pool
        except TimeoutError:
            raise Unavailable(f"no replica is up, waited {NO_POOL_TIMEOUT_S:g} s") from None

    async def _probe_forever(self, pool: Pool) -> None:
        wake = self._wake[pool.status.name]
        while True:
            await self._probe(pool)
            if not pool.status.is_up and not pool.status.replicas:
                for task in list(pool.in_flight):  # nobody is left to answer them
                    task.cancel()
            async with self._changed:
                self._changed.notify_all()
            wake.clear()
            try:
                async with asyncio.timeout(PROBE_INTERVAL_S):
                    await wake.wait()
            except TimeoutError:
                continue

    async def _probe(self, pool: Pool) -> None:
        try:
            answers = await pool.handle.broadcast("describe").results_async(
                timeout_s=PROBE_TIMEOUT_S, return_exceptions=True
            )
        except Exception as error:
            _log.debug("pool '%s' did not answer a probe: %s", pool.status.name, error)
            pool.status.missed()
            return
        pool.status.saw(
            [
                ReplicaState(answer.name, frozenset(answer.models), answer.id, answer.generation)
                for answer in answers
                if isinstance(answer, Description)
            ]
        )
        if any(replica.generation < self.desired.generation for replica in pool.status.replicas):
            self._keep(self._catch_up(pool))

    def _keep(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _marked(answer: Answer, pool: Pool) -> Answer:
    """The answer, saying which pool it came from."""
    if isinstance(answer, InferResponse):
        answer.parameters[POOL_PARAMETER] = pool.status.name
    return answer


class PoolInstance:
    """One batch on its way to a replica: to the scheduler an instance like any other."""

    def __init__(
        self,
        name: str,
        router: Router,
        pools: Sequence[Pool],
        statistics: ModelStatistics,
        release: Callable[[Any], None],
        costs: Costs,
        most_rows: int,
    ) -> None:
        self._pools = pools
        self.costs = costs
        self._most_rows = most_rows
        self._name = name
        self._router = router
        self._statistics = statistics
        self._release = release

    def start(self, batch: list[Call]) -> None:
        self._router.spawn(self._execute(batch))

    def close(self) -> None:
        """Nothing of its own to close."""

    async def _execute(self, batch: list[Call]) -> None:
        start_ns = now_ns()
        try:
            answers: Sequence[Answer] = await self._router.infer(batch, self._pools, self._most_rows)
        except InferError as error:
            answers = [error] * len(batch)
        except asyncio.CancelledError:
            answers = [Unavailable(f"model '{self._name}': the gateway is stopping")] * len(batch)
        end_ns = now_ns()
        self.costs.record(batch[0].key, sum(call.rows for call in batch), end_ns - start_ns)
        for call, answer in zip(batch, answers, strict=True):
            call.answer = answer
        times = BatchTimes(start_ns, start_ns, end_ns, end_ns)
        self._statistics.record_batch(batch, times)
        trace(batch, times)
        try:
            settle(batch)
        finally:
            self._release(self)


def attach(
    scheduler: Scheduler, name: str, router: Router, pools: Sequence[Pool], statistics: ModelStatistics, most_rows: int
) -> None:
    """Let as many batches of a model be on their way at a time as its pools have slots."""
    costs = Costs()
    for _ in range(max(pool.slots for pool in pools)):
        scheduler.add(PoolInstance(name, router, pools, statistics, scheduler.release, costs, most_rows))
