"""The end of an executed batch: its calls get their answers, are counted and traced once, and are settled."""

import logging
from collections.abc import Sequence

from tutti.core.errors import InferError, Internal
from tutti.core.types import Call, InferResponse, settle
from tutti.observing.statistics import BatchTimes, ModelStatistics
from tutti.scheduling.interface import Answers

_log = logging.getLogger(__name__)


def deliver(
    name: str,
    batch: Sequence[Call],
    answers: Answers,
    times: BatchTimes,
    statistics: ModelStatistics,
    device: str = "",
) -> None:
    """Count an executed batch, and settle those of its calls that the backend has not settled itself."""
    answered: list[Call] = []
    is_traced = False
    for call, answer in zip(batch, answers, strict=True):
        if answer is not None:
            call.answer = answer if isinstance(answer, InferResponse) else as_infer_error(name, answer)
            answered.append(call)
        is_traced = is_traced or call.trace is not None
    statistics.record_batch(batch, times)
    if is_traced:
        trace(batch, times, instance=name, device=device)
    try:
        if answered:
            settle(answered)
    except Exception:  # a broken sink must not end the instance
        _log.exception("instance %s: could not deliver answers", name)


def trace(batch: Sequence[Call], times: BatchTimes, **where: str) -> None:
    """Tell the batch's traced calls when it was executed, and where."""
    rows = sum([call.rows for call in batch])
    requests = sum([call.requests for call in batch])
    for call in batch:
        if call.trace is not None:
            call.trace.note("batch_rows", rows)
            call.trace.note("batch_requests", requests)
            for fact, name in where.items():
                call.trace.note(fact, name)
            call.trace.record("QUEUE_START", call.arrived_ns)
            call.trace.record("COMPUTE_START", times.start_ns)
            call.trace.record("COMPUTE_INPUT_END", times.infer_start_ns)
            call.trace.record("COMPUTE_OUTPUT_START", times.infer_end_ns)
            call.trace.record("COMPUTE_END", times.end_ns)


def as_infer_error(name: str, error: Exception) -> InferError:
    """The error itself if it is an InferError, else an Internal one that names the instance."""
    if isinstance(error, InferError):
        return error
    return Internal(f"{name} failed: {type(error).__name__}: {error}")
