"""Sends batches and streams to replicas, and again to others when a replica is lost with them.

Owns the order of sending: merged, then as they are, then suspects one at a time in the whole gateway. What becomes of
lost calls is decided in `retry`; how a message travels is `transport`'s.
"""

import asyncio
import logging
from collections.abc import Sequence

from tutti.core.errors import InferError, Unavailable
from tutti.core.types import POOL_PARAMETER, Answer, Call, InferResponse, now_ns
from tutti.ray_app import merging
from tutti.ray_app.members import Member, ReplicaLost
from tutti.ray_app.membership import Membership
from tutti.ray_app.pools import Pool
from tutti.ray_app.retry import MAX_SENDS, Attempts, Suspect, unwanted
from tutti.ray_app.transport import Transport

_log = logging.getLogger(__name__)


class Dispatcher:
    """Lives on one loop."""

    def __init__(self, membership: Membership, transport: Transport) -> None:
        self._membership = membership
        self._transport = transport
        self._one_suspect = asyncio.Lock()

    async def send_to(self, pool: Pool, member: Member, calls: Sequence[Call]) -> list[Answer]:
        """As `infer`, by one replica and no other. Raises Unavailable when it is lost."""
        try:
            answers = await self._transport.send(member, calls)
        except ReplicaLost as loss:
            raise Unavailable(str(loss)) from None
        pool.status.count(len(calls), is_fallback=pool is not self._membership.pools[0])
        return answers

    async def infer(
        self, calls: Sequence[Call], key: str, pools: Sequence[Pool], first: Member, most_rows: int = 1
    ) -> tuple[list[Answer], Member | None]:
        """One answer per call, and the replica that gave them all; `first` is asked first.

        Calls that may travel as one request, of up to `most_rows` rows, do. Where no replica comes up in time, the
        answers say so.
        """
        groups = merging.groups(calls, most_rows)
        answers, replica = await self._send([merging.merge(group) for group in groups], key, pools, first)
        if len(groups) < len(calls):
            shares, failed = merging.shares(groups, answers)
            for group in failed:
                parts, _ = await self._send(group, key, pools, replica or first)
                shares.update(zip(group, parts, strict=True))
                replica = None
            answers = [shares[call] for call in calls]
        if replica is not None:
            self._count(replica.pool, pools, len(calls))
        else:
            for answer in answers:
                if isinstance(answer, InferResponse):
                    self._count(str(answer.parameters[POOL_PARAMETER]), pools, 1)
        return answers, replica

    async def _send(
        self, calls: Sequence[Call], key: str, pools: Sequence[Pool], first: Member
    ) -> tuple[list[Answer], Member | None]:
        """As `infer`, without merging."""
        try:
            return await self._transport.send(first, calls), first
        except ReplicaLost as loss:
            attempts = Attempts(calls)
            self._lost(attempts, first, loss, key)
        except InferError as error:
            return [error] * len(calls), None
        return await self._send_again(attempts, key, pools), None

    async def _send_again(self, attempts: Attempts, key: str, pools: Sequence[Pool]) -> list[Answer]:
        """The answers to a batch whose replica was lost."""
        while attempts.go_together(now_ns()):
            try:
                member = await self._membership.another(key, pools, attempts.tried)
                attempts.answered(await self._transport.send(member, attempts.unanswered))
            except ReplicaLost as loss:
                self._lost(attempts, member, loss, key)
            except InferError as error:
                attempts.failed(error)
        for call in attempts.unanswered:
            attempts.answers[call] = await self._send_alone(Suspect(call, attempts.tried), key, pools)
        return attempts.in_order()

    async def _send_alone(self, suspect: Suspect, key: str, pools: Sequence[Pool]) -> Answer:
        """The answer to a call that may be what ended two replicas."""
        if (error := unwanted(suspect.call, now_ns())) is not None:
            return error
        async with self._one_suspect:
            while True:
                try:
                    member = await self._membership.another(key, pools, suspect.tried)
                    (answer,) = await self._transport.send(member, [suspect.call])
                    return answer
                except ReplicaLost as loss:
                    verdict = suspect.lost(member, loss, now_ns())
                except InferError as error:
                    verdict = error
                if verdict is not None:
                    return verdict

    async def stream(self, call: Call, key: str, pools: Sequence[Pool]) -> Answer:
        """Emit the answers of a decoupled call but the last, which is returned.

        A stream that is lost before its first answer begins anew elsewhere. Raises Unavailable when it is lost later,
        or too often, or when no replica comes up in time.
        """
        tried: list[Member] = []
        emitter = _Emitter(call)
        while True:
            member = await self._membership.another(key, pools, tried)
            try:
                answer = await self._transport.stream(member, call, emitter.emit)
            except ReplicaLost as loss:
                tried.append(member)
                if emitter.has_emitted or len(tried) >= MAX_SENDS:
                    problem = f"the replica was lost while it answered: {loss}"
                    raise Unavailable(f"model '{call.request.model_name}': {problem}") from None
            else:
                self._count(member.pool, pools, 1)
                return answer

    def _lost(self, attempts: Attempts, member: Member, loss: ReplicaLost, key: str) -> None:
        attempts.lost(member, loss)
        count = len(attempts.unanswered)
        _log.info("replica %s was lost with %d requests to '%s': %s", member.name, count, key, loss)

    def _count(self, name: str, pools: Sequence[Pool], requests: int) -> None:
        pool = self._membership.pool(name)
        pool.status.count(requests, is_fallback=pool is not pools[0])


class _Emitter:
    """Hands on the answers of a stream but the last."""

    def __init__(self, call: Call) -> None:
        self.has_emitted = False
        self._call = call

    def emit(self, answer: Answer) -> None:
        self.has_emitted = True
        if isinstance(answer, InferResponse) and self._call.emit is not None:
            self._call.emit(answer)
