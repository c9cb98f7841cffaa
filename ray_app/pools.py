"""Batches on their way to replicas: sent, and sent again when a replica is lost with them; and the replicas' probing.

A batch that was lost twice is taken apart: one of its requests may be what ends replicas. Each then goes alone, one at
a time in the whole gateway, so that only the culprit is lost a third time, and nothing with it. A replica whose device
has failed answers, but is lost all the same: what it says so of has been lost with it.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from tutti.core import wire
from tutti.core.errors import Cancelled, DeadlineExceeded, DeviceLost, InferError, Internal, Unavailable
from tutti.core.types import POOL_PARAMETER, Answer, Call, InferResponse, now_ns
from tutti.ray_app import control, merging
from tutti.ray_app.autoscaling import Steady, wanted
from tutti.ray_app.control import Change, Desired
from tutti.ray_app.members import Member, PoolStatus, another
from tutti.ray_app.replica import Description

_log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 0.25
PROBE_TIMEOUT_S = 1.0
# However many replicas there are, probing them takes no more than this.
MAX_PROBES_PER_S = 100
CANCEL_INTERVAL_S = 0.1
MAX_SENDS = 3
NO_REPLICA_TIMEOUT_S = 10.0
# Whoever has lost a batch may be given it again after this: it is not about to be found dead then.
AGAIN_S = 1.0


Watch = Callable[[str, Callable[[list[str], str], None]], None]
"""Has a callback called, on the router's loop, with the ids of a deployment's replicas, and that of one that died."""


class _Lost(Exception):
    """The replica is gone."""


class _Silent(_Lost):
    """The replica does not answer any more."""


@dataclass(slots=True)
class Pool:
    """A pool's status and the methods of its Serve handle. `slots` are batches of a model at a time, per replica."""

    status: PoolStatus
    send: Any
    stream: Any = None
    describe: Any = None
    apply: Any = None
    slots: int = 2
    # How long requests wait for a first replica; one that may have none has to be started for them.
    patience_s: float = 10.0
    may_be_empty: bool = False
    broadcast: Any = None
    # How many replicas its work needs, as its replicas are told.
    wanted: float = 0.0
    steady: Steady = field(default_factory=Steady)
    hops: list[Any] = field(default_factory=list)
    # The sends that wait for each replica, by its id.
    sends: dict[str, set[asyncio.Task[Any]]] = field(default_factory=dict)


