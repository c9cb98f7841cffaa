"""Requests that a model would join anyway travel as one: a hop then costs per batch, not per request. Pure."""

from collections.abc import Sequence

from tutti.core import rows
from tutti.core.errors import DeadlineExceeded, Unavailable
from tutti.core.types import Answer, Call, InferRequest, InferResponse, Tensor
from tutti.repository.model_config import ModelConfig


def rows_at_most(config: ModelConfig) -> int:
    """How many rows of a model may travel as one request; 1 where each must stay one of its own."""
    return config.max_batch_size if config.may_merge else 1


def groups(calls: Sequence[Call], most_rows: int) -> list[list[Call]]:
    """Calls that may travel as one request of up to `most_rows` rows, in their order."""
    if most_rows <= 1 or len(calls) == 1:
        return [[call] for call in calls]
    grouped: list[list[Call]] = []
    # The group of each signature that has room, and its rows.
    begun: dict[object, tuple[list[Call], int]] = {}
    for call in calls:
        request = call.request
        if request.signature is None or request.parameters or rows.is_large([request]):
            grouped.append([call])
            continue
        group, size = begun.get(request.signature, ([], 0))
        if not group or size + call.rows > most_rows:
            group, size = [], 0
            grouped.append(group)
        group.append(call)
        begun[request.signature] = group, size + call.rows
    return grouped


def merge(group: Sequence[Call]) -> Call:
    """One call with the rows of all. Its deadline is the latest of theirs; none where one has none."""
    first = group[0]
    if len(group) == 1:
        return first
    inputs = {}
    for name, tensor in first.request.inputs.items():
        data = b"".join([call.request.inputs[name].raw() for call in group])
        shape = (sum([call.rows for call in group]), *tensor.shape[1:])
        inputs[name] = Tensor(name, tensor.datatype, shape, data)
    request = first.request
    merged = Call(InferRequest(request.model_name, inputs, request.model_version, "", request.outputs), first.sink)
    deadlines = [call.deadline_ns for call in group]
    merged.deadline_ns = max(deadlines) if all(deadlines) else 0
    return merged


def shares(
    groups: Sequence[Sequence[Call]], answers: Sequence[Answer]
) -> tuple[dict[Call, Answer], list[Sequence[Call]]]:
    """Each call's share of its group's answer, and the groups that failed: one of their calls may be to blame.

    The others are not to pay for it, so that each call of such a group is to be sent as it is. What had no room or no
    time is nobody's fault.
    """
    parts: dict[Call, Answer] = {}
    failed: list[Sequence[Call]] = []
    for group, answer in zip(groups, answers, strict=True):
        if isinstance(answer, InferResponse):
            parts.update(zip(group, split(group, answer), strict=True))
        elif len(group) > 1 and not isinstance(answer, Unavailable | DeadlineExceeded):
            failed.append(group)
        else:
            parts.update((call, answer) for call in group)
    return parts, failed


def split(group: Sequence[Call], answer: InferResponse) -> Sequence[Answer]:
    """Each call's share of the answer to all."""
    if len(group) == 1:
        return [answer]
    requests = [call.request for call in group]
    answers = rows.answers(answer.model_name, answer.model_version, requests, answer.outputs, is_alike=True)
    for share in answers:
        share.parameters = dict(answer.parameters)
    return answers
