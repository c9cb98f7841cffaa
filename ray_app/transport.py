"""One batch, or one stream, to one replica and back; a replica that cannot answer is lost, and whoever sent hears it.

Owns the messages and the sends that are under way. Knows nothing of other replicas, nor of sending again.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from tutti.core import wire
from tutti.core.errors import Cancelled, DeviceLost, InferError, Unavailable
from tutti.core.types import POOL_PARAMETER, Answer, Call, InferResponse, now_ns
from tutti.ray_app.members import Member, ReplicaLost, ReplicaSilent
from tutti.ray_app.membership import Membership
from tutti.ray_app.pools import Pool
from tutti.ray_app.rollout import Rollout

# How often a stream looks whether its caller has gone.
CANCEL_INTERVAL_S = 0.1
# A replica that has missed changes gets this long to catch up before a message is given up.
CATCH_UP_TIMEOUT_S = 10.0


class Transport:
    """Lives on one loop."""

    def __init__(self, membership: Membership, rollout: Rollout, loop: asyncio.AbstractEventLoop) -> None:
        self._membership = membership
        self._rollout = rollout
        self._loop = loop

    async def send(self, member: Member, calls: Sequence[Call]) -> list[Answer]:
        """A replica's answers to a batch, in order. One that is behind is told what it has missed, and asked again.

        Raises ReplicaLost, with what it has answered, when it or its device is gone; Unavailable when it does not catch
        up in time.
        """
        pool = self._membership.pool(member.pool)
        until_s = self._loop.time() + CATCH_UP_TIMEOUT_S
        while (reply := await self._ask(pool, member, wire.pack_calls(calls, now_ns()))) == wire.BEHIND:
            await self._catch_up(pool, member, until_s)
        if isinstance(reply, str):
            raise self._lost(pool, member, "it is gone")
        answers = [_marked(answer, pool) for answer in wire.unpack_answers(reply)]
        for answer in answers:
            if isinstance(answer, DeviceLost):
                raise self._lost(pool, member, answer.message, answers)
        return answers

    async def _ask(self, pool: Pool, member: Member, message: wire.BatchMessage) -> wire.AnswerMessage | str:
        """What a replica replies. The send is a task of its own, which `Pool.give_up` ends when the replica dies."""
        send = asyncio.ensure_future(
            _awaited(pool.send.remote(message, self._rollout.desired.generation, to=member.id))
        )
        waiting = pool.sends.setdefault(member.id, set())
        waiting.add(send)
        try:
            reply: wire.AnswerMessage | str = await send
            return reply
        except asyncio.CancelledError:
            if not send.cancelled() or (task := asyncio.current_task()) is None or task.cancelling():
                raise
            if member.is_hung:
                raise ReplicaSilent("it does not answer") from None
            raise self._lost(pool, member, "it died") from None
        except InferError:
            raise
        except Exception as error:
            raise self._lost(pool, member, f"{type(error).__name__}: {error}") from None
        finally:
            send.cancel()
            waiting.discard(send)
            if not waiting:  # ids of replicas that have ended must not pile up
                pool.sends.pop(member.id, None)

    async def stream(self, member: Member, call: Call, emit: Callable[[Answer], None]) -> Answer:
        """Hand on a replica's answers to a decoupled call as they come, but the last, which is returned.

        Raises ReplicaLost when the replica or its device is gone, Cancelled when the caller is, Unavailable when the
        replica does not catch up in time. However it ends before the last answer, the replica is told to stop.
        """
        pool = self._membership.pool(member.pool)
        until_s = self._loop.time() + CATCH_UP_TIMEOUT_S
        while (answer := await self._stream(pool, member, call, emit)) is None:
            await self._catch_up(pool, member, until_s)
        return answer

    async def _stream(self, pool: Pool, member: Member, call: Call, emit: Callable[[Answer], None]) -> Answer | None:
        """As `stream`; None from a replica that is behind."""
        replies = _Replies(pool.stream, self._rollout.desired.generation, member, call)
        try:
            while True:
                try:
                    reply = await replies.next()
                except InferError:
                    raise
                except Exception as error:
                    raise self._lost(pool, member, f"{type(error).__name__}: {error}") from None
                if isinstance(reply, str):
                    if reply == wire.BEHIND:
                        return None
                    raise self._lost(pool, member, "it is gone")
                answer, is_last = reply
                if isinstance(answer, DeviceLost):
                    raise self._lost(pool, member, answer.message)
                answer = _marked(answer, pool)
                if is_last:
                    return answer
                emit(answer)
        finally:
            replies.close()

    async def _catch_up(self, pool: Pool, member: Member, until_s: float) -> None:
        if self._loop.time() > until_s:
            raise Unavailable(f"replica {member.name} has not caught up in {CATCH_UP_TIMEOUT_S:g} s")
        await self._rollout.catch_up(pool, member)

    def _lost(self, pool: Pool, member: Member, reason: str, answers: Sequence[Answer] = ()) -> ReplicaLost:
        self._membership.lost(pool, member)
        return ReplicaLost(reason, answers)


class _Replies:
    """What a replica replies to one stream, message by message."""

    def __init__(self, stream: Any, generation: int, member: Member, call: Call) -> None:
        self._member = member
        self._call = call
        self._stream = stream
        self._generation = generation
        self._source: Any = None
        self._next: asyncio.Task[Any] | None = None
        self._has_ended = False

    async def next(self) -> str | tuple[Answer, bool]:
        """An answer and whether it is the last, or why the stream was not taken.

        Raises Cancelled when the caller has gone, and whatever is wrong with the replica.
        """
        if self._source is None:
            message = wire.pack_calls([self._call], now_ns())
            self._source = self._stream.remote(message, self._generation, to=self._member.id)
            self._iterator = aiter(self._source)
        reply = await self._reply()
        if reply is None:
            raise ConnectionError("the stream ended before its last answer")
        if isinstance(reply, str):
            self._has_ended = True
            return reply
        (answer,) = wire.unpack_answers(reply[0])
        self._has_ended = reply[1]
        return answer, self._has_ended

    async def _reply(self) -> Any:
        """The next one, None at the end. Looks now and then whether caller and replica are still there."""
        self._next = asyncio.ensure_future(anext(self._iterator, None))
        while True:
            await asyncio.wait({self._next}, timeout=CANCEL_INTERVAL_S)
            if self._call.is_cancelled:
                model = self._call.request.model_name
                raise Cancelled(f"the request to model '{model}' was cancelled by its caller")
            if self._next.done():
                reply, self._next = self._next.result(), None
                return reply
            if self._member.is_hung:
                raise ConnectionError("it does not answer")

    def close(self) -> None:
        """Have the replica stop, unless it has ended."""
        if self._next is not None:
            self._next.cancel()
        if not self._has_ended and self._source is not None:
            self._source.cancel()


async def _awaited(response: Any) -> Any:
    return await response


def _marked(answer: Answer, pool: Pool) -> Answer:
    """The answer, saying which pool it came from."""
    if isinstance(answer, InferResponse):
        answer.parameters[POOL_PARAMETER] = pool.status.name
    return answer
