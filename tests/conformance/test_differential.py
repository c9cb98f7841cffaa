"""The corpus to a real tritonserver and to tutti over one repository: status, headers, JSON and tensor bytes.

INTENDED lists the differences that are wanted, by case and with the reason; anything else must be equal.
"""

import _posixshmem
import contextlib
import fnmatch
import gzip
import http.client
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import json_format
from tritonclient.grpc import service_pb2 as pb

from tests.conformance import corpus
from tests.conformance.corpus import Case, Grpc, Http
from tests.models import Repository
from tests.peers import tritonserver
from tests.serving import at_once, serving

pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

CASES = {case.name: case for case in corpus.cases()}


@dataclass(frozen=True)
class Intended:
    """A difference that is wanted: the cases it may show in, the statuses of both, and why."""

    pattern: str
    ours: Any
    theirs: tuple[Any, ...]
    reason: str


CALLERS_MISTAKE = "what does not parse or fit is its caller's mistake"
INTENDED = (
    Intended("http *", 400, (500, 501, 503), CALLERS_MISTAKE),
    Intended("grpc mistake: no message", "INVALID_ARGUMENT", ("INTERNAL",), CALLERS_MISTAKE),
    Intended("grpc shared output too small", "INVALID_ARGUMENT", ("INTERNAL",), CALLERS_MISTAKE),
    Intended("http BYTES edge * read", 400, (200,), "JSON is UTF-8"),
    Intended("http BYTES edge * shown", 400, (200,), "JSON is UTF-8: other characters would be another's text"),
    Intended(
        "http JSON edge: doubled member", 200, (200,), "of a doubled member the last counts, as most readers have it"
    ),
    Intended("http INT8 edge *", 400, (200,), "an element that does not fit is a mistake, not another number"),
    Intended("http INT16 edge *", 400, (200,), "an element that does not fit is a mistake, not another number"),
    Intended("http generate count *", 400, (200,), "an error is no 200"),
    Intended("grpc mistake: raw twice", "INVALID_ARGUMENT", ("OK",), "data that belongs to no input is a mistake"),
    Intended("grpc stream not a message", "OK", ("OK",), "the stream says that it could not read a message"),
    Intended("grpc strict stream *", "INVALID_ARGUMENT", ("OK",), "triton_grpc_error came after tritonserver 2.51"),
    Intended("grpc strict stream *", "NOT_FOUND", ("OK",), "triton_grpc_error came after tritonserver 2.51"),
    Intended("http FP64* json *", 200, (200,), "numbers in JSON are read exactly; Triton's reader may be off by a bit"),
    Intended("http controls of * name", 400, (200,), "a text is no number: Triton gives the model its first bytes"),
    Intended("http twice *", 200, (200,), "an ensemble's answer has no sequence parameters that nobody gave"),
    Intended("grpc twice *", "OK", ("OK",), "an ensemble's answer has no sequence parameters that nobody gave"),
)
SERVICE = "/inference.GRPCInferenceService/"


@dataclass
class Outcome:
    """What one exchange came to: a status, and what is compared of the answer."""

    status: Any
    content: Any
    said: str = ""


@dataclass
class Side:
    """One server's addresses."""

    http: str
    channel: grpc.Channel

    def run(self, step: Http | Grpc) -> Outcome:
        return self._http(step) if isinstance(step, Http) else self._grpc(step)

    def _http(self, step: Http) -> Outcome:
        connection = http.client.HTTPConnection(self.http, timeout=20)
        try:
            connection.request(step.method, step.path, body=step.body or None, headers=step.headers)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        headers = {key.lower(): value for key, value in response.getheaders()}
        said = body.decode("utf-8", "replace")[:300]
        if response.status != 200:
            assert not body or json.loads(body)["error"] or "ready" in step.path
            return Outcome(response.status, None, said)
        coding = headers.get("content-encoding", "")
        body = {"gzip": gzip.decompress, "deflate": zlib.decompress}.get(coding, bytes)(body)  # type: ignore[operator]
        return Outcome(200, _http_content(step, headers, coding, body), said)

    def _grpc(self, step: Grpc) -> Outcome:
        try:
            if step.is_stream:
                stream = self.channel.stream_stream(SERVICE + step.method)
                answers = list(stream(iter(step.messages), timeout=20, metadata=step.metadata))
                messages = [pb.ModelStreamInferResponse.FromString(answer) for answer in answers]
                return Outcome("OK", _stream_content(messages), str(messages)[:300])
            payload = self.channel.unary_unary(SERVICE + step.method)(
                step.messages[0], timeout=20, metadata=step.metadata
            )
        except grpc.RpcError as error:
            return Outcome(error.code().name, None, error.details())
        message = _RESPONSES.get(step.method, pb.ServerLiveResponse).FromString(payload)
        return Outcome("OK", _grpc_content(step, message), str(message)[:300])


