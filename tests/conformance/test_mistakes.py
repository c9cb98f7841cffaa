"""The same HTTP requests, good and bad, to tutti and to a real tritonserver: the same status.

INTENDED lists where we differ on purpose, with the reason.
"""

import http.client
import json
from collections.abc import Iterator

import numpy as np
import pytest

from tests.models import Repository
from tests.peers import tritonserver
from tests.serving import serving

pytestmark = [pytest.mark.triton, pytest.mark.slow]

INFER = "/v2/models/add_one/infer"
X = {"name": "x", "shape": [1, 4], "datatype": "FP32"}
OK = {**X, "data": [1, 2, 3, 4]}
RAW = np.arange(4, dtype=np.float32).tobytes()
LENGTH = "Inference-Header-Content-Length"
Sent = tuple[str, str, bytes | None, dict[str, str]]


def post(path: str = INFER, **body: object) -> Sent:
    return "POST", path, json.dumps(body).encode(), {}


def inputs(*items: dict, **more: object) -> Sent:
    return post(inputs=list(items), **more)


def binary(content: bytes, length: str | None = None, **tensor: object) -> Sent:
    size = {"parameters": {"binary_data_size": len(content)}}
    header = json.dumps({"inputs": [{**X, **size, **tensor}]}).encode()
    return "POST", INFER, header + content, {LENGTH: length or str(len(header))}


def raw(data: bytes) -> Sent:
    return "POST", INFER, data, {LENGTH: "0"}


CASES: dict[str, Sent] = {
    "good": inputs(OK),
    "good with id": inputs(OK, id="a"),
    "good version": post("/v2/models/add_one/versions/1/infer", inputs=[OK]),
    "good nested": inputs({**X, "data": [[1, 2, 3, 4]]}),
    "good binary": binary(RAW),
    "good raw": raw(RAW),
    "good classes": inputs(OK, outputs=[{"name": "y", "parameters": {"classification": 2}}]),
    "no classes": inputs(OK, outputs=[{"name": "y", "parameters": {"classification": 0}}]),
    "empty body": ("POST", INFER, b"", {}),
    "not JSON": ("POST", INFER, b"{", {}),
    "an array": ("POST", INFER, b"[]", {}),
    "no inputs": post(),
    "empty inputs": inputs(),
    "wrong datatype": inputs({**OK, "datatype": "INT32"}),
    "no such datatype": inputs({**OK, "datatype": "FLOAT"}),
    "wrong rank": inputs({**OK, "shape": [4]}),
    "wrong shape": inputs({**X, "shape": [1, 3], "data": [1, 2, 3]}),
    "too few elements": inputs({**X, "data": [1, 2]}),
    "negative shape": inputs({**OK, "shape": [-1, 4]}),
    "fractional shape": inputs({**OK, "shape": [1.5, 4]}),
    "text for numbers": inputs({**X, "data": ["a"] * 4}),
    "batch too large": inputs({**X, "shape": [9, 4], "data": [1] * 36}),
    "batch of none": inputs({**X, "shape": [0, 4], "data": []}),
    "input twice": inputs(OK, OK),
    "unknown input": inputs({**OK, "name": "z"}),
    "one input too many": inputs(OK, {**OK, "name": "z"}),
    "unknown output": inputs(OK, outputs=[{"name": "q"}]),
    "output twice": inputs(OK, outputs=[{"name": "y"}, {"name": "y"}]),
    "input without name": inputs({"shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}),
    "id a number": inputs(OK, id=5),
    "parameters an array": inputs(OK, parameters=[]),
    "unknown model": post("/v2/models/none/infer", inputs=[OK]),
    "unknown version": post("/v2/models/add_one/versions/9/infer", inputs=[OK]),
    "version no number": post("/v2/models/add_one/versions/x/infer", inputs=[OK]),
    "wrong verb": ("GET", INFER, None, {}),
    "binary too short": binary(RAW[:8], None, parameters={"binary_data_size": 16}),
    "binary too long": binary(RAW + RAW, None, parameters={"binary_data_size": 16}),
    "binary of another size": binary(RAW[:12]),
    "data and binary": binary(RAW, None, data=[1, 2, 3, 4]),
    "negative header length": binary(RAW, "-1"),
    "header length too large": binary(RAW, "99999"),
    "header length no number": binary(RAW, "abc"),
    "raw too short": raw(RAW[:8]),
    "broken gzip": ("POST", INFER, b"zzz", {"Content-Encoding": "gzip"}),
    "metadata": ("GET", "/v2/models/add_one", None, {}),
    "metadata of none": ("GET", "/v2/models/none", None, {}),
    "ready": ("GET", "/v2/models/add_one/ready", None, {}),
    "ready of none": ("GET", "/v2/models/none/ready", None, {}),
    "config": ("GET", "/v2/models/add_one/config", None, {}),
    "config of none": ("GET", "/v2/models/none/config", None, {}),
    "stats": ("GET", "/v2/models/add_one/stats", None, {}),
    "stats of none": ("GET", "/v2/models/none/stats", None, {}),
    "server": ("GET", "/v2", None, {}),
    "server ready": ("GET", "/v2/health/ready", None, {}),
    "server live": ("GET", "/v2/health/live", None, {}),
    "no such route": ("GET", "/v2/zzz", None, {}),
    "wrong verb for server": ("POST", "/v2", b"", {}),
    "load without control": ("POST", "/v2/repository/models/add_one/load", b"{}", {}),
    "unload without control": ("POST", "/v2/repository/models/add_one/unload", b"{}", {}),
    "index": ("POST", "/v2/repository/index", b"", {}),
    "index with broken JSON": ("POST", "/v2/repository/index", b"{", {}),
}
CALLERS_MISTAKE = "JSON that does not parse or fit is the caller's mistake: 400; Triton says 500"
INTENDED = {
    **dict.fromkeys(
        (
            "not JSON", "an array", "no inputs", "too few elements", "negative shape", "fractional shape",
            "text for numbers", "input without name", "id a number", "parameters an array", "index with broken JSON",
        ),
        CALLERS_MISTAKE,
    ),
    "output twice": "a duplicate output is an error over both protocols here; Triton's HTTP answers it once",
}  # fmt: skip


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """HTTP addresses of tutti and of tritonserver over one repository."""
    tritonserver.require()
    scratch = tmp_path_factory.mktemp("mistakes")
    repository = Repository(scratch / "models")
    repository.add_onnx()
    with (
        tritonserver.running(repository.root, scratch) as theirs,
        serving(repository.root, scratch / "tutti.log") as ours,
    ):
        yield ours.http, theirs.http


def ask(address: str, sent: Sent) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request(*sent[:2], body=sent[2], headers=sent[3])
        response = connection.getresponse()
        return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("case", CASES)
def test_the_same_status(addresses: tuple[str, str], case: str) -> None:
    (ours, our_headers, our_body), (theirs, their_headers, their_body) = (ask(one, CASES[case]) for one in addresses)
    if case in INTENDED:
        assert ours == 400
        assert ours != theirs, "no longer a difference: take it off the list"
    else:
        assert ours == theirs, (our_body, their_body)
    if ours == 200:
        assert our_headers.get(LENGTH.lower()) is None or their_headers.get(LENGTH.lower()) is not None
    else:
        assert json.loads(our_body)["error"]


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("good") and case != "good raw"])
def test_the_same_answer(addresses: tuple[str, str], case: str) -> None:
    ours, theirs = (json.loads(ask(address, CASES[case])[2]) for address in addresses)
    assert ours == theirs
