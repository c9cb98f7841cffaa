"""A replica: every model of the repository in one process, answering whole batches."""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tutti.app import restarts
from tutti.core import wire
from tutti.core.errors import ConfigError
from tutti.core.types import FALLBACK_PARAMETER, Call, Infer, InferResponse, now_ns
from tutti.devices.health import health
from tutti.observing.logs import Logs
from tutti.ray_app.autoscaling import METRIC, Wanted
from tutti.ray_app.control import Change
from tutti.ray_app.health import INFERENCE_TIMEOUT_S, Prober, Pulse
from tutti.ray_app.journal import RayStore
from tutti.ray_app.news import News, Writer
from tutti.ray_app.options import Options
from tutti.ray_app.overview import Loads
from tutti.ray_app.settling import STEPS_PARAMETER

_log = logging.getLogger(__name__)

# After a device has failed, batches inside get this long to be answered, and Ray this long to carry the last answer.
LEAVE_S = 2.0
CARRY_S = 0.2


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """What a replica loads at its start; `models` None is everything. `log_kinds` are info, warnings and errors."""

    model_repository: str
    models: tuple[str, ...] | None
    exits_on_error: bool
    log_verbose: int
    log_format: str
    log_kinds: tuple[bool, bool, bool]
    has_gpu: bool
    hang_timeout_s: float
    control_timeout_s: float
    log_slow_ms: float

    @classmethod
    def of(cls, options: Options, models: Sequence[str], has_gpu: bool) -> "ReplicaOptions":
        """As the application's options have it."""
        return cls(
            options.model_repository,
            tuple(models),
            options.exit_on_error,
            options.log_verbose,
            options.log_format,
            options.log_kinds,
            has_gpu,
            options.hang_timeout_secs,
            options.control_timeout_secs,
            options.log_slow_ms,
        )

    def logs(self) -> Logs:
        return Logs(self.log_verbose, log_format=self.log_format, kinds=self.log_kinds)


@dataclass(frozen=True, slots=True)
class Description:
    """What a replica says of itself: its id to Serve, a name for people, its ready "name/version"s, its generation."""

    id: str
    name: str
    models: tuple[str, ...]
    generation: int


class _Gather:
    """A sink that completes a future when the last of its calls is settled."""

    def __init__(self, count: int, loop: asyncio.AbstractEventLoop) -> None:
        self._left = count
        self._loop = loop
        self.done: asyncio.Future[None] = loop.create_future()

    def settle(self, calls: Sequence[Call]) -> None:
        self._loop.call_soon_threadsafe(self._settled, len(calls))

    def _settled(self, count: int) -> None:
        self._left -= count
        if not self._left and not self.done.done():
            self.done.set_result(None)


def _tell_steps(calls: Sequence[Call]) -> None:
    """Of slow requests to ensembles, for the gateway's log: where their time went here."""
    for call in calls:
        steps = call.times.spent(call.arrived_ns).steps if call.times is not None else ()
        if steps and isinstance(call.answer, InferResponse):
            call.answer.parameters[STEPS_PARAMETER] = json.dumps(steps)


