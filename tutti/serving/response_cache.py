"""The response cache: answers of earlier requests with the same inputs, least recently used ones leaving first.

Holds the responses of one process, within a size in bytes; `Cached` puts it in front of a model's Infer.
"""

import hashlib
import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from tutti.core.types import Call, Infer, InferRequest, InferResponse, Sink, Spent, Tensor, now_ns, settle
from tutti.observing.explanations import PARAMETER
from tutti.observing.statistics import ModelStatistics

_log = logging.getLogger(__name__)

_ENTRY_OVERHEAD = 512
# What of a request's parameters is for queues and servers, and decides no answer.
_OF_QUEUES = ("priority", "timeout", PARAMETER)
_HIT = Spent(is_cached=True)
_loads = itertools.count()


def key_of(request: InferRequest, load: object) -> bytes:
    """A digest of all that decides the answer: inputs, parameters, among them forwarded headers, outputs asked for.

    `load` tells the model, as it was loaded, from all others.
    """
    heeded = sorted((key, value) for key, value in request.parameters.items() if key not in _OF_QUEUES)
    digest = hashlib.blake2b(digest_size=20)
    digest.update(repr((request.model_name, load, request.outputs, heeded)).encode("utf-8", "surrogatepass"))
    for name in sorted(request.inputs):
        tensor = request.inputs[name]
        raw = tensor.raw()
        digest.update(repr((name, tensor.datatype, tensor.shape, len(raw))).encode("utf-8", "surrogatepass"))
        digest.update(raw)
    return digest.digest()


class ResponseCache:
    """Responses by key, `size` bytes of them at most. Thread-safe."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, tuple[InferResponse, int]] = OrderedDict()

    def get(self, key: bytes) -> InferResponse | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: bytes, response: InferResponse) -> None:
        """Keep a copy, unless it is larger than the whole cache."""
        outputs = [Tensor(t.name, t.datatype, t.shape, bytes(t.raw())) for t in response.outputs]
        size = _ENTRY_OVERHEAD + sum(len(tensor.raw()) for tensor in outputs)
        if size > self._size:
            return
        # Where one request's time went is its caller's own, as a replica tells it in its answer.
        parameters = {name: value for name, value in response.parameters.items() if name != PARAMETER}
        copy = InferResponse(response.model_name, response.model_version, outputs, parameters)
        with self._lock:
            old = self._entries.pop(key, None)
            if old is not None:
                self._used -= old[1]
            while self._entries and self._used + size > self._size:
                _, (_, freed) = self._entries.popitem(last=False)
                self._used -= freed
            self._entries[key] = (copy, size)
            self._used += size

    @property
    def used(self) -> int:
        return self._used

    def __len__(self) -> int:
        return len(self._entries)


class Cached:
    """An `Infer` that asks the cache first. Errors are not kept.

    It knows the answers of one load of a model only: what was loaded before under its name and version was another one.
    """

    def __init__(
        self, infer: Infer, cache: ResponseCache, statistics: ModelStatistics, changes: Callable[[], int] = lambda: 0
    ) -> None:
        """`changes` counts the loads of all that the model may ask: its answers may differ after each."""
        self._infer = infer
        self._cache = cache
        self._load = next(_loads)
        self._changes = changes
        self._statistics = statistics

    def __call__(self, calls: Sequence[Call]) -> None:
        hits: list[Call] = []
        misses: list[Call] = []
        started_ns = now_ns()
        load = (self._load, self._changes())
        for call in calls:
            key = key_of(call.request, load)
            answer = self._cache.get(key)
            if answer is None:
                call.sink = _Keep(self, call.sink, key)
                misses.append(call)
            else:
                outputs = [Tensor(t.name, t.datatype, t.shape, t.data) for t in answer.outputs]
                parameters = dict(answer.parameters)
                call.answer = InferResponse(answer.model_name, answer.model_version, outputs, parameters)
                call.times = _HIT
                hits.append(call)
            if call.trace is not None:
                call.trace.note("cache", "miss" if answer is None else "hit")
        self._statistics.record_cache(hits, misses, started_ns, now_ns())
        if misses:
            self._infer(misses)
        if hits:
            settle(hits)

    def keep(self, key: bytes, call: Call) -> None:
        if not isinstance(call.answer, InferResponse):
            return
        try:
            self._cache.put(key, call.answer)
        except Exception:  # an output that cannot be read: who waits for the answer is to know
            _log.exception("an answer of model '%s' could not be kept", call.answer.model_name)


class _Keep:
    """The sink of one call whose answer is to be kept."""

    __slots__ = ("_cached", "_key", "_sink")

    def __init__(self, cached: Cached, sink: Sink, key: bytes) -> None:
        self._cached = cached
        self._sink = sink
        self._key = key

    def settle(self, calls: Sequence[Call]) -> None:
        (call,) = calls
        call.sink = self._sink
        self._cached.keep(self._key, call)
        settle(calls)