_RESPONSES = {
    name: getattr(pb, f"{name}Response")
    for name in (
        "ModelInfer", "ServerLive", "ServerReady", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics",
        "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings",
        "SystemSharedMemoryStatus", "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus",
        "CudaSharedMemoryUnregister",
    )
}  # fmt: skip


def _http_content(step: Http, headers: dict[str, str], coding: str, body: bytes) -> Any:
    path = step.path.rstrip("/")
    kind = headers.get("content-type", "").split(";")[0]
    if not body:
        return None
    if kind == "text/event-stream":
        return [json.loads(event.removeprefix(b"data: ")) for event in body.split(b"\n\n") if event.strip()]
    length = headers.get("inference-header-content-length")
    if length is not None:
        return (kind, coding, json.loads(body[: int(length)]), body[int(length) :])
    content = json.loads(body.decode("utf-8", "replace"))
    for output in content.get("outputs", ()) if isinstance(content, dict) else ():
        if (
            output.get("datatype") in ("FP32", "FP64") and "data" in output
        ):  # FP32 in as many digits as it takes, or more
            kind = np.float32 if output["datatype"] == "FP32" else np.float64  # type: ignore[assignment]
            output["data"] = [repr(value) for value in np.array(output["data"], kind).tolist()]
    if path == "/v2":
        return sorted(content)
    if path.endswith("/stats"):
        return [{key: one[key] for key in ("name", "version")} for one in content["model_stats"]]
    if path.endswith("/config"):
        return _config(content)
    if path.endswith("/repository/index"):
        return _index(content)
    return (kind, coding, content)


def _config(content: dict[str, Any]) -> dict[str, Any]:
    """All but which instances there are: Triton shows what it decided on. `runtime` is our stand-in's.

    And but for what came after tritonserver 2.51.
    """
    content.get("ensemble_scheduling", {}).pop("max_inflight_requests", None)
    return {key: value for key, value in content.items() if key not in ("instance_group", "runtime")}


def _index(entries: list[dict[str, Any]]) -> list[Any]:
    return sorted((one["name"], one.get("version", ""), one.get("state", "")) for one in entries)


def _grpc_content(step: Grpc, message: Any) -> Any:
    content = json_format.MessageToDict(message, preserving_proto_field_name=True)
    if step.method == "ModelStatistics":
        return [(one["name"], one["version"]) for one in content.get("model_stats", [])]
    if step.method == "ModelConfig":
        return _config(content["config"])
    if step.method == "RepositoryIndex":
        return _index(content["models"])
    return content


def _stream_content(messages: list[Any]) -> Any:
    """Answers to different requests may come in any order, those to one come in theirs."""
    shown = [json_format.MessageToDict(message) for message in messages]
    for one in shown:
        if "errorMessage" in one:
            one["errorMessage"] = "an error"
            one["inferResponse"] = {"id": one.get("inferResponse", {}).get("id", "")}
    return sorted(shown, key=lambda one: one["inferResponse"].get("id", ""))


CONTROL = ("--model-control-mode", "explicit", "--load-model", "*", "--allow-client-shm")


