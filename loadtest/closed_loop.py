"""Users as Locust has them, one request after another, over HTTP and gRPC to each model, with NVIDIA's tritonclient.

A server that stalls makes them wait, and is asked less: for what clients would see, use `tutti loadtest`.

locust -f loadtest/closed_loop.py --headless -u 8 -t 30s --html report.html [--model NAME ...]
"""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import grpc.experimental.gevent
from locust import User, events, task
from locust.env import Environment

# Blocking gRPC calls run in gevent's thread pool: its default of ten would queue the eleventh call in the client.
gevent.get_hub().threadpool_size = 256
grpc.experimental.gevent.init_gevent()

import tritonclient.grpc as grpcclient  # noqa: E402 - after gRPC has been told of gevent
import tritonclient.http as httpclient  # noqa: E402

from tutti.frontends import api_keys  # noqa: E402
from tutti.loadtest.payloads import Payloads, TensorInfo  # noqa: E402

_seeds = itertools.count(1)
# Kept to the end: a gRPC channel that the garbage collector closes blocks gevent's hub for good.
_clients: list[Any] = []


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    parser.add_argument("--http-url", default="127.0.0.1:8000", help="HTTP address of the server")
    parser.add_argument("--grpc-url", default="127.0.0.1:8001", help="gRPC address of the server")
    parser.add_argument("--api-key-file", type=Path, help="show the server the first key of this file (default: none)")
    parser.add_argument("--model", action="append", help="only this model (repeatable; default: all that are ready)")


class TritonUser(User):
    """Sends one request after another, to each model in turn. Subclasses name the protocol."""

    abstract = True
    library: Any
    protocol: str

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        options = environment.parsed_options
        self._client = self.library.InferenceServerClient(getattr(options, f"{self.protocol}_url"))
        _clients.append(self._client)
        self._headers = api_keys.headers(options.api_key_file)
        self._payloads = Payloads(seed=next(_seeds))
        names = options.model or self._ready_models()
        self._models = itertools.cycle([(name, self._inputs(name)) for name in sorted(names)])

    @task
    def infer(self) -> None:
        name, infos = next(self._models)
        tensors = []
        for info, array in zip(infos, self._payloads.draw(infos).values(), strict=True):
            tensor = self.library.InferInput(info.name, list(array.shape), info.datatype)
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        self._measure(name, lambda: self._client.infer(name, tensors, headers=self._headers))

    def _measure(self, name: str, send: Callable[[], Any]) -> None:
        started = time.perf_counter()
        error: Exception | None = None
        try:
            send()
        except Exception as failure:
            error = failure
        elapsed_ms = (time.perf_counter() - started) * 1000
        self.environment.events.request.fire(
            request_type=self.protocol, name=name, response_time=elapsed_ms, response_length=0, exception=error
        )

    def _ready_models(self) -> list[str]:
        raise NotImplementedError

    def _inputs(self, name: str) -> list[TensorInfo]:
        raise NotImplementedError


class HttpUser(TritonUser):
    """tritonclient.http: binary tensors."""

    library = httpclient
    protocol = "http"

    def _ready_models(self) -> list[str]:
        index = self._client.get_model_repository_index(headers=self._headers)
        return [model["name"] for model in index if model.get("state") == "READY"]

    def _inputs(self, name: str) -> list[TensorInfo]:
        told = self._client.get_model_metadata(name, headers=self._headers)
        return [TensorInfo.of(tensor) for tensor in told["inputs"]]


class GrpcUser(TritonUser):
    """tritonclient.grpc: unary calls."""

    library = grpcclient
    protocol = "grpc"

    def _ready_models(self) -> list[str]:
        index = self._client.get_model_repository_index(headers=self._headers, as_json=True)
        return [model["name"] for model in index["models"] if model.get("state") == "READY"]

    def _inputs(self, name: str) -> list[TensorInfo]:
        told = self._client.get_model_metadata(name, headers=self._headers, as_json=True)
        return [TensorInfo.of(tensor) for tensor in told["inputs"]]


@events.quit.add_listener
def leave(exit_code: int) -> None:
    """End at once: closing channels at interpreter exit blocks as well."""
    os._exit(exit_code)
