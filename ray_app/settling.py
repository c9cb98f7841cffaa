"""The end of every batch that was sent to a replica: each call gets an answer, is counted, traced and settled.

Hops, streams and sequences share `settle_batch`, so that all of them catch the same failures. Knows nothing of how a
batch travels, nor of which replica gets it.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence

from tutti.core.errors import InferError, Internal, Unavailable
from tutti.core.types import Answer, Call, InferResponse, now_ns, settle
from tutti.observing.statistics import BatchTimes, ModelStatistics
from tutti.ray_app.members import Member
from tutti.scheduling.delivery import as_infer_error, trace

_log = logging.getLogger(__name__)

Delivery = tuple[Sequence[Answer], Member | None]
"""One answer per call, and the replica that gave all of them; None where it was not one replica, or is not known."""

STEPS_PARAMETER = "tutti_steps"
"""Of a slow answer of an ensemble: a replica's `Spent.steps` in JSON. Callers get none of it."""

Finished = Callable[[Member | None, int], None]
"""(the replica that gave all answers, when they came in ns): what the sender does before callers hear of them."""


async def settle_batch(
    model: str,
    batch: Sequence[Call],
    start_ns: int,
    statistics: ModelStatistics,
    delivery: Awaitable[Delivery],
    finished: Finished,
    has_steps: bool = False,
) -> None:
    """Give each call of a batch its answer, once `delivery` has it, and settle all. Raises nothing.

    A delivery that fails or is cancelled is the answer to every call, and `finished` hears of no replica then. Answers
    of what `has_steps` may tell of them.
    """
    replica = await _answer(model, batch, delivery)
    end_ns = now_ns()
    try:
        finished(replica, end_ns)
        times = BatchTimes(start_ns, start_ns, end_ns, end_ns, replica="" if replica is None else replica.name)
        statistics.record_batch(batch, times)
        if has_steps:
            _note_steps(batch)
        if any(call.trace is not None for call in batch):
            trace(batch, times, **({} if replica is None else {"pool": replica.pool, "replica": replica.name}))
    except Exception:  # callers must hear of their answers all the same
        _log.exception("model '%s': a batch could not be counted", model)
    try:
        settle(batch)
    except Exception:  # a broken sink must not hold up the next batch
        _log.exception("model '%s': answers could not be delivered", model)


def _note_steps(batch: Sequence[Call]) -> None:
    """What answers tell of steps belongs to the times of their calls, and is no answer to a caller."""
    for call in batch:
        if isinstance(call.answer, InferResponse) and STEPS_PARAMETER in call.answer.parameters:
            steps = json.loads(str(call.answer.parameters.pop(STEPS_PARAMETER)))
            if call.times is not None:
                spent = call.times.spent(call.arrived_ns)
                call.times = spent._replace(steps=tuple(tuple(step) for step in steps))


async def _answer(model: str, batch: Sequence[Call], delivery: Awaitable[Delivery]) -> Member | None:
    """Fill in the answers; returns the replica that gave them."""
    failure: InferError
    try:
        answers, replica = await delivery
        if len(answers) != len(batch):
            raise Internal(f"model '{model}': expected {len(batch)} answers from the replica, got {len(answers)}")
    except InferError as error:
        failure = error
    except asyncio.CancelledError:
        failure = Unavailable(f"model '{model}': the gateway is stopping")
    except Exception as error:
        _log.exception("model '%s': a batch could not be sent", model)
        failure = as_infer_error(f"model '{model}'", error)
    else:
        for call, answer in zip(batch, answers, strict=True):
            call.answer = answer
        return replica
    for call in batch:
        call.answer = failure
    return None
