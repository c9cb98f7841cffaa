"""A request may ask where its time went, of any model; parameters of ours are never ignored."""

import contextlib
import io
import json
import socket
import threading
import urllib.request
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests.models import IN_PROCESS, Repository, onnx_gather
from tests.serving import Gather, engine_over, infer, serving, wait_until
from tutti.app import cli
from tutti.core.errors import InferError, InvalidArgument, Unavailable
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.observing import explanations
from tutti.observing.tracing import TraceConfig, Tracer
from tutti.observing.waterfall import waterfall
from tutti.serving.engine import Engine

X = np.zeros((1, 4), np.float32)


def ask(model: str = "add_one", array: Any = X, name: str = "x", **parameters: Any) -> InferRequest:
    return InferRequest(model, {name: Tensor.of(name, array)}, parameters=parameters)


def told(answer: Any) -> dict[str, Any]:
    assert isinstance(answer, InferResponse), answer
    found = json.loads(answer.parameters[explanations.PARAMETER])  # type: ignore[arg-type]
    assert isinstance(found, dict)
    return found


@pytest.fixture
def engine(repository: Repository) -> Any:
    repository.add_onnx()
    repository.add_onnx("cached", extra="dynamic_batching {} response_cache { enable: true }")
    repository.add_gather()
    with engine_over(repository.root) as made:
        assert not made.failures(), made.failures()
        yield made


def test_a_plain_model_is_explained(engine: Engine) -> None:
    (answer, other) = infer(engine, [ask(tutti_explain=True, array=np.zeros((2, 4), np.float32)), ask()])
    found = told(answer)
    assert (found["model"], found["version"], found["rows"]) == ("add_one", "1", 2)
    assert (found["instance"], found["device"], found["instances"]) == ("add_one_0", "cpu", 1)
    assert found["batch_rows"] >= 2
    stages = [found[name] for name in ("queue_us", "input_us", "compute_us", "output_us", "other_us")]
    assert sum(stages) == pytest.approx(found["total_us"], abs=1)
    assert "add_one version 1: 2 rows in" in waterfall(found)
    assert isinstance(other, InferResponse) and not other.parameters


def test_false_asks_for_nothing(engine: Engine) -> None:
    for value in (False, "false"):
        (answer,) = infer(engine, [ask(tutti_explain=value)])
        assert isinstance(answer, InferResponse) and not answer.parameters


def test_what_the_cache_knows_is_said_and_explained_anew(engine: Engine) -> None:
    found = [told(infer(engine, [ask("cached", tutti_explain=True)])[0]) for _ in range(2)]
    assert [one["cache"] for one in found] == ["miss", "hit"]
    assert "compute_us" in found[0]
    assert "compute_us" not in found[1]
    (plain,) = infer(engine, [ask("cached")])
    assert isinstance(plain, InferResponse) and not plain.parameters


def test_padding_is_told(repository: Repository) -> None:
    repository.add(
        "padded",
        """
        backend: "onnxruntime" max_batch_size: 8
        input { name: "ids" data_type: TYPE_INT64 dims: -1 }
        output { name: "y" data_type: TYPE_FP32 dims: -1 }
        dynamic_batching {}
        parameters { key: "tutti.buckets.ids" value { string_value: "8,16" } }
        """,
        {"model.onnx": onnx_gather()},
    )
    with engine_over(repository.root) as engine:
        assert not engine.failures(), engine.failures()
        (answer,) = infer(engine, [ask("padded", np.zeros((1, 5), np.int64), "ids", tutti_explain=True)])
    assert told(answer)["padded"] == {"ids": [[5], [8]]}
    assert "padded: ids from [5] to [8]" in waterfall(told(answer))


