"""Triton's generate routes: one answer as JSON, or each answer of a decoupled model as an event.

Their requests are awaited one by one, and answered where `Answers` brings what models say.
"""

import asyncio
from collections.abc import AsyncIterator

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tutti.core.errors import DeadlineExceeded, InferError, InvalidArgument, Unavailable
from tutti.core.types import Call, InferRequest, InferResponse, now_ns
from tutti.frontends.awaited_answers import Answers, Item
from tutti.frontends.deadlines import least_ns
from tutti.frontends.door import Door
from tutti.frontends.http import answer_headers, compression
from tutti.frontends.http.status import DIALECT
from tutti.frontends.v2 import generate
from tutti.frontends.v2.api import Api
from tutti.repository.model_config import ModelConfig

_LONG_BODY_BYTES = 256 * 1024
_ONE_ANSWER = (
    "generate expects model to produce exactly 1 response, use generate stream for model that generates various number "
    "of responses"
)


class GenerateRoutes:
    """The two handlers. Both raise the errors of requests that are refused."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._door = Door(DIALECT, api.engine, api.http, api.tracer)
        self._decoding = asyncio.Lock()

    async def generate(self, request: Request) -> Response:
        call, answers = await self._submit(request)
        responses: list[InferResponse] = []
        try:
            while True:
                item = await answers.get()
                if isinstance(item.answer, InferError):
                    raise item.answer
                if not item.answer.is_null:
                    responses.append(item.answer)
                if item.is_final:
                    break
        finally:
            answers.cancel()
            self._api.tracer.end(call)
        if len(responses) != 1:
            raise InvalidArgument(f"model '{call.request.model_name}': {_ONE_ANSWER}")
        headers = {"server-timing": timing(call)}
        return Response(generate.encode(responses[0], call.request.id), headers=headers, media_type="application/json")

    async def generate_stream(self, request: Request) -> Response:
        call, answers = await self._submit(request)
        # A refused request is answered with a plain error. What a model answers is an event, errors too; if its first
        # answer is an error, the response has that error's status.
        first = await answers.get()
        is_refused = call.key is None or isinstance(first.answer, Unavailable | DeadlineExceeded)
        if isinstance(first.answer, InferError) and is_refused:
            self._api.tracer.end(call)
            raise first.answer
        status = DIALECT.code_of(first.answer) if isinstance(first.answer, InferError) else 200
        # It is the first answer's time: headers go out before the others are there.
        headers = {"server-timing": timing(call)}
        return StreamingResponse(self._events(call, answers, first), status, headers, "text/event-stream")

    async def _events(self, call: Call, answers: Answers, item: Item) -> AsyncIterator[bytes]:
        """Every answer as an event; `item` is the first."""
        try:
            while True:
                if isinstance(item.answer, InferError):
                    yield b"data: %b\n\n" % orjson.dumps({"error": item.answer.message})
                elif not item.answer.is_null:
                    yield b"data: %b\n\n" % generate.encode(item.answer, call.request.id)
                if item.is_final:
                    return
                item = await answers.get()
        finally:
            answers.cancel()
            self._api.tracer.end(call)

    async def _decode(self, config: ModelConfig, version: str, body: bytes, encoding: str) -> InferRequest:
        """What may take long is decoded beside the loop, one after the other: so little is inflated at a time."""

        def decode() -> InferRequest:
            inflated = compression.decompress(body, encoding.lower(), self._api.limits.max_input_size)
            return generate.decode(config, version, inflated)

        if encoding.lower() not in ("", "identity"):
            async with self._decoding:
                return await asyncio.to_thread(decode)
        if len(body) < _LONG_BODY_BYTES:
            return generate.decode(config, version, body)
        async with self._decoding:
            return await asyncio.to_thread(generate.decode, config, version, body)

    async def _submit(self, request: Request) -> tuple[Call, Answers]:
        request.scope["began_ns"] = now_ns()
        name, version = model_of(request)
        config = self._door.model(name, version).config
        sent = await self._decode(config, version, await request.body(), request.headers.get("content-encoding", ""))
        answers = Answers()
        call = request.scope["call"] = answers.call(sent)
        self._door.begin(call, request.headers.raw, least_ns(request.headers.raw))
        exchange = request.scope.get("exchange")
        if exchange is not None:
            _, known_as = exchange.known_as(call.request.id)
            if call.trace is not None:
                call.trace.note("answer_id", known_as.decode())
        self._door.submit([call])
        return call, answers


def timing(call: Call) -> str:
    """The header's value of a call that has its first answer."""
    return answer_headers.timing(call.arrived_ns, call.times, now_ns()).decode()


def model_of(request: Request) -> tuple[str, str]:
    """The name and the version in a route's path, "" for what it has not."""
    return request.path_params.get("model", ""), str(request.path_params.get("version", ""))
