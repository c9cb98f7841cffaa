"""The generate extension: mistakes in Triton's words, and errors in the form that readers of event streams expect."""

import asyncio
import json
from typing import Any

import pytest

from tests.models import Repository
from tests.serving import engine_over
from tutti.core.errors import InvalidArgument
from tutti.frontends.http import routes as http_api
from tutti.frontends.v2 import generate
from tutti.frontends.v2.api import Api
from tutti.repository import config

TEXT = config.parse(
    """
    name: "m" backend: "python"
    input { name: "t" data_type: TYPE_STRING dims: [ 1, 1 ] }
    input { name: "b" data_type: TYPE_BOOL dims: [ 1, 1 ] optional: true }
    output { name: "y" data_type: TYPE_STRING dims: [ -1 ] }
    """,
    "m",
)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"t": "a", "t": "b"}', "input 't' already exists in request"),
        (b'{"t": "a", "b": true, "x": 1, "b": true}', "input 'b' already exists in request"),
        (b'{"t": "a", "b": "true"}', "attempt to access JSON non-boolean as boolean"),
        (b'{"t": 5}', "attempt to access JSON non-string as string"),
        (b'{"t": {"t": 1}}', "attempt to access JSON non-string as string"),
        (b'{"t": "a", "parameters": 1}', "Expected JSON object for keyword: 'parameters'"),
        (
            b'{"t": "a", "parameters": {"nested": {}}}',
            "Converting keyword: 'parameters': parameter 'nested' has invalid type.",
        ),
        (b'{"t": "a", "other": {}}', "parameter 'other' has invalid type"),
        (b'{"t": "a", "triton_x": 1}', "parameter keys starting with 'triton_' are reserved for Triton usage"),
    ],
)
def test_mistakes_are_told_in_tritons_words(body: bytes, says: str) -> None:
    with pytest.raises(InvalidArgument, match="model 'm'") as caught:
        generate.decode(TEXT, "", body)
    assert says in caught.value.message


@pytest.mark.parametrize("body", [b'{"t": "\\"t\\" \\"t\\""}', b'{"t": "a", "x": "\\"t\\"", "id": "b"}'])
def test_a_name_within_a_text_is_not_given_twice(body: bytes) -> None:
    assert list(generate.decode(TEXT, "", body).inputs) == ["t"]


FAILS_AFTER = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for n in range(int(pb_utils.get_input_tensor_by_name(request, "x").as_numpy()[0])):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([n], np.int32))]))
            error = pb_utils.TritonError("on purpose", pb_utils.TritonError.INVALID_ARG)
            sender.send(pb_utils.InferenceResponse(error=error), pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
CONFIG = """
    backend: "python" model_transaction_policy { decoupled: true }
    input { name: "x" data_type: TYPE_INT32 dims: 1 }
    output { name: "y" data_type: TYPE_INT32 dims: 1 }
"""


def ask(app: Any, body: bytes) -> tuple[int, str, bytes]:
    """(status, content type, body) of a POST to generate_stream."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    path = "/v2/models/fails/generate_stream"
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
    }
    asyncio.run(app({**scope, "asgi": {"version": "3.0", "spec_version": "2.4"}, "root_path": ""}, receive, send))
    headers = dict(sent[0]["headers"])
    return sent[0]["status"], headers[b"content-type"].decode(), b"".join(m.get("body", b"") for m in sent[1:])


@pytest.mark.parametrize("before", [0, 2])
def test_what_a_model_says_is_an_event_an_error_too(repository: Repository, before: int) -> None:
    repository.add("fails", CONFIG, {"model.py": FAILS_AFTER})
    with engine_over(repository.root) as engine:
        status, kind, body = ask(http_api.make_app(Api(engine)), b'{"x": %d}' % before)
        assert (status, kind) == (200 if before else 400, "text/event-stream; charset=utf-8")
        events = [json.loads(event.removeprefix(b"data: ")) for event in body.split(b"\n\n") if event]
        assert [event.get("y") for event in events[:-1]] == list(range(before))
        assert events[-1] == {"error": "on purpose"}


def test_a_request_that_is_refused_has_a_plain_answer(repository: Repository) -> None:
    repository.add("fails", CONFIG, {"model.py": FAILS_AFTER})
    with engine_over(repository.root) as engine:
        app = http_api.make_app(Api(engine))
        for body in (b"{}", b"{", b'{"x": "1"}'):
            status, kind, said = ask(app, body)
            assert (status, kind) == (400, "application/json")
            assert "fails" in json.loads(said)["error"]