def test_a_refusal_says_what_was_before_it(repository: Repository) -> None:
    repository.add_python(
        "held",
        'backend: "python" max_batch_size: 1 input { name: "x" data_type: TYPE_FP32 dims: 4 } '
        'output { name: "y" data_type: TYPE_FP32 dims: 4 } '
        "dynamic_batching { default_queue_policy { max_queue_size: 2 } }" + IN_PROCESS,
        """
        import threading
        threading.held.wait(60)
        raise ValueError("let go")
        """,
    )
    threading.held = held = threading.Event()  # type: ignore[attr-defined]
    with engine_over(repository.root) as engine:
        gather = Gather(3)
        first = Call(ask("held"), gather)
        engine([first])
        wait_until(lambda: engine.model("held").executing())
        engine([Call(ask("held"), gather) for _ in range(2)])
        (refused,) = infer(engine, [ask("held", tutti_explain=True)])
        held.set()
        gather.wait()
        assert isinstance(refused, Unavailable)
        for says in ("[tutti_explain:", "not executed", "2 requests waited before it", "1 of 1 instances were busy"):
            assert says in refused.message
        (failed,) = infer(engine, [ask("held", tutti_explain=True)])
        assert isinstance(failed, InferError)
        assert "let go" in failed.message and "executing" in failed.message and "by held_0" in failed.message
        assert isinstance(first.answer, InferError) and "tutti_explain" not in first.answer.message


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"tutti_explian": True}, "did you mean tutti_explain"),
        ({"tutti_": 1}, "is not known"),
        ({"tutti_explain": "maybe"}, "expected true or false, got 'maybe'"),
        ({"tutti_explain": 1}, "expected true or false"),
        ({"tutti_fallback": False}, "is for pools of replicas, and would be ignored here"),
        ({"tutti_pool": "gpu"}, "answers have it"),
        ({"tutti_shed": "slow"}, "answers have it"),
    ],
)
def test_parameters_of_ours_are_not_ignored(engine: Engine, parameters: dict[str, Any], says: str) -> None:
    (answer,) = infer(engine, [ask(**parameters)])
    assert isinstance(answer, InvalidArgument)
    assert f"request parameter '{next(iter(parameters))}'" in answer.message and says in answer.message
    assert engine.model("add_one").statistics.counts.fail.count == 1


def test_each_answer_of_several_is_explained(repository: Repository) -> None:
    repository.add(
        "twice",
        'backend: "python" input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 '
        "dims: 4 } model_transaction_policy { decoupled: true }" + IN_PROCESS,
        {
            "model.py": """
            import numpy as np
            import triton_python_backend_utils as pb_utils


            class TritonPythonModel:
                def execute(self, requests):
                    for request in requests:
                        sender = request.get_response_sender()
                        for _ in range(2):
                            y = pb_utils.Tensor("y", np.zeros(4, np.float32))
                            sender.send(pb_utils.InferenceResponse([y]))
                        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            """
        },
    )
    with engine_over(repository.root) as engine:
        gather, emitted = Gather(1), list[InferResponse]()
        engine([Call(ask("twice", X[0], tutti_explain=True), gather, None, emitted.append)])
        gather.wait()
    assert [told(answer)["answer"] for answer in emitted] == [1, 2]


def test_a_traced_request_is_explained_too(engine: Engine, tmp_path: Path) -> None:
    tracer = Tracer(TraceConfig(file=str(tmp_path / "trace"), levels=("TIMESTAMPS",), rate=1))
    gather = Gather(1)
    call = Call(ask(tutti_explain=True), gather)
    tracer.begin(call)
    engine([call])
    gather.wait()
    tracer.end(call)
    tracer.close()
    assert told(call.answer)["batch_rows"] == 1
    (head, times) = json.loads((tmp_path / "trace").read_text())
    assert head["instance"] == "add_one_0"
    assert len(times["timestamps"]) == 7


