"""NVIDIA's four client libraries as one: HTTP and gRPC, blocking and asyncio, with a record of what was called."""

import asyncio
import inspect
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as grpcaio
import tritonclient.http as httpclient
import tritonclient.http.aio as httpaio
from tritonclient.utils import np_to_triton_dtype

LIBRARIES: dict[str, ModuleType] = {
    "http": httpclient,
    "grpc": grpcclient,
    "http.aio": httpaio,
    "grpc.aio": grpcaio,
}


def public_methods(kind: str) -> set[str]:
    """The public methods of a library's InferenceServerClient."""
    client = LIBRARIES[kind].InferenceServerClient
    return {name for name in dir(client) if not name.startswith("_") and callable(getattr(client, name))}


class AnyClient:
    """One client of any kind; methods block. `called` collects the names of those used."""

    def __init__(self, kind: str, url: str, called: set[str], **options: Any) -> None:
        self.kind = kind
        self.url = url
        self.protocol = kind.split(".")[0]
        self._called = called
        self._loop: asyncio.AbstractEventLoop | None = None
        if kind.endswith(".aio"):
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            self._thread.start()
            self._client = self._run(self._make(url, options))
        else:
            self._client = LIBRARIES[kind].InferenceServerClient(url, **options)

    async def _make(self, url: str, options: dict[str, Any]) -> Any:
        return LIBRARIES[self.kind].InferenceServerClient(url, **options)

    def _run(self, work: Any) -> Any:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        self._called.add(name)

        def call(*arguments: Any, **options: Any) -> Any:
            result = method(*arguments, **options)
            return self._run(result) if inspect.isawaitable(result) else result

        return call if callable(method) else method

    def as_json(self, method: str, *arguments: Any, **options: Any) -> Any:
        """What a question's answer is as JSON: gRPC has to be asked for it."""
        if self.protocol == "grpc":
            options["as_json"] = True
        return getattr(self, method)(*arguments, **options)

    def inputs(self, arrays: dict[str, np.ndarray], **data: Any) -> list[Any]:
        library = httpclient if self.protocol == "http" else grpcclient
        made = []
        for name, array in arrays.items():
            tensor = library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array, **data)
            made.append(tensor)
        return made

    def output(self, name: str, **options: Any) -> Any:
        library = httpclient if self.protocol == "http" else grpcclient
        return library.InferRequestedOutput(name, **options)

    def ask(self, model: str, arrays: dict[str, np.ndarray], **options: Any) -> Any:
        return self.infer(model, self.inputs(arrays), **options)

    def stream(self, model: str, requests: Sequence[dict[str, Any]], **options: Any) -> list[tuple[Any, Any]]:
        """(result, error) of every answer to the requests, each `arrays` and options, over one stream."""
        if self.kind == "grpc":
            return self._blocking_stream(model, requests, options)

        async def run() -> list[tuple[Any, Any]]:
            async def sent() -> Any:
                for request in requests:
                    arrays = request.pop("arrays")
                    yield {"model_name": model, "inputs": self.inputs(arrays), **request}

            return [answer async for answer in self._client.stream_infer(sent(), **options)]

        self._called.add("stream_infer")
        answers: list[tuple[Any, Any]] = self._run(run())
        return answers

    def _blocking_stream(self, model: str, requests: Sequence[dict[str, Any]], options: Any) -> list[tuple[Any, Any]]:
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.start_stream(lambda result, error: answers.put((result, error)), **options)
        for request in requests:
            arrays = request.pop("arrays")
            self.async_stream_infer(model, self.inputs(arrays), **request)
        self.stop_stream()
        return [answers.get_nowait() for _ in range(answers.qsize())]

    def shut(self) -> None:
        self.close()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()


@contextmanager
def connected(kind: str, url: str, called: set[str], **options: Any) -> Iterator[AnyClient]:
    client = AnyClient(kind, url, called, **options)
    try:
        yield client
    finally:
        client.shut()
