"""Backends around others: they see requests, and make answers, of another form. Knows neither form."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tutti.core.errors import InferError
from tutti.core.types import Call, InferRequest
from tutti.scheduling.interface import Answers, Backend, Executed

if TYPE_CHECKING:
    from tutti.backends.on_device import DeviceWork


def around(wrapper: "Wrapped", backend: Backend) -> Backend:
    """The wrapper, or one that has a device's engine see it where the backend's batches go through one."""
    return _WrappedOnDevice(wrapper, backend) if hasattr(backend, "pipeline") else wrapper


class Wrapped:
    """A backend around another, which sees requests, and makes answers, of another form."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.runs_inline = backend.runs_inline
        self.kind = backend.kind
        self.device = getattr(backend, "device", "cpu")
        self.joins = getattr(backend, "joins", True)
        self.hang_s = getattr(backend, "hang_s", None)

    def close(self) -> None:
        self._backend.close()

    def give_up(self) -> None:
        give_up = getattr(self._backend, "give_up", None)
        if give_up is not None:
            give_up()

    def execute(self, calls: Sequence[Call]) -> Executed:
        outside = [call.request for call in calls]
        requests, outwards = self.inwards(outside)
        for call, request in zip(calls, requests, strict=True):
            call.request = request
        try:
            executed = self._backend.execute(calls)
        finally:  # a batch that fails is executed again, in parts
            for call, request in zip(calls, outside, strict=True):
                call.request = request
        return (lambda: outwards(executed())) if callable(executed) else outwards(executed)

    def inwards(self, requests: Sequence[InferRequest]) -> tuple[list[InferRequest], Callable[[Answers], Answers]]:
        """The requests as the backend is to see them, and what makes its answers theirs."""
        raise NotImplementedError


class _WrappedOnDevice(Wrapped):
    """The same around a backend whose batches go through a device's engine."""

    def __init__(self, wrapper: Wrapped, backend: Any) -> None:
        super().__init__(backend)
        self.engine = backend.engine
        self.pipeline = backend.pipeline
        self._pipelined = backend
        self._wrapper = wrapper

    def inwards(self, requests: Sequence[InferRequest]) -> tuple[list[InferRequest], Callable[[Answers], Answers]]:
        return self._wrapper.inwards(requests)

    def batch(self, requests: Sequence[InferRequest]) -> "DeviceWork":
        inside, outwards = self.inwards(requests)
        return _WrappedWork(self._pipelined.batch(inside), outwards)

    def refusals(self, requests: Sequence[InferRequest]) -> Sequence[InferError | None]:
        refusals: Sequence[InferError | None] = self._pipelined.refusals(self.inwards(requests)[0])
        return refusals


class _WrappedWork:
    """A batch of a wrapped backend: only its answers are others."""

    def __init__(self, work: "DeviceWork", outwards: Callable[[Answers], Answers]) -> None:
        self.parts = work.parts
        self.launch = work.launch
        self.stays = work.stays
        self.failure = work.failure
        self._work = work
        self._outwards = outwards

    def answers(self, outputs: Sequence[Any]) -> Answers:
        return self._outwards(self._work.answers(outputs))
