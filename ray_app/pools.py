"""Pools of replicas: which are up, which one takes the next batch, and batches on their way.

GPU before CPU: a batch goes to the first pool, in order of preference, that is up and that it has not failed on.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_app import wire
from tutti.errors import InferError, Internal, Unavailable
from tutti.scheduler import Scheduler
from tutti.statistics import BatchTimes, ModelStatistics
from tutti.types import Answer, Call, InferResponse, now_ns, settle

_log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 0.25
PROBE_TIMEOUT_S = 2.0
MAX_SENDS = 3
NO_POOL_TIMEOUT_S = 10.0
POOL_PARAMETER = "tutti_pool"


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """What a replica says of itself when probed. `models` are "name/version" of those ready."""

    replica: str
    models: frozenset[str]


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

    def has_model(self, key: str) -> bool:
        return self.is_up and any(key in replica.models for replica in self.replicas)

    def _set_up(self, is_up: bool) -> None:
        if is_up != self.is_up:
            _log.warning("pool '%s' is %s, %d replicas", self.name, "up" if is_up else "down", len(self.replicas))
            self.is_up = is_up


@dataclass(slots=True)
class Pool:
    """A pool's status and its Serve handle. `in_flight` are tasks that wait for a replica's answer."""

    status: PoolStatus
    handle: Any
    send: Any
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

    def has_model(self, key: str) -> bool:
        return any(pool.status.has_model(key) for pool in self.pools)

    async def infer(self, calls: Sequence[Call]) -> list[Answer]:
        """One answer per call. Raises Unavailable when no pool comes up in time, Internal when every send was lost."""
        message = wire.pack_requests([call.request for call in calls])
        failed: list[Pool] = []
        lost = ""
        while len(failed) < MAX_SENDS:
            pool = choose(self.pools, failed) or await self._wait_for_pool()
            try:
                answers = wire.unpack_answers(await self._call(pool, message))
            except asyncio.CancelledError:
                if pool.status.is_up:
                    raise
                lost = f"the {pool.status.name} pool went down"
            except Exception as error:
                lost = f"{type(error).__name__}: {error}"
                self._fail(pool)
            else:
                self._count(pool, calls)
                return [_marked(answer, pool) for answer in answers]
            _log.info("a batch of %d was lost in pool '%s', sending it again: %s", len(calls), pool.status.name, lost)
            failed.append(pool)
        raise Internal(f"model '{message[0]}': {MAX_SENDS} replicas were lost while they held the request: {lost}")

    async def _call(self, pool: Pool, message: wire.BatchMessage) -> wire.AnswerMessage:
        task = asyncio.current_task()
        assert task is not None
        pool.in_flight.add(task)
        try:
            answer: wire.AnswerMessage = await pool.send.remote(message)
            return answer
        finally:
            pool.in_flight.discard(task)

    def _count(self, pool: Pool, calls: Sequence[Call]) -> None:
        pool.status.requests += len(calls)
        if pool is not self.pools[0]:
            pool.status.fallbacks += len(calls)

    def _fail(self, pool: Pool) -> None:
        pool.status.failed()
        self._wake[pool.status.name].set()

    async def _wait_for_pool(self) -> Pool:
        try:
            async with asyncio.timeout(NO_POOL_TIMEOUT_S), self._changed:
                while (pool := choose(self.pools, ())) is None:
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
        pool.status.saw([ReplicaState(name, frozenset(models)) for name, models in map(_described, answers) if name])

    def _keep(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _described(answer: Any) -> tuple[str, Sequence[str]]:
    return ("", ()) if isinstance(answer, BaseException) else answer


def _marked(answer: Answer, pool: Pool) -> Answer:
    """The answer, saying which pool it came from."""
    if isinstance(answer, InferResponse):
        answer.parameters[POOL_PARAMETER] = pool.status.name
    return answer


class PoolInstance:
    """One batch on its way to a replica: to the scheduler an instance like any other."""

    def __init__(self, name: str, router: Router, statistics: ModelStatistics, release: Callable[[Any], None]) -> None:
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
            answers: Sequence[Answer] = await self._router.infer(batch)
        except InferError as error:
            answers = [error] * len(batch)
        except asyncio.CancelledError:
            answers = [Unavailable(f"model '{self._name}': the gateway is stopping")] * len(batch)
        end_ns = now_ns()
        for call, answer in zip(batch, answers, strict=True):
            call.answer = answer
        self._statistics.record_batch(batch, BatchTimes(start_ns, start_ns, end_ns, end_ns))
        try:
            settle(batch)
        finally:
            self._release(self)


def attach(scheduler: Scheduler, name: str, router: Router, statistics: ModelStatistics, slots: int) -> None:
    """Let `slots` batches of a model be on their way at a time."""
    for _ in range(slots):
        scheduler.add(PoolInstance(name, router, statistics, scheduler.release))