class Router:
    """Knows the pools' replicas and sends to them. Lives on one loop."""

    def __init__(
        self,
        pools: Sequence[Pool],
        loop: asyncio.AbstractEventLoop,
        desired: Desired | None = None,
        name: str = "",
        control_timeout_s: float = control.TIMEOUT_S,
    ) -> None:
        """`desired` is what replicas should have applied; `name` is this gateway's, to them.

        They get `control_timeout_s` to apply a change.
        """
        self._control_timeout_s = control_timeout_s
        self.desired = desired or Desired()
        self._name = name
        self.pools = tuple(pools)
        self._by_name = {pool.status.name: pool for pool in pools}
        self._loop = loop
        self._thread = threading.get_ident()
        self._changed = asyncio.Condition()
        self._listeners: list[Callable[[], None]] = []
        self._wake: dict[str, asyncio.Event] = {}
        self._catching_up: set[str] = set()
        self._called: set[str] = set()
        self._suspects = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, watch: Watch) -> None:
        """Begin to follow the replicas, of which `watch` tells."""
        self.spawn(self.measure_forever())
        for pool in self.pools:
            watch(pool.status.name, lambda ids, dead, pool=pool: self._present(pool, ids, dead))  # type: ignore[misc]
            self.spawn(self._find(pool))

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def spawn(self, work: Any) -> None:
        """Run a coroutine on the loop, from any thread."""
        if threading.get_ident() == self._thread:
            self._keep(work)
        else:
            self._loop.call_soon_threadsafe(self._keep, work)

    def listen(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed`, on the loop, now and whenever replicas are others; returns what ends that. Thread-safe."""
        self._loop.call_soon_threadsafe(self._listeners.append, changed)
        self._loop.call_soon_threadsafe(changed)

        def end() -> None:
            self._loop.call_soon_threadsafe(self._forget, changed)

        return end

    def of(self, names: Sequence[str]) -> tuple[Pool, ...]:
        """The pools of these names, in order of preference."""
        return tuple(pool for pool in self.pools if pool.status.name in names)

    def has_model(self, key: str, pools: Sequence[Pool]) -> bool:
        """Whether requests are answered, be it by a replica that has to be started for them."""
        return any(pool.status.having(key) or (pool.may_be_empty and not pool.status.members) for pool in pools)

    def reason(self, key: str, pools: Sequence[Pool]) -> str:
        """Why a model is not everywhere in its pools; "" when it is."""
        members = [member for pool in pools for member in pool.status.up]
        have = sum(key in member.models for member in members)
        if not members:
            return "no replica is up"
        return "" if have == len(members) else f"ready on {have} of {len(members)} replicas"

    def places(self, model: str) -> list[tuple[Pool, Member]]:
        """The replicas of the first pool that has the model, whichever version."""
        for pool in self.pools:
            found = [m for m in pool.status.up if any(key.split("/")[0] == model for key in m.models)]
            if found:
                return [(pool, member) for member in found]
        return []

    async def control(self, change: Change) -> list[str]:
        """Have every replica apply a change of `desired`; returns why some could not.

        A replica that does not answer now is told when it does.
        """
        members = [(pool, member) for pool in self.pools for member in pool.status.up]
        answers = await asyncio.gather(*(self._apply(pool, member) for pool, member in members))
        for pool, member in members:  # what is known of them has changed
            await self._probe(pool, member)
        return [answer for answer in answers if answer]

    async def wait_for(self, generation: int, timeout_s: float) -> bool:
        """Until every replica that is up has applied a change; returns whether they have."""
        until = self._loop.time() + timeout_s
        while any(member.generation < generation for pool in self.pools for member in pool.status.up):
            if self._loop.time() > until:
                return False
            await asyncio.sleep(PROBE_INTERVAL_S / 2)
        return True

    async def send_to(self, pool: Pool, member: Member, calls: Sequence[Call]) -> list[Answer]:
        """As `infer`, by one replica and no other. Raises Unavailable when it is lost."""
        try:
            answers = await self._call(pool, member, calls)
        except _Lost as error:
            raise Unavailable(str(error)) from None
        for answer in answers:
            if isinstance(answer, DeviceLost):
                raise answer
        self._count(pool, self.pools, len(calls))
        return answers

    async def infer(
        self, calls: Sequence[Call], key: str, pools: Sequence[Pool], first: Member, most_rows: int = 1
    ) -> tuple[list[Answer], Member | None]:
        """One answer per call, and the replica that gave them all; `first` is asked first.

        Calls that may travel as one request, of up to `most_rows` rows, do. Raises Unavailable when no replica comes up
        in time.
        """
        groups = merging.groups(calls, most_rows)
        found, by = await self._infer([merging.merge(group) for group in groups], key, pools, first)
        answers: dict[Call, Answer] = {}
        for group, answer in zip(groups, found, strict=True):
            own: Sequence[Answer] = [answer] * len(group)
            if isinstance(answer, InferResponse):
                own = merging.split(group, answer)
            elif len(group) > 1 and not isinstance(answer, Unavailable | DeadlineExceeded):
                # One of them may be to blame: the others are not to pay for it.
                own, by = (await self._infer(group, key, pools, by or first))[0], None
            answers.update(zip(group, own, strict=True))
        ordered = [answers[call] for call in calls]
        if by is not None:
            self._count(self._by_name[by.pool], pools, len(calls))
        else:
            for name in [one.parameters[POOL_PARAMETER] for one in ordered if isinstance(one, InferResponse)]:
                self._count(self._by_name[str(name)], pools, 1)
        return ordered, by

    async def _infer(
        self, calls: Sequence[Call], key: str, pools: Sequence[Pool], first: Member
    ) -> tuple[list[Answer], Member | None]:
        """As `infer`, without merging. What one replica has answered is not asked of another."""
        answers: dict[Call, Answer] = {}
        left = list(calls)
        tried: list[Member] = []
        losses = 0
        member: Member | None = first
        while left and losses < MAX_SENDS - 1:
            if tried and all(map(_is_unwanted, left)):
                answers.update((call, _unwanted(call)) for call in left)
                break
            try:
                member = member or await self._another(key, pools, tried)
                found = await self._call(self._by_name[member.pool], member, left)
            except _Lost as error:
                assert member is not None
                _log.info("replica %s was lost with %d requests to '%s': %s", member.name, len(left), key, error)
                losses += 1
            except InferError as error:
                answers.update((call, error) for call in left)
                break
            else:
                lost = {call for call, answer in zip(left, found, strict=True) if isinstance(answer, DeviceLost)}
                if not answers and not lost:
                    return found, member
                answers.update((c, answer) for c, answer in zip(left, found, strict=True) if c not in lost)
                if lost:
                    _log.info("replica %s lost its device with %d requests to '%s'", member.name, len(lost), key)
                    losses += 1
                left = [call for call in left if call in lost]
            tried.append(member)
            member = None
        for call in calls:
            if call not in answers:
                answers[call] = await self._alone(call, key, pools, tried)
        return [answers[call] for call in calls], None

    async def _alone(self, call: Call, key: str, pools: Sequence[Pool], tried: Sequence[Member]) -> Answer:
        """The answer to a request that may be what ended two replicas."""
        if _is_unwanted(call):
            return _unwanted(call)
        async with self._suspects:
            try:
                while True:
                    member = await self._another(key, pools, tried)
                    try:
                        (answer,) = await self._call(self._by_name[member.pool], member, [call])
                        if isinstance(answer, DeviceLost):
                            raise _Lost(answer.message)
                        return answer
                    except _Silent:  # which may have reasons of its own, other than this request
                        if _is_unwanted(call):
                            return _unwanted(call)
                        tried = [*tried, member]
                        if len(tried) > 2 * MAX_SENDS:
                            raise
            except _Lost as error:
                what = f"{MAX_SENDS} replicas were lost while they held the request, at last {member.name}: {error}"
                return Internal(f"model '{call.request.model_name}': {what}")
            except InferError as error:
                return error

    async def stream(self, call: Call, key: str, pools: Sequence[Pool]) -> Answer:
        """Emit the answers of a decoupled call but the last, which is returned.

        A stream that is lost before its first answer begins anew elsewhere.
        """
        tried: list[Member] = []
        deadline = self._loop.time() + NO_REPLICA_TIMEOUT_S
        while True:
            member = await self._another(key, pools, tried)
            pool = self._by_name[member.pool]
            answered = False
            try:
                async with aclosing(self._stream(pool, member, call)) as answers:
                    async for one in answers:
                        if isinstance(one, str):
                            if one == wire.GONE:
                                raise ConnectionError("it is gone")
                            self._check_behind(member, deadline)
                            await self._catch_up(pool, member)
                            break
                        answer, is_final = _marked(one[0], pool), one[1]
                        if isinstance(answer, DeviceLost):
                            raise ConnectionError(answer.message)
                        if is_final:
                            self._count(pool, pools, 1)
                            return answer
                        answered = True
                        if isinstance(answer, InferResponse) and call.emit is not None:
                            call.emit(answer)
            except InferError:
                raise
            except Exception as error:
                self._lost(pool, member)
                tried.append(member)
                if answered or len(tried) >= MAX_SENDS:
                    what = f"the replica was lost while it answered: {type(error).__name__}"
                    raise Unavailable(f"model '{call.request.model_name}': {what}") from None

    async def _stream(self, pool: Pool, member: Member, call: Call) -> AsyncGenerator[str | tuple[Answer, bool], None]:
        """Answers, each with whether it is the last. Raises Cancelled when the caller has gone.

        However it ends before the last answer, the replica is told to stop.
        """
        message = wire.pack_calls([call], now_ns())
        source = pool.stream.remote(message, self.desired.generation, to=member.id)
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
                    if member.is_hung:
                        raise ConnectionError("it does not answer")
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

    async def _call(self, pool: Pool, member: Member, calls: Sequence[Call]) -> list[Answer]:
        """A replica's answers, DeviceLost among them. One that is behind is told what it has missed, and asked again.

        Raises _Lost when it is gone, Unavailable when it does not catch up in time.
        """
        deadline = self._loop.time() + NO_REPLICA_TIMEOUT_S
        while (answer := await self._send(pool, member, wire.pack_calls(calls, now_ns()))) == wire.BEHIND:
            self._check_behind(member, deadline)
            await self._catch_up(pool, member)
        if isinstance(answer, str):
            self._lost(pool, member)
            raise _Lost("it is gone")
        answers = [_marked(one, pool) for one in wire.unpack_answers(answer)]
        if any(isinstance(one, DeviceLost) for one in answers):
            self._lost(pool, member)
        return answers

    async def _send(self, pool: Pool, member: Member, message: wire.BatchMessage) -> wire.AnswerMessage | str:
        send = asyncio.ensure_future(_awaited(pool.send.remote(message, self.desired.generation, to=member.id)))
        waiting = pool.sends.setdefault(member.id, set())
        waiting.add(send)
        try:
            answer: wire.AnswerMessage | str = await send
            return answer
        except asyncio.CancelledError:
            if not send.cancelled() or (task := asyncio.current_task()) is None or task.cancelling():
                raise
            if member.is_hung:
                raise _Silent("it does not answer") from None
            self._lost(pool, member)
            raise _Lost("it died") from None
        except InferError:
            raise
        except Exception as error:
            self._lost(pool, member)
            raise _Lost(f"{type(error).__name__}: {error}") from None
        finally:
            send.cancel()
            waiting.discard(send)
            if not waiting:  # replicas come and go
                pool.sends.pop(member.id, None)

    def _check_behind(self, member: Member, deadline: float) -> None:
        if self._loop.time() > deadline:
            raise Unavailable(f"replica {member.name} has not caught up in {NO_REPLICA_TIMEOUT_S:g} s")

    async def _catch_up(self, pool: Pool, member: Member) -> None:
        """Tell a replica what it has missed, unless somebody does so already."""
        if member.id in self._catching_up:
            await asyncio.sleep(PROBE_INTERVAL_S / 5)
            return
        self._catching_up.add(member.id)
        try:
            await self._apply(pool, member)
        finally:
            self._catching_up.discard(member.id)

    async def _apply(self, pool: Pool, member: Member) -> str:
        """Have a replica do what it has not done yet; returns why it could not do some of that."""
        try:
            async with asyncio.timeout(self._control_timeout_s):
                answer: str = await pool.apply.remote(self.desired.since(0), to=member.id)
        except Exception as error:
            _log.warning("replica %s did not take a change: %s", member.name, error)
            await asyncio.sleep(PROBE_INTERVAL_S)
            return ""
        return answer

    def _count(self, pool: Pool, pools: Sequence[Pool], requests: int) -> None:
        pool.status.requests += requests
        if pool is not pools[0]:
            pool.status.fallbacks += requests

    async def _another(self, key: str, pools: Sequence[Pool], tried: Sequence[Member]) -> Member:
        """A replica for what was lost by those `tried`, who are asked again where they are up and no other is.

        One that has answered nothing for a while need not be dead: on a busy machine it may be the only one there is.
        """
        statuses = [pool.status for pool in pools]
        patience_s = max(pool.patience_s for pool in pools)
        start_s = self._loop.time()
        again_s, end_s = start_s + AGAIN_S, start_s + patience_s
        async with self._changed:
            while (now_s := self._loop.time()) < end_s:
                member = another(statuses, key, tried if now_s < again_s else ())
                if member is not None:
                    return member
                self.call_for(pools)
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(again_s if now_s < again_s < end_s else end_s):
                        await self._changed.wait()
        raise Unavailable(f"no replica is up, waited {patience_s:g} s")

    def call_for(self, pools: Sequence[Pool]) -> None:
        """Requests wait, and there is no replica: let Serve know, which then starts one."""
        for pool in pools:
            if not pool.status.members and pool.status.name not in self._called:
                self._called.add(pool.status.name)
                self._keep(self._call_for(pool))

    async def _call_for(self, pool: Pool) -> None:
        try:
            async with asyncio.timeout(pool.patience_s):
                await pool.describe.remote()
        except Exception as error:
            _log.debug("pool '%s' has not started a replica: %s", pool.status.name, error)
        finally:
            self._called.discard(pool.status.name)

    async def _find(self, pool: Pool) -> None:
        """Serve makes a handle's router when it is first used: use it until that tells of replicas."""
        while not pool.status.members:
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await pool.broadcast("describe").results_async()
            except Exception as error:
                _log.debug("pool '%s' does not answer yet: %s", pool.status.name, error)
            await asyncio.sleep(PROBE_INTERVAL_S)

    def _present(self, pool: Pool, ids: Sequence[str], dead: str) -> None:
        """Serve says which replicas there are. It would keep what was sent to a dead one for the next that comes."""
        if dead:
            self._give_up(pool, dead)
        for member in pool.status.present(ids):
            self._keep(self._follow(pool, member))
        self._tell(pool)

    async def _follow(self, pool: Pool, member: Member) -> None:
        """Probe a replica for as long as there is one of its id."""
        wake = self._wake[member.id] = asyncio.Event()
        try:
            while pool.status.members.get(member.id) is member:
                await self._probe(pool, member)
                wake.clear()
                interval_s = max(PROBE_INTERVAL_S, sum(len(p.status.members) for p in self.pools) / MAX_PROBES_PER_S)
                try:
                    async with asyncio.timeout(interval_s):
                        await wake.wait()
                except TimeoutError:
                    continue
        finally:
            self._wake.pop(member.id, None)

    async def _probe(self, pool: Pool, member: Member) -> None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                answer: Description = await pool.describe.remote(to=member.id, wanted=pool.wanted, by=self._name)
        except TimeoutError:
            if member.missed():
                _log.warning("replica %s does not answer", member.name)
                self._tell(pool)
            if member.is_hung:  # and so would be for ever what waits for it
                self._give_up(pool, member.id)
            return
        except Exception as error:
            _log.debug("replica %s did not answer a probe: %s", member.name, error)
            self._lost(pool, member)
            return
        if answer.id != member.id:  # there is none of that id any more
            self._lost(pool, member)
            return
        if member.saw(answer.name, answer.models, answer.generation):
            self._tell(pool)
        if member.generation < self.desired.generation:
            self._keep(self._catch_up(pool, member))

    def _lost(self, pool: Pool, member: Member) -> None:
        """What was sent to it fails by itself."""
        if member.lost():
            self._tell(pool)
            if member.id in self._wake:
                self._wake[member.id].set()

    def _give_up(self, pool: Pool, replica: str) -> None:
        for send in list(pool.sends.get(replica, ())):
            send.cancel()

    def _tell(self, pool: Pool) -> None:
        pool.status.tell()
        for changed in list(self._listeners):
            changed()
        self._keep(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def measure_forever(self) -> None:
        """How many replicas each pool's work needs; probes tell them, and they tell Serve.

        A pool that has none is called for, though a lower one may answer meanwhile.
        """
        while True:
            for pool in self.pools:
                pool.wanted = pool.steady.follow(now_ns(), wanted([hop.demand() for hop in pool.hops]))
                if pool.wanted and pool.may_be_empty:
                    self.call_for([pool])
            await asyncio.sleep(PROBE_INTERVAL_S)

    def _forget(self, changed: Callable[[], None]) -> None:
        if changed in self._listeners:
            self._listeners.remove(changed)

    def _keep(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_unwanted(call: Call) -> bool:
    return call.is_cancelled or bool(call.deadline_ns and call.deadline_ns <= now_ns())


def _unwanted(call: Call) -> InferError:
    """Nobody waits for what was lost with its replica: it is not sent again."""
    name = call.request.model_name
    if call.is_cancelled:
        return Cancelled(f"the request to model '{name}' was cancelled by its caller")
    return DeadlineExceeded(f"model '{name}': the replica was lost, and no time is left for another")


async def _awaited(response: Any) -> Any:
    return await response


def _marked(answer: Answer, pool: Pool) -> Answer:
    """The answer, saying which pool it came from."""
    if isinstance(answer, InferResponse):
        answer.parameters[POOL_PARAMETER] = pool.status.name
    return answer
