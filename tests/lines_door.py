"""A protocol of nobody's: JSON over TCP, a line each way. What the recipe for a door in CONTRIBUTING.md comes to.

-> {"id": 1, "model": "add_one", "inputs": {"x": [[1, 2, 3, 4]]}, "timeout_ms": 100, "headers": {"x-api-key": "..."}}
<- {"id": 1, "outputs": {"y": [[2, 3, 4, 5]]}} or {"id": 1, "code": 2, "error": "..."}
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from tutti.core import dtypes
from tutti.core.errors import DeadlineExceeded, InvalidArgument, NotFound, Unavailable
from tutti.core.types import Call, InferRequest, Tensor
from tutti.frontends.door import Dialect, Door

CODES = {InvalidArgument: 1, NotFound: 2, Unavailable: 3, DeadlineExceeded: 4}
REFUSALS = {"restricted": (5, "not for you"), "unauthenticated": (6, "a key is needed")}
DIALECT = Dialect("LINES", CODES, 99, REFUSALS)


class LinesConnection(asyncio.Protocol):
    """One client. The sink of its calls, whose tokens are the requests' ids."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._loop = asyncio.get_running_loop()
        self._rest = b""
        self.open: set[Call] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        for call in self.open:
            call.is_cancelled = True

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        calls = [call for call in map(self._begin, lines) if call is not None]
        self.open.update(calls)
        if calls:
            self._door.submit(calls)

    def _begin(self, line: bytes) -> Call | None:
        sent: dict[str, Any] = {}
        try:
            sent = json.loads(line)
            failure = self._door.refusal("inference", sent.get("headers"))
            if failure is None:
                call = Call(self._decode(sent), self, sent.get("id"))
                self._door.begin(call, sent.get("headers"), int(sent.get("timeout_ms", 0) * 1e6))
                return call
        except (ValueError, KeyError, TypeError) as error:
            failure = self._door.decode_failure(InvalidArgument(f"no request: {error!r}"), sent.get("model", ""))
        except Exception as error:
            failure = self._door.decode_failure(error, sent.get("model", ""))
        self._transport.write(_failed(sent.get("id"), *failure))
        return None

    def _decode(self, sent: dict[str, Any]) -> InferRequest:
        config = self._door.model(sent["model"]).config
        types = {spec.name: dtypes.NUMPY[spec.datatype] for spec in config.inputs}
        inputs = {name: Tensor.of(name, np.array(value, types[name])) for name, value in sent["inputs"].items()}
        return InferRequest(config.name, inputs)

    def settle(self, calls: Sequence[Call]) -> None:
        self._loop.call_soon_threadsafe(self._write, calls, b"".join(map(self._encode, calls)))

    def _encode(self, call: Call) -> bytes:
        try:
            outputs = {tensor.name: tensor.array().tolist() for tensor in self._door.response(call).outputs}
            return json.dumps({"id": call.token, "outputs": outputs}).encode() + b"\n"
        except Exception as error:
            return _failed(call.token, *self._door.encode_failure(error, call))

    def _write(self, calls: Sequence[Call], answers: bytes) -> None:
        self.open.difference_update(calls)
        self._transport.write(answers)


def _failed(number: object, code: int, message: str) -> bytes:
    return json.dumps({"id": number, "code": code, "error": message}).encode() + b"\n"
