"""What becomes of calls whose replica was lost: sent again together, then each alone, or not at all. Pure.

A batch that was lost twice is taken apart: one of its calls may be what ends replicas. Each then goes alone, so that
only the culprit is lost a third time, and nothing with it. Told of answers and losses; sends nothing itself.
"""

from collections.abc import Sequence

from tutti.core.errors import Cancelled, DeadlineExceeded, DeviceLost, InferError, Internal
from tutti.core.types import Answer, Call
from tutti.ray_app.members import Member, ReplicaLost, ReplicaSilent

# A call is to blame once this many replicas were lost while they held it.
MAX_SENDS = 3


class Attempts:
    """The calls of a batch, those of them that have no answer yet, and the replicas that were lost with them."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.unanswered = list(calls)
        self.tried: list[Member] = []
        self._calls = calls
        self.answers: dict[Call, Answer] = {}

    def go_together(self, now_ns: int) -> bool:
        """Whether another replica gets all that is left in one batch, because somebody still waits for some of it."""
        if not self.unanswered or len(self.tried) >= MAX_SENDS - 1:
            return False
        return any(unwanted(call, now_ns) is None for call in self.unanswered)

    def lost(self, member: Member, loss: ReplicaLost) -> None:
        """A replica was lost. What it has answered before its device failed is not asked of another."""
        self.tried.append(member)
        if loss.answers:
            pairs = zip(list(self.unanswered), loss.answers, strict=True)
            self._take([(call, answer) for call, answer in pairs if not isinstance(answer, DeviceLost)])

    def answered(self, answers: Sequence[Answer]) -> None:
        """A replica has answered all that was left."""
        self._take(list(zip(self.unanswered, answers, strict=True)))

    def failed(self, error: InferError) -> None:
        """What is left cannot be sent."""
        self._take([(call, error) for call in self.unanswered])

    def in_order(self) -> list[Answer]:
        """One answer per call, once each has one."""
        return [self.answers[call] for call in self._calls]

    def _take(self, pairs: Sequence[tuple[Call, Answer]]) -> None:
        self.answers.update(pairs)
        self.unanswered = [call for call in self.unanswered if call not in self.answers]


class Suspect:
    """One call that may be what ended the replicas tried, as it goes alone from replica to replica."""

    def __init__(self, call: Call, tried: Sequence[Member]) -> None:
        self.call = call
        self.tried = list(tried)

    def lost(self, member: Member, loss: ReplicaLost, now_ns: int) -> Answer | None:
        """The call's answer after one more loss; None where another replica is to be asked.

        A replica that is silent may have reasons of its own, other than this call: it is not held against it so soon.
        """
        is_silent = isinstance(loss, ReplicaSilent)
        if is_silent and (error := unwanted(self.call, now_ns)) is not None:
            return error
        self.tried.append(member)
        if is_silent and len(self.tried) <= 2 * MAX_SENDS:
            return None
        model = self.call.request.model_name
        losses = f"{len(self.tried)} replicas were lost while they held the request, at last {member.name}: {loss}"
        return Internal(f"model '{model}': {losses}")


def unwanted(call: Call, now_ns: int) -> InferError | None:
    """The answer to a call that nobody waits for any more, which is not sent again; None where somebody waits."""
    name = call.request.model_name
    if call.is_cancelled:
        return Cancelled(f"the request to model '{name}' was cancelled by its caller")
    if call.deadline_ns and call.deadline_ns <= now_ns:
        return DeadlineExceeded(f"model '{name}': the replica was lost, and no time is left for another")
    return None