def wav(samples: Any, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(np.asarray(samples, "<i2").tobytes())
    return file.getvalue()


@pytest.fixture
def folder(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    repository.add_onnx()
    (tmp_path / "tone.wav").write_bytes(wav([0, 16384, -16384, 0]))
    (tmp_path / "stereo.wav").write_bytes(wav([0, 0, 8192, 24576, 0, 0, 0, 0], 2))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    (tmp_path / "song.mp3").write_bytes(b"ID3" + bytes(50))
    (tmp_path / "broken.wav").write_bytes(wav([0])[:20])
    (tmp_path / "numbers.json").write_text("[1, 2, 3, 4]")
    (tmp_path / "words.txt").write_text("some words")
    np.save(tmp_path / "good.npy", np.ones((1, 4)))
    np.save(tmp_path / "odd.npy", np.array([{}], dtype=object))
    np.savez(tmp_path / "many.npz", a=X)
    (tmp_path / "pickled").write_bytes(b"\x80\x04N.")
    monkeypatch.chdir(tmp_path)
    return repository.root


@pytest.mark.parametrize(
    "given", ["@tone.wav", "@stereo.wav", "@numbers.json", "@good.npy", "[1,2,3,4]", "[[1,2,3,4]]"]
)
def test_tutti_explain_takes_inputs_in_many_forms(folder: Path, capsys: pytest.CaptureFixture[str], given: str) -> None:
    assert cli.main(["explain", "add_one", f"x={given}", "--repository", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("add_one version 1: 1 row in") and "by add_one_0" in out
    assert ("16000 Hz" in err) == given.endswith(".wav")
    assert ("2 channels mixed" in err) == (given == "@stereo.wav")


@pytest.mark.parametrize("command", [["explain"], ["ensemble", "explain"]])
def test_inputs_may_stand_behind_flags(folder: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert cli.main([*command, "add_one", "--repository", str(folder), "x=[1,2,3,4]", "--json"]) == 0
    assert '"add_one"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["add_on", "x=1"], "model 'add_on': there is none of that name in"),
        (["add_one", "x=1", "--id", "a"], "--id goes with --traces"),
        (["add_one", "x=1", "--header", "a: b"], "--header goes with --url"),
        (["add_one", "x=1", "--timeout", "3"], "--timeout goes with --url"),
        (["add_one", "x=1", "--api-key-file", "k"], "--api-key-file goes with --url"),
        (["add_one", "x=1", "--url", "h:1", "--api-key-file", "k"], "--api-key-file k: No such file or directory"),
        (["add_one", "x=1", "--url", "ftp://h"], "--url: expected HOST:PORT, got 'ftp://h'"),
        (["add_one", "x=1", "--traces", "t"], "INPUT=VALUE does not go with --traces"),
        (["add_one", "x=1", "--url", ""], "--url: expected HOST:PORT, got ''"),
        (["add_on", "x=1"], "did you mean add_one?"),
        (["add_one"], "missing input 'x': expected x=JSON or @FILE (FP32 [4])"),
        (["add_one", "z=1"], "'z=1': expected INPUT=VALUE, with one of x="),
        (["add_one", "x"], "'x': expected INPUT=VALUE"),
        (["add_one", "x=1", "x=2"], "input 'x' is given twice"),
        (["add_one", "x=tone"], "expected numbers in JSON, or @FILE, got 'tone'"),
        (["add_one", "x=tone.wav"], "to read the file write x=@tone.wav"),
        (["add_one", "x=@tune.wav"], "'tune.wav' cannot be read: No such file or directory; did you mean tone.wav?"),
        (["add_one", "x=@."], "'.' cannot be read: Is a directory"),
        (["add_one", "x=@picture.png"], "'picture.png' is a PNG picture: decode it"),
        (["add_one", "x=@song.mp3"], "is MP3 audio: convert it: ffmpeg -i song.mp3 -ar 16000 -ac 1 song.wav"),
        (["add_one", "x=@broken.wav"], "'broken.wav' is not FP32"),
        (["add_one", "x=@words.txt"], "expected an .npy file, a .wav file or numbers in JSON"),
        (["add_one", "x=@odd.npy"], "'odd.npy' is not FP32"),
        (["add_one", "x=@many.npz"], "is a zip or .npz file: save one array with numpy.save"),
        (["add_one", "x=@pickled"], "is a pickle: pickles are not read"),
        (["add_one", "x=[1,2]"], "unexpected shape for input 'x'"),
        (["add_one", 'x=["a"]'], "expected numbers in JSON"),
    ],
)
def test_tutti_explain_says_what_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], given: list[str], says: str
) -> None:
    assert cli.main(["explain", *given, "--repository", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert says in err and not out
    assert "Traceback" not in err and "allow_pickle" not in err and len(err.splitlines()) == 1


def test_a_request_is_found_in_traces_by_the_id_of_its_answer(
    repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.add_onnx()
    infer = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    file = tmp_path / "traces"
    tracing = [f"--trace-config={one}" for one in (f"triton,file={file}", "level=TIMESTAMPS", "rate=1")]
    with serving(repository.root, tmp_path / "log", *tracing) as served:
        url = f"http://{served.http}/v2/models/add_one/"
        for route, body, headers in (
            ("infer", infer, {}),
            ("infer", infer, {"x-request-id": "order-7"}),
            ("infer", {**infer, "id": "mine"}, {"x-request-id": "yours"}),
            ("generate", {"x": [1, 2, 3, 4]}, {}),
            ("generate", {"x": [1, 2, 3, 4]}, {"x-request-id": "order-8"}),
            ("generate", {"x": [1, 2, 3, 4], "id": "its own"}, {}),
        ):
            request = urllib.request.Request(url + route, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                known = {answer.headers["x-request-id"], str(body.get("id", answer.headers["x-request-id"]))}
            assert not headers or headers["x-request-id"] in known
            for name in known:
                wait_until(lambda name=name: file.exists() and name in file.read_text())
                assert cli.main(["explain", "--traces", str(file), "--id", name]) == 0
                assert capsys.readouterr().out.startswith("add_one version 1: request '")


def test_a_server_explains_over_every_door(
    repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.add_onnx()
    (tmp_path / "x.json").write_text("[1, 2, 3, 4]")
    restricted = ("--http-restricted-api", "model-config:who=me")
    with serving(repository.root, tmp_path / "log", *restricted) as served:
        asked = ["explain", "add_one", f"x=@{tmp_path / 'x.json'}", "--url", served.http]
        assert cli.main(asked) == 1
        assert "restricted" in capsys.readouterr().err
        assert cli.main([*asked, "--header", "who"]) == 1
        assert "expected NAME: VALUE" in capsys.readouterr().err
        asked += ["--header", "who: me"]
        assert cli.main(asked) == 0
        assert "by add_one_0 on cpu" in capsys.readouterr().out
        assert cli.main(["explain", "add_on", *asked[2:]]) == 1
        assert "'add_on' is not found; did you mean 'add_one'?" in capsys.readouterr().err
        assert cli.main(["explain", "add_one", "x=1,2,3,4", "--url", served.grpc]) == 1
        assert "is it the gRPC port? explain asks the HTTP port" in capsys.readouterr().err
        for library, url in ((httpclient, served.http), (grpcclient, served.grpc)):
            tensor = library.InferInput("x", [1, 4], "FP32")
            tensor.set_data_from_numpy(X)
            with library.InferenceServerClient(url) as client:
                answer = client.infer("add_one", [tensor], parameters={"tutti_explain": True}).get_response()
                with pytest.raises(InferenceServerException, match="did you mean tutti_explain"):
                    client.infer("add_one", [tensor], parameters={"tutti_explian": True})
            text = (
                answer["parameters"]["tutti_explain"] if library is httpclient
                else answer.parameters["tutti_explain"].string_param
            )  # fmt: skip
            assert json.loads(text)["instance"] == "add_one_0"
        body = json.dumps({"x": [1, 2, 3, 4], "tutti_explain": True}).encode()
        with urllib.request.urlopen(f"http://{served.http}/v2/models/add_one/generate", body, timeout=60) as page:
            assert json.loads(json.load(page)["tutti_explain"])["rows"] == 1
    assert cli.main(["explain", "add_one", "x=[1]", "--url", served.http]) == 1
    assert "cannot be asked" in capsys.readouterr().err


@contextmanager
def speaking(*pieces: bytes) -> Iterator[str]:
    """The address of a server that says this to whoever comes, and then neither says more nor hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as open_ones:

        def speak() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = open_ones.enter_context(listening.accept()[0])
                    for piece in pieces:
                        connection.sendall(piece)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([], "has not answered within 0.2 s: it is busy, or that is no HTTP port of a server; --timeout SECONDS"),
        ([HEAD, b"{"], "has not answered within 0.2 s"),
        ([HEAD, b"[1, 2, 3]"], "the configuration's JSON does not parse"),
        ([b"hello\r\n\r\n"], "cannot be asked: hello"),
        ([b"HTTP/1.1 401 No\r\nContent-Length: 15\r\n\r\n", b'{"error": "who"}'], "(--api-key-file FILE, or --header)"),
    ],
)
def test_a_server_that_does_not_answer_is_not_waited_for(
    pieces: list[bytes], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    timeout = "0.2" if "0.2 s" in says else "60"
    with speaking(*pieces) as url:
        assert cli.main(["explain", "add_one", "x=1", "--url", url, "--timeout", timeout]) == 1
    assert says in capsys.readouterr().err


def test_a_key_is_shown_to_the_server(
    repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.add_onnx()
    keys = tmp_path / "keys"
    keys.write_text("# mine\nsecret-4711\n")
    with serving(repository.root, tmp_path / "log", "--api-key-file", str(keys), is_guarded=True) as served:
        asked = ["explain", "add_one", "x=[1,2,3,4]", "--url", served.http]
        assert cli.main(asked) == 1
        assert "an API key is needed" in capsys.readouterr().err
        assert cli.main([*asked, "--api-key-file", str(keys)]) == 0
        assert "by add_one_0" in (said := "".join(capsys.readouterr())) and "4711" not in said
        assert cli.main(["top", served.metrics, "--once", "--interval", "0.1", "--api-key-file", str(keys)]) == 0
        assert "add_one" in (said := "".join(capsys.readouterr())) and "4711" not in said


def answered(answer: Any, trace: Any = None) -> Call:
    """A call that is explained, as it is when it has its answer."""
    call = Call(ask(tutti_explain=True), Gather(1))
    call.trace = trace
    explanations.Explained(call, 1, False)
    call.finish(answer)
    assert isinstance(call.sink, Gather)
    call.sink.wait()
    return call


@pytest.mark.parametrize("own", ["yes please", "[1]", '"text"', '{"steps": 3}', 7])
def test_a_model_may_have_a_parameter_of_that_name(own: Any, tmp_path: Path) -> None:
    """Its request is answered all the same: explained, where it asked for that."""
    tracer = Tracer(TraceConfig(file=str(tmp_path / "trace"), levels=("TIMESTAMPS",), rate=1))
    traced = Call(ask(), Gather(1))
    tracer.begin(traced)
    assert traced.trace is not None
    for name, ns in (("COMPUTE_START", 1), ("COMPUTE_END", 2)):
        traced.trace.record(name, ns)
    for trace in (None, traced.trace):
        call = answered(InferResponse("add_one", "1", [], {explanations.PARAMETER: own}), trace)
        assert told(call.answer)["model"] == "add_one"


def test_an_answer_that_cannot_be_explained_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(explained: explanations.Explained) -> dict[str, Any]:
        raise RuntimeError("no explanation of this")

    monkeypatch.setattr(explanations.Explained, "found", fails)
    response, error = InferResponse("add_one", "1", []), Unavailable("full")
    assert answered(response).answer is response
    assert answered(error).answer is error


def test_a_step_may_have_a_parameter_of_that_name(repository: Repository) -> None:
    both = 'input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }'
    repository.add_python(
        "says",
        f'backend: "python" max_batch_size: 8 {both}' + IN_PROCESS,
        """
        y = pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(request, "x").as_numpy())
        return pb_utils.InferenceResponse([y], parameters={"tutti_explain": "yes please"})
        """,
    )
    maps = 'input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }'
    steps = f'step {{ model_name: "says" model_version: -1 {maps} }}'
    repository.add(
        "graph", f'platform: "ensemble" max_batch_size: 8 {both} ensemble_scheduling {{ {steps} }}', {".keep": ""}
    )
    with engine_over(repository.root) as engine:
        assert not engine.failures(), engine.failures()
        for model in ("says", "graph"):
            assert told(infer(engine, [ask(model, tutti_explain=True)])[0])["model"] == model
