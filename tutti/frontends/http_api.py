"""Every HTTP route but infer, as an ordinary ASGI app. Nothing here is on the hot path."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tutti.config import as_json
from tutti.engine import Engine
from tutti.errors import InferError, InvalidArgument, NotFound
from tutti.frontends import api
from tutti.frontends.http_status import status_of
from tutti.model import Model

Handler = Callable[[Request], Awaitable[Response]]


def json_response(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def make_app(engine: Engine) -> Starlette:
    """Health, metadata, configuration, statistics and the repository index."""
    routes = _Routes(engine)
    model, versioned = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
    return Starlette(
        routes=[
            Route("/-/healthz", routes.live),
            Route("/v2", routes.server),
            Route("/v2/health/live", routes.live),
            Route("/v2/health/ready", routes.ready),
            Route("/v2/models/stats", routes.all_statistics),
            Route("/v2/repository/index", routes.index, methods=["POST"]),
            Route("/v2/repository/models/{model}/load", routes.load, methods=["POST"]),
            Route("/v2/repository/models/{model}/unload", routes.unload, methods=["POST"]),
            *(
                Route(prefix + suffix, handler)
                for prefix in (model, versioned)
                for suffix, handler in (
                    ("", routes.metadata),
                    ("/ready", routes.model_ready),
                    ("/config", routes.config),
                    ("/stats", routes.statistics),
                )
            ),
        ],
        exception_handlers={InferError: _infer_error, HTTPException: _http_error},
    )


def metrics_app(render: Callable[[], tuple[bytes, str]]) -> Starlette:
    """`GET /metrics`; `render` gives the page and its content type."""

    async def metrics(_: Request) -> Response:
        page, content_type = render()
        return Response(page, headers={"content-type": content_type})

    return Starlette(routes=[Route("/metrics", metrics)], exception_handlers={HTTPException: _http_error})


async def _infer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, InferError)
    return json_response({"error": error.message}, status_of(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "no such route", 405: "method not allowed"}.get(error.status_code, error.detail)
    return json_response({"error": f"{what}: {request.method} {request.url.path}"}, error.status_code)


class _Routes:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def _model(self, request: Request) -> Model:
        return self._engine.model(request.path_params["model"], request.path_params.get("version", ""))

    async def live(self, _: Request) -> Response:
        return Response()

    async def ready(self, _: Request) -> Response:
        return Response(status_code=200 if self._engine.is_ready() else 400)

    async def server(self, _: Request) -> Response:
        return json_response(api.server_metadata())

    async def metadata(self, request: Request) -> Response:
        return json_response(api.model_metadata(self._engine, self._model(request)))

    async def model_ready(self, request: Request) -> Response:
        name, version = request.path_params["model"], request.path_params.get("version", "")
        if not api.is_model_ready(self._engine, name, version):
            raise InvalidArgument(f"model '{name}' is not ready")
        return Response()

    async def config(self, request: Request) -> Response:
        return json_response(as_json(self._model(request).config.proto))

    async def statistics(self, request: Request) -> Response:
        try:
            model = self._model(request)
        except NotFound as error:  # a 400 in Triton too
            raise InvalidArgument(error.message) from None
        return json_response({"model_stats": [api.model_statistics(model)]})

    async def all_statistics(self, _: Request) -> Response:
        return json_response({"model_stats": [api.model_statistics(model) for model in self._engine.models()]})

    async def index(self, request: Request) -> Response:
        only_ready = bool((await _json_object(request)).get("ready", False))
        return json_response(
            [
                {key: value for key in ("name", "version", "state", "reason") if (value := getattr(e, key))}
                for e in self._engine.index()
                if e.state == "READY" or not only_ready
            ]
        )

    async def load(self, request: Request) -> Response:
        name = request.path_params["model"]
        api.refuse_control_parameters(name, (await _json_object(request)).get("parameters") or {})
        await asyncio.to_thread(self._engine.load, name)
        return Response()

    async def unload(self, request: Request) -> Response:
        name = request.path_params["model"]
        api.refuse_control_parameters(name, (await _json_object(request)).get("parameters") or {})
        await asyncio.to_thread(self._engine.unload, name)
        return Response()


async def _json_object(request: Request) -> dict[str, Any]:
    """The request's body, {} for none. Raises InvalidArgument for anything but a JSON object."""
    body = await request.body()
    try:
        value = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"{request.url.path}: the request's JSON does not parse: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"{request.url.path}: expected a JSON object")
    return value
