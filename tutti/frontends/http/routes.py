"""Every HTTP route but infer, as an ordinary ASGI app. Nothing here is on the hot path."""

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tutti.core.daemon_threads import Pool
from tutti.core.errors import InferError, InvalidArgument
from tutti.core.types import now_ns
from tutti.frontends.gate import Category, Gate
from tutti.frontends.http import answer_headers
from tutti.frontends.http.generate_routes import GenerateRoutes, model_of, timing
from tutti.frontends.http.status import DIALECT
from tutti.frontends.v2 import json_values
from tutti.frontends.v2.api import Api

Handler = Callable[[Request], Awaitable[Response]]
Entry = tuple[Category, str, str, Handler]
"""A route: its API, as the gate knows it, its verb, its path, and who answers."""


def json_response(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def guarded(gate: Gate, category: Category | None, handler: Handler) -> Handler:
    """The handler behind the gate."""

    async def guard(request: Request) -> Response:
        refusal = DIALECT.refusal(gate, category, request.headers.raw)
        if refusal is not None:
            status, message = refusal
            return json_response({"error": message}, status)
        return await handler(request)

    return handler if gate.is_open else guard


def make_app(api: Api) -> Starlette:
    """Health, metadata, configuration, statistics, the repository, settings, shared memory and generate."""
    table = _table(_Routes(api), GenerateRoutes(api))
    app = Starlette(
        routes=_merged(table, api.http.gate),
        exception_handlers={InferError: _infer_error, HTTPException: _http_error},
    )
    app.router.redirect_slashes = False  # a path with a slash more is another path
    return app


def _table(routes: "_Routes", generate: GenerateRoutes) -> list[Entry]:
    table: list[Entry] = [
        ("health", "GET", "/-/healthz", routes.live),
        ("health", "GET", "/v2/health/live", routes.live),
        ("health", "GET", "/v2/health/ready", routes.ready),
        ("metadata", "GET", "/v2", routes.server),
        ("statistics", "GET", "/v2/models/stats", routes.all_statistics),
        ("model-repository", "POST", "/v2/repository/index", routes.index),
        ("model-repository", "POST", "/v2/repository/models/{model}/load", routes.load),
        ("model-repository", "POST", "/v2/repository/models/{model}/unload", routes.unload),
        ("trace", "GET", "/v2/trace/setting", routes.trace),
        ("trace", "POST", "/v2/trace/setting", routes.update_trace),
        ("trace", "GET", "/v2/models/{model}/trace/setting", routes.trace),
        ("trace", "POST", "/v2/models/{model}/trace/setting", routes.update_trace),
        ("logging", "GET", "/v2/logging", routes.logs),
        ("logging", "POST", "/v2/logging", routes.update_logs),
        *_shared_memory(routes),
    ]
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version:int}"):
        table += [
            ("metadata", "GET", prefix, routes.metadata),
            ("health", "GET", f"{prefix}/ready", routes.model_ready),
            ("model-config", "GET", f"{prefix}/config", routes.config),
            ("statistics", "GET", f"{prefix}/stats", routes.statistics),
            ("inference", "POST", f"{prefix}/generate", generate.generate),
            ("inference", "POST", f"{prefix}/generate_stream", generate.generate_stream),
        ]
    return table


def _shared_memory(routes: "_Routes") -> list[Entry]:
    shm, cuda = "/v2/systemsharedmemory", "/v2/cudasharedmemory"
    return [
        ("shared-memory", "GET", f"{shm}/status", routes.shared_status),
        ("shared-memory", "GET", f"{shm}/region/{{region}}/status", routes.shared_status),
        ("shared-memory", "POST", f"{shm}/region/{{region}}/register", routes.register_shared),
        ("shared-memory", "POST", f"{shm}/region/{{region}}/unregister", routes.unregister_shared),
        ("shared-memory", "POST", f"{shm}/unregister", routes.unregister_shared),
        ("shared-memory", "GET", f"{cuda}/status", routes.cuda_status),
        ("shared-memory", "GET", f"{cuda}/region/{{region}}/status", routes.cuda_status),
        ("shared-memory", "POST", f"{cuda}/region/{{region}}/register", routes.register_cuda),
        ("shared-memory", "POST", f"{cuda}/region/{{region}}/unregister", routes.unregister_cuda),
        ("shared-memory", "POST", f"{cuda}/unregister", routes.unregister_cuda),
    ]


def _merged(table: Sequence[Entry], gate: Gate) -> list[Route]:
    """One route per path, so that a wrong verb is told from a wrong path."""
    by_path: dict[str, dict[str, Handler]] = {}
    for category, method, path, handler in table:
        by_path.setdefault(path, {})[method] = guarded(gate, category, handler)

    def endpoint(handlers: dict[str, Handler]) -> Handler:
        async def choose(request: Request) -> Response:
            handler = handlers.get("GET" if request.method == "HEAD" else request.method)
            assert handler is not None, "the route admits its methods only"
            return await handler(request)

        return choose

    return [Route(path, endpoint(handlers), methods=list(handlers)) for path, handlers in by_path.items()]


def metrics_app(
    render: Callable[[], tuple[bytes, str]], gate: Gate, sample: Callable[[], None] | None = None
) -> Starlette:
    """`GET /metrics`; `render` gives the page and its content type. `sample` is called before it, in a thread."""

    sampling = Pool(1, "sample")  # one thread: a driver that hangs takes no more

    async def metrics(_: Request) -> Response:
        if sample is not None:
            await asyncio.get_running_loop().run_in_executor(sampling, sample)
        page, content_type = render()
        return Response(page, headers={"content-type": content_type})

    return Starlette(
        routes=[Route("/metrics", guarded(gate, None, metrics))], exception_handlers={HTTPException: _http_error}
    )