@contextlib.contextmanager
def serving_all(scratch: Path, *flags_of_ours: tuple[str, ...], with_triton: bool = True) -> Iterator[list[Side]]:
    """A real tritonserver, and tutti once for each set of flags, over one repository."""
    tritonserver.require()
    repository = Repository(scratch / "models")
    corpus.fill(repository)
    descriptor = _posixshmem.shm_open(corpus.SHARED_KEY, os.O_CREAT | os.O_RDWR, mode=0o600)
    os.write(descriptor, np.array([1, 2, 3, 4], np.float32).tobytes().ljust(corpus.SHARED_SIZE, b"\0"))
    os.close(descriptor)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(FileNotFoundError))  # the other servers' have gone before
        stack.callback(_posixshmem.shm_unlink, corpus.SHARED_KEY)
        control = ("--model-control-mode=explicit", "--load-model=*")
        starts: list[Any] = [tritonserver.running(repository.root, scratch, *control)] if with_triton else []
        for number, flags in enumerate(flags_of_ours):
            starts.append(serving(repository.root, scratch / f"tutti{number}.log", *CONTROL, *flags))
        servers = stack.enter_context(at_once(starts))
        yield [Side(one.http, stack.enter_context(grpc.insecure_channel(one.grpc))) for one in servers]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Side]]:
    """tritonserver, tutti, tutti with grpcio, and tutti with front-end processes."""
    flags = ((), ("--grpc-server", "grpcio"), ("--front-end-processes", "2"))
    with serving_all(tmp_path_factory.mktemp("differential"), *flags) as made:
        yield made


def is_intended(name: str, ours: Outcome, theirs: Outcome) -> bool:
    return any(
        fnmatch.fnmatchcase(name, one.pattern) and ours.status == one.ours and theirs.status in one.theirs
        for one in INTENDED
    )


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    assert len(CASES) >= 500
    assert len(CASES) == sum(1 for _ in corpus.cases())


SEEN: set[Intended] = set()
# What tritonserver has answered to all steps of a case, each once and in their order.
TOLD: dict[str, list[Outcome]] = {}


@pytest.mark.parametrize("name", CASES)
def test_all_answer_the_same(sides: list[Side], name: str) -> None:
    case: Case = CASES[name]
    triton, native, grpcio, front_ends = sides
    is_grpc = any(isinstance(step, Grpc) for step in case.steps)
    mine = (native, grpcio, front_ends) if is_grpc else (native, front_ends)
    told: list[Outcome] = []
    for step in case.steps:
        theirs = triton.run(step)
        told.append(theirs)
        for side in mine:
            ours = side.run(step)
            if (ours.status, ours.content) == (theirs.status, theirs.content):
                continue
            assert is_intended(name, ours, theirs), (step, ours, theirs)
            SEEN.update(one for one in INTENDED if fnmatch.fnmatchcase(name, one.pattern) and ours.status == one.ours)
    TOLD[name] = told


def test_every_intended_difference_is_one(sides: list[Side]) -> None:
    assert [one for one in INTENDED if one not in SEEN] == [], "no longer a difference: take it off the list"


def without_pool(content: Any) -> Any:
    """The answer but for the parameter that says which pool of the cluster it came from."""
    if isinstance(content, dict):
        left = {key: without_pool(value) for key, value in content.items() if key != "tutti_pool"}
        return {key: value for key, value in left.items() if key != "parameters" or value}
    if isinstance(content, list | tuple):
        return type(content)(without_pool(value) for value in content)
    return content


@pytest.fixture
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """What a tritonserver answers to all of the corpus: asked here, unless the tests above have asked one."""
    if TOLD.keys() != CASES.keys():
        with serving_all(tmp_path_factory.mktemp("told")) as (triton,):
            TOLD.update({name: [triton.run(step) for step in case.steps] for name, case in CASES.items()})
    return TOLD


@pytest.mark.ray
@pytest.mark.timeout(250)
def test_the_gateway_answers_the_same(told: dict[str, list[Outcome]], tmp_path: Path) -> None:
    """The whole corpus through a gateway and two replicas."""
    differences = []
    with serving_all(tmp_path, ("--ray", "--cpu-replicas", "2"), with_triton=False) as (gateway,):
        for name, case in CASES.items():
            for step, theirs in zip(case.steps, told[name], strict=True):
                ours = gateway.run(step)
                is_same = ours.status == theirs.status and without_pool(ours.content) == without_pool(theirs.content)
                if not is_same and not is_intended(name, ours, theirs):
                    differences.append((name, ours, theirs))
    assert differences == []