class Replica:
    """The class of both pools' deployments. Raises ConfigError from its constructor if a model cannot be loaded."""

    async def __init__(self, options: ReplicaOptions, pool: str) -> None:  # type: ignore[misc]
        if not options.has_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # must be set before a backend looks for a GPU
        from ray import serve

        from tutti import ensembles
        from tutti.core import garbage
        from tutti.serving import local

        self._loop = asyncio.get_running_loop()
        self._id: str = serve.get_replica_context().replica_id.unique_id
        self._pool = pool
        self._name = f"{pool}-{os.getpid()}"
        self._segments: dict[str, Infer] = {}
        self._pulse = Pulse(at_s=time.monotonic())
        self._prober = Prober()
        self._leaving: asyncio.Task[None] | None = None
        self._hang_timeout_s = options.hang_timeout_s
        self._slow_ns = int(options.log_slow_ms * 1e6)
        self._generation = 0
        self._wanted = Wanted()
        self._applying = asyncio.Lock()
        self._logs = options.logs()
        self._logs.install()
        # The gateway decides what is loaded, and keeps the response cache: replicas need neither.
        self._engine = local.make_engine(
            Path(options.model_repository),
            local.loop_timer(self._loop),
            ensembles.load,
            True,
            cache_bytes=0,
            control_timeout_s=options.control_timeout_s,
            no_control_by_models="models cannot load or unload models on Ray: a client must ask the gateway",
            takes=(FALLBACK_PARAMETER,),
        )
        health.listen(self._failed)
        await self._load(options, News(RayStore(), serve.get_replica_context().app_name))
        garbage.settle()

    async def _load(self, options: ReplicaOptions, news: News) -> None:
        """Load all models. What does not end must not keep the others from being served, unless all must be."""
        patience_s = None if options.exits_on_error else options.control_timeout_s
        async with Writer(news, self._id, self._pool, self._engine.started):
            await asyncio.to_thread(self._engine.load_all, options.models, patience_s)
            if self._engine.failures() and options.exits_on_error:
                raise ConfigError("; ".join(self._engine.failures()))

    async def infer(self, message: wire.BatchMessage, generation: int, to: str = "") -> wire.AnswerMessage | str:
        """Answers to a batch, in order; a request's error is its answer, never an exception.

        A text instead says why it was not taken: this replica is not the one it is `to`, is about to end, or is behind
        `generation`.
        """
        refusal = self._refusal(generation, to)
        if refusal:
            return refusal
        gather, began_ns = _Gather(len(message[2]), self._loop), now_ns()
        calls = wire.unpack_calls(message, gather, began_ns)
        self._pulse.begins(message[0], time.monotonic())
        try:
            self._segments.get(message[0], self._engine)(calls)
            await gather.done
        finally:
            self._pulse.ends(message[0], time.monotonic())
        if 0 < self._slow_ns <= now_ns() - began_ns:
            _tell_steps(calls)
        return wire.pack_answers([call.answer for call in calls if call.answer is not None])

    async def stream(
        self, message: wire.BatchMessage, generation: int, to: str = ""
    ) -> AsyncIterator[tuple[wire.AnswerMessage, bool] | str]:
        """The answers to one request as they come, each with whether it is the last."""
        from tutti.frontends.awaited_answers import Answers

        refusal = self._refusal(generation, to)
        if refusal:
            yield refusal
            return
        answers = Answers()
        (sent,) = wire.unpack_calls(message, answers, now_ns())
        call = answers.call(sent.request)
        call.deadline_ns = sent.deadline_ns
        self._engine([call])
        try:
            while True:
                item = await answers.get()
                yield wire.pack_answers([item.answer]), item.is_final
                if item.is_final:
                    return
        finally:
            answers.cancel()

    def _refusal(self, generation: int, to: str) -> str:
        if (to and to != self._id) or health.failures():
            return wire.GONE
        return wire.BEHIND if generation > self._generation else ""

    async def apply(self, changes: Sequence[Change], to: str = "") -> str:
        """Do what of the changes has not been done yet; returns why some failed, "" if none has.

        One that failed is not tried again: this replica goes on with what it has. Who is not the replica it is `to`
        does them all the same: it will be asked to next.
        """
        failures = []
        async with self._applying:
            for change in changes:
                if change.generation <= self._generation:
                    continue
                try:
                    await asyncio.to_thread(self._apply, change)
                except Exception as error:
                    failures.append(f"replica {self._name}: {error}")
                self._generation = change.generation
        return "; ".join(failures)

    def _apply(self, change: Change) -> None:
        from tutti.ensembles.placed import executor_of_segment

        if change.logs is not None:
            self._logs.update(change.logs)
        elif not change.is_load(self._pool):
            if self._segments.pop(change.model, None) is None:
                self._engine.unload(change.model)
        elif change.segment is not None:
            self._segments[change.model] = executor_of_segment(change.segment, self._engine)
        elif change.override is not None:
            self._engine.load(change.model, change.override)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve: how many replicas the pool's work needs, as the gateways have told."""
        return {METRIC: self._wanted.total(time.monotonic())}

    async def describe(self, to: str = "", wanted: float = 0.0, by: str = "") -> Description:
        """Who answers may be another than it is `to`, where that one is gone.

        `wanted` are the replicas that the work of gateway `by` needs.
        """
        self._wanted.told(by, wanted, time.monotonic())
        if health.failures():  # it takes no more requests
            return Description(self._id, self._name, (), self._generation)
        ready = [f"{m.config.name}/{m.version}" for m in self._engine.models() if m.is_ready()]
        return Description(self._id, self._name, (*ready, *self._segments), self._generation)

    async def loads(self) -> Loads:
        """For people: what has been loaded here, and what could not be."""
        models = {f"{model.config.name}/{model.version}": model for model in self._engine.models()}
        return Loads(
            {key: model.instances for key, model in models.items()},
            {key: model.load_s for key, model in models.items()},
            tuple(self._engine.failures()),
        )

    async def check_health(self) -> None:
        """Asked by Serve: raises when models are not ready or do not execute any more; it is replaced then."""
        for device, reason in health.failures().items():
            raise RuntimeError(f"replica {self._name}: device {device} has failed: {reason}")
        stuck = self._pulse.stuck(time.monotonic(), self._hang_timeout_s)
        if stuck:
            symptom = f"no batch of model '{stuck}' has ended for {self._hang_timeout_s:g} s"
            raise RuntimeError(f"replica {self._name}: {symptom}")
        if self._pulse.is_idle(time.monotonic()):
            await self._infer_something()
        if any(not model.is_ready() for model in self._engine.models() if not model.config.is_ensemble):
            raise RuntimeError(f"replica {self._name}: models are not ready")

    async def _infer_something(self) -> None:
        """A real inference."""
        request = self._prober.request(model.config for model in self._engine.models() if model.is_ready())
        if request is None:
            return
        gather = _Gather(1, self._loop)
        call = Call(request, gather)
        self._pulse.begins(request.model_name, time.monotonic())
        try:
            self._engine([call])
            async with asyncio.timeout(INFERENCE_TIMEOUT_S):
                await gather.done
        except TimeoutError:
            symptom = f"model '{request.model_name}' does not answer"
            raise RuntimeError(f"replica {self._name}: {symptom}") from None
        finally:
            self._pulse.ends(request.model_name, time.monotonic())
        assert call.answer is not None
        symptom = self._prober.symptom(request, call.answer)
        if symptom:
            raise RuntimeError(f"replica {self._name}: {symptom}")

    def _failed(self, device: str, reason: str) -> None:
        self._loop.call_soon_threadsafe(self._leave_soon)

    def _leave_soon(self) -> None:
        self._leaving = self._leaving or asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        """Only the end of its process frees a failed device; Serve starts another replica.

        Serve would ask several times before it believes that this one is ill: it does not wait for that.
        """
        until = self._loop.time() + LEAVE_S
        while self._pulse.inside and self._loop.time() < until:
            await asyncio.sleep(0.01)
        await asyncio.sleep(CARRY_S)
        _log.error("replica %s ends, since a device has failed: %s", self._name, health.failures())
        logging.shutdown()
        os._exit(restarts.DEVICE_FAILED)