async def _infer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, InferError)
    response = json_response({"error": error.message}, DIALECT.code_of(error))
    if "began_ns" in request.scope:  # an inference
        call = request.scope.get("call")
        passed = answer_headers.total(now_ns() - request.scope["began_ns"]).decode()
        response.headers["server-timing"] = timing(call) if call is not None else passed
    return response


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = {404: "no such route", 405: "method not allowed"}.get(error.status_code, error.detail)
    return json_response({"error": f"{problem}: {request.method} {request.url.path}"}, error.status_code)


class _Routes:
    def __init__(self, api: Api) -> None:
        self._api = api

    async def live(self, _: Request) -> Response:
        return Response()

    async def ready(self, _: Request) -> Response:
        return Response(status_code=200 if self._api.engine.is_ready() else 400)

    async def server(self, _: Request) -> Response:
        return json_response(self._api.server_metadata())

    async def metadata(self, request: Request) -> Response:
        return json_response(self._api.model_metadata(*model_of(request)))

    async def model_ready(self, request: Request) -> Response:
        name, version = model_of(request)
        if not self._api.is_model_ready(name, version):
            raise InvalidArgument(f"model '{name}' is not ready")
        return Response()

    async def config(self, request: Request) -> Response:
        return json_response(self._api.model_config_json(*model_of(request)))

    async def statistics(self, request: Request) -> Response:
        return json_response(self._api.statistics(*model_of(request)))

    async def all_statistics(self, _: Request) -> Response:
        return json_response(self._api.statistics())

    async def index(self, request: Request) -> Response:
        only_ready = bool((await _json_object(request)).get("ready", False))
        entries = await self._api.in_thread(self._api.index, only_ready)  # in a thread: it reads every model's folder
        return json_response([{key: value for key, value in entry.items() if value} for entry in entries])

    async def load(self, request: Request) -> Response:
        await self._api.in_thread(self._api.load, model_of(request)[0], await _parameters(request))
        return Response()

    async def unload(self, request: Request) -> Response:
        await self._api.in_thread(self._api.unload, model_of(request)[0], await _parameters(request))
        return Response()

    async def trace(self, request: Request) -> Response:
        return json_response(self._api.trace_settings(model_of(request)[0]))

    async def update_trace(self, request: Request) -> Response:
        changes = await _json_object(request)
        return json_response(await self._api.in_thread(self._api.update_trace_settings, model_of(request)[0], changes))

    async def logs(self, _: Request) -> Response:
        return json_response(self._api.logs.settings())

    async def update_logs(self, request: Request) -> Response:
        changes = await _json_object(request)
        return json_response(await self._api.in_thread(self._api.logs.update, changes))

    async def shared_status(self, request: Request) -> Response:
        regions = self._api.shared_memory.status(request.path_params.get("region", ""))
        return json_response(
            [{"name": r.name, "key": r.key, "offset": r.offset, "byte_size": r.byte_size} for r in regions]
        )

    async def register_shared(self, request: Request) -> Response:
        sent = await _json_object(request)
        name = request.path_params["region"]
        key: Any = sent.get("key")
        if not isinstance(key, str):
            raise InvalidArgument(f"shared memory region '{name}': register needs a 'key'")
        offset, size = _whole(name, "offset", sent.get("offset", 0)), _whole(name, "byte_size", sent.get("byte_size"))
        self._api.shared_memory.register(name, key, offset, size)
        return Response()

    async def unregister_shared(self, request: Request) -> Response:
        await self._api.in_thread(self._api.shared_memory.unregister, request.path_params.get("region", ""))
        return Response()

    async def cuda_status(self, request: Request) -> Response:
        regions = self._api.shared_memory.cuda_status(request.path_params.get("region", ""))
        return json_response([{"name": r.name, "device_id": r.device_id, "byte_size": r.byte_size} for r in regions])

    async def register_cuda(self, request: Request) -> Response:
        sent = await _json_object(request)
        name = request.path_params["region"]
        handle = _handle(name, sent.get("raw_handle"))
        device, size = (
            _whole(name, "device_id", sent.get("device_id")),
            _whole(name, "byte_size", sent.get("byte_size")),
        )
        await self._api.in_thread(self._api.shared_memory.register_cuda, name, handle, device, size)
        return Response()

    async def unregister_cuda(self, request: Request) -> Response:
        await self._api.in_thread(self._api.shared_memory.unregister_cuda, request.path_params.get("region", ""))
        return Response()


async def _json_object(request: Request) -> dict[str, Any]:
    """The request's body, {} for none. Raises InvalidArgument for anything but a JSON object."""
    body = await request.body()
    try:
        value = json_values.parse_json(body or b"{}")
    except ValueError as error:
        raise InvalidArgument(f"{request.url.path}: the request's JSON does not parse: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"{request.url.path}: expected a JSON object")
    return value


def _whole(region: str, field: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgument(f"shared memory region '{region}': register needs '{field}' as a whole number")
    return value


def _handle(region: str, value: Any) -> bytes:
    """The bytes of `{"b64": TEXT}`."""
    text = value.get("b64") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise InvalidArgument(f"shared memory region '{region}': register needs 'raw_handle' as {{\"b64\": TEXT}}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument(
            f"shared memory region '{region}': 'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t"
        ) from None


async def _parameters(request: Request) -> dict[str, Any]:
    value = (await _json_object(request)).get("parameters") or {}
    if not isinstance(value, dict):
        raise InvalidArgument(f"{request.url.path}: 'parameters': expected an object")
    return value
