"""Has a server that runs explain requests, over HTTP: no answer is waited for longer than was said.

Knows nothing of command lines. None is between this machine and the server: a proxy of the environment would be.
"""

import contextlib
import difflib
import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from tutti.console.arguments import server_url, shown
from tutti.console.progress import Work
from tutti.core.errors import ConfigError, reason
from tutti.core.types import Tensor
from tutti.frontends.v2 import json_values
from tutti.observing.explanations import PARAMETER
from tutti.repository import config
from tutti.repository.model_config import ModelConfig

_LENGTH_HEADER = "Inference-Header-Content-Length"
# The library gives up so much later than who waits, who says why.
_GRACE_S = 5.0


class Server:
    """A server at an address, asked with some headers."""

    def __init__(self, url: str, headers: Mapping[str, str], timeout_s: float) -> None:
        """`url` is HOST:PORT, or with a scheme and a path before its routes. Raises ConfigError for what is neither."""
        self._url = server_url(url)
        if not self._url:
            raise ConfigError(f"explain: --url: expected HOST:PORT, got {shown(url)}")
        self._headers = dict(headers)
        self._timeout_s = timeout_s
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def explained(self, name: str, inputs_of: Callable[[ModelConfig], dict[str, Tensor]], repeat: int) -> str:
        """The explanation, in JSON, of the last of so many requests to a model. Raises ConfigError."""
        model = f"{self._url}/v2/models/{quote(name, safe='')}"
        with Work(f"asking '{name}' at {self._url}") as work:
            work.step("its configuration", repeat + 1)
            inputs = inputs_of(config.parse_json(self._config(name, f"{model}/config"), name))
            head, body = _request(inputs)
            told = b""
            for number in range(repeat):
                work.step(f"request {number + 1}")
                told = self._fetched(f"{model}/infer", body, {_LENGTH_HEADER: str(head)})
        return self._parameter(told)

    def _config(self, name: str, url: str) -> bytes:
        """Raises ConfigError, for a name that is not served with one that is like it."""
        try:
            return self._fetched(url)
        except ConfigError as error:
            if near := difflib.get_close_matches(name, self._names(), 1):
                raise ConfigError(f"{error}; did you mean '{near[0]}'?") from None
            raise

    def _names(self) -> list[str]:
        """Of the models that the server has; none where it does not tell."""
        try:
            index = json.loads(self._fetched(f"{self._url}/v2/repository/index", b"{}"))
            return [str(entry["name"]) for entry in index]
        except (ConfigError, ValueError, LookupError, TypeError):
            return []

    def _parameter(self, answer: bytes) -> str:
        try:
            return str(json.loads(answer)["parameters"][PARAMETER])
        except (ValueError, LookupError, TypeError):
            raise ConfigError(f"the server at {self._url} does not explain requests; is it tutti?") from None

    def _fetched(self, url: str, body: bytes | None = None, more: Mapping[str, str] | None = None) -> bytes:
        """The JSON of an answer that came in time. Raises ConfigError with what the server, or the network, says."""
        answers: list[bytes | ConfigError] = []

        def fetch() -> None:
            try:
                answers.append(self._read(url, body, {**self._headers, **(more or {})}))
            except Exception as error:
                answers.append(_failure(url, error))

        # In a thread: the library's own timeout begins anew with each piece that comes.
        thread = threading.Thread(target=fetch, name="asking", daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if not answers:
            reasons = "it is busy, or that is no HTTP port of a server; --timeout SECONDS waits longer"
            raise ConfigError(f"{url} has not answered within {self._timeout_s:g} s: {reasons}")
        if isinstance(answers[0], ConfigError):
            raise answers[0]
        return answers[0]

    def _read(self, url: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
        request = urllib.request.Request(url, body, dict(headers))
        with self._opener.open(request, timeout=self._timeout_s + _GRACE_S) as answer:
            length = answer.headers.get(_LENGTH_HEADER)
            data: bytes = answer.read()
            return data[: int(length)] if length else data


def _request(inputs: Mapping[str, Tensor]) -> tuple[int, bytes]:
    """The length of its JSON, and the whole body."""
    parts = [bytes(tensor.raw()) for tensor in inputs.values()]
    shown_inputs = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
            "parameters": {"binary_data_size": len(part)},
        }
        for tensor, part in zip(inputs.values(), parts, strict=True)
    ]
    told: dict[str, Any] = {"inputs": shown_inputs, "parameters": {PARAMETER: True, "binary_data_output": True}}
    head = json.dumps(told).encode()
    return len(head), b"".join([head, *parts])


def _failure(url: str, error: Exception) -> ConfigError:
    """What became of a request that has no answer."""
    if isinstance(error, urllib.error.HTTPError):
        return ConfigError(_refusal(error))
    why = error.reason if isinstance(error, urllib.error.URLError) else error
    told = reason(why) if isinstance(why, BaseException) else why
    speaks_otherwise = isinstance(why, http.client.HTTPException | ConnectionResetError | BrokenPipeError)
    hint = "; is it the gRPC port? explain asks the HTTP port, 8000 by default" if speaks_otherwise else ""
    return ConfigError(f"{url} cannot be asked: {told}{hint}")


def _refusal(error: urllib.error.HTTPError) -> str:
    text = b""
    with contextlib.suppress(OSError, http.client.HTTPException), error:
        text = error.read()
    advice = " (--api-key-file FILE, or --header)" if error.code in (401, 403) else ""
    try:
        return str(json_values.parse_json(text)["error"]) + advice
    except (ValueError, KeyError, TypeError):
        return f"{error.url}: {error.code} {error.reason}: {text[:200]!r}{advice}"
