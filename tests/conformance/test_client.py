"""`tutti serve` on the sample repository, asked by the real tritonclient over both protocols."""

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from demo.client import Client, as_bytes, load_items
from tests.serving import Served, serving
from tutti.loadtest.payloads import Payloads, TensorInfo

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

BATCH = 4
PROTOCOLS = ("http", "grpc")


@pytest.fixture(scope="module")
def served(sample_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(sample_repository, tmp_path_factory.mktemp("serve") / "log") as server:
        yield server


def library(protocol: str) -> Any:
    return httpclient if protocol == "http" else grpcclient


def connect(served: Served, protocol: str) -> Any:
    return library(protocol).InferenceServerClient(getattr(served, protocol))


def send(served: Served, protocol: str, model: str, inputs: dict[str, np.ndarray], **options: Any) -> Any:
    tensors = []
    for name, array in inputs.items():
        tensor = library(protocol).InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    with connect(served, protocol) as client:
        return client.infer(model, tensors, **options)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_control_calls(served: Served, protocol: str) -> None:
    client = connect(served, protocol)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("content_intelligence")
    assert client.is_model_ready("content_intelligence", "1")
    as_json = {} if protocol == "http" else {"as_json": True}
    assert client.get_server_metadata(**as_json)["name"] == "tutti"
    metadata = client.get_model_metadata("content_intelligence", **as_json)
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["AUDIO", "TEXT", "IMAGE"]
    config = client.get_model_config("text_encoder", **as_json)
    assert config.get("config", config)["max_batch_size"] == 32
    index = client.get_model_repository_index(**as_json)
    assert len(index if protocol == "http" else index["models"]) == 12
    assert client.get_inference_statistics("text_encoder", **as_json)["model_stats"]
    assert not client.is_model_ready("nope")
    assert not client.is_model_ready("text_encoder", "9")
    with pytest.raises(InferenceServerException, match="unknown model: 'nope'"):
        client.get_model_metadata("nope")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_model_answers_as_its_metadata_says(served: Served, protocol: str) -> None:
    client = connect(served, "http")
    payloads = Payloads(seed=3)
    for model in client.get_model_repository_index():
        metadata = client.get_model_metadata(model["name"])
        inputs = payloads.draw([TensorInfo.of(tensor) for tensor in metadata["inputs"]])
        result = send(served, protocol, model["name"], inputs)
        for output in metadata["outputs"]:
            array = result.as_numpy(output["name"])
            assert np_to_triton_dtype(array.dtype) == output["datatype"]
            assert len(array.shape) == len(output["shape"])
            assert all(want in (-1, got) for want, got in zip(output["shape"], array.shape, strict=True))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_batch_equals_its_rows(served: Served, protocol: str) -> None:
    texts = [item.text.encode() for item in load_items()]
    together = Client(protocol, getattr(served, protocol)).infer("text_tokenizer", {"TEXT": as_bytes(texts)})[0]
    for row, text in enumerate(texts):
        alone = Client(protocol, getattr(served, protocol)).infer("text_tokenizer", {"TEXT": as_bytes([text])})[0]
        length = alone["input_ids"].shape[1]
        np.testing.assert_array_equal(together["input_ids"][row, :length], alone["input_ids"][0])


def test_http_json_binary_and_raw_requests_answer_alike(served: Served) -> None:
    item = load_items()[2]
    client = connect(served, "http")
    answers = []
    for binary in (True, False):
        tensor = httpclient.InferInput("EMBEDDING", [1, 384], "FP32")
        tensor.set_data_from_numpy(np.full((1, 384), 0.05, np.float32), binary_data=binary)
        wanted = httpclient.InferRequestedOutput("LABEL_SCORES", binary_data=binary)
        answers.append(client.infer("text_classifier", [tensor], outputs=[wanted]).as_numpy("LABEL_SCORES"))
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-6)
    raw = urllib.request.Request(
        f"http://{served.http}/v2/models/image_decoder/infer",
        data=item.image,
        headers={"Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"},
    )
    with urllib.request.urlopen(raw, timeout=20) as response:
        body = response.read()
        pixels = body[int(response.headers["Inference-Header-Content-Length"]) :]
    expected, _ = Client("http", served.http).infer("image_decoder", {"IMAGE": as_bytes([item.image])})
    assert pixels == expected["PIXELS"].tobytes()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ids_and_requested_outputs(served: Served, protocol: str) -> None:
    item = load_items()[0]
    wanted = [library(protocol).InferRequestedOutput(name) for name in ("SEGMENTS", "LABEL_SCORES")]
    result = send(served, protocol, "content_intelligence", item.inputs(), outputs=wanted, request_id="my-7")
    response = result.get_response()
    assert (response["id"] if protocol == "http" else response.id) == "my-7"
    outputs = response["outputs"] if protocol == "http" else response.outputs
    assert [o["name"] if protocol == "http" else o.name for o in outputs] == ["SEGMENTS", "LABEL_SCORES"]
    assert result.as_numpy("SEGMENTS").shape == (1, len(item.segments_s), 2)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compression_both_ways(served: Served, coding: str) -> None:
    plain = send(served, "http", "content_intelligence", GOOD)
    packed = send(
        served, "http", "content_intelligence", GOOD,
        request_compression_algorithm=coding, response_compression_algorithm=coding,
    )  # fmt: skip
    np.testing.assert_array_equal(packed.as_numpy("SPEECH_PROBS"), plain.as_numpy("SPEECH_PROBS"))
    if coding == "gzip":  # the gRPC front knows no deflate
        grpc = send(served, "grpc", "content_intelligence", GOOD, compression_algorithm=coding)
        np.testing.assert_array_equal(grpc.as_numpy("SPEECH_PROBS"), plain.as_numpy("SPEECH_PROBS"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_classification(served: Served, protocol: str) -> None:
    wanted = [library(protocol).InferRequestedOutput("IMAGE_SCORES", class_count=2)]
    result = send(served, protocol, "content_intelligence", GOOD, outputs=wanted)
    top = result.as_numpy("IMAGE_SCORES")
    assert top.shape == (1, 2)
    _, index, label = top[0, 0].decode().split(":")
    assert int(index) == int(label) == load_items()[1].digit


GOOD = load_items()[1].inputs()
BAD = {
    "wrong dtype": (
        {**GOOD, "AUDIO": GOOD["AUDIO"].astype(np.float64)},
        "data-type is 'FP64', but model '.*' expects 'FP32'",
    ),
    "wrong shape": (
        {**GOOD, "TEXT": np.array([[b"a", b"b"]], dtype=object)},
        r"Expected \[-1,1\], got \[1,2\]",
    ),
    "unknown tensor": ({**GOOD, "VIDEO": GOOD["TEXT"]}, r"(unexpected inference input 'VIDEO'|got 4 inputs)"),
    "undecodable image": (
        {**GOOD, "IMAGE": as_bytes([b"not a picture"])},
        "step 'image_decoder'.*expected JPEG or PNG",
    ),
    "truncated image": ({**GOOD, "IMAGE": as_bytes([GOOD["IMAGE"][0, 0][:200]])}, "step 'image_decoder'.*'IMAGE'"),
    "empty image": ({**GOOD, "IMAGE": as_bytes([b""])}, "step 'image_decoder'.*got no bytes"),
    "empty audio": ({**GOOD, "AUDIO": np.zeros((1, 0), np.float32)}, "step 'speech_vad'.*'AUDIO' is empty"),
    "not text": ({**GOOD, "TEXT": as_bytes([b"\xff\xfe"])}, "step 'text_gate'.*UTF-8"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("mistake", BAD)
def test_bad_input_is_told_what_is_wrong_and_its_neighbours_succeed(
    served: Served, protocol: str, mistake: str
) -> None:
    inputs, says = BAD[mistake]
    with ThreadPoolExecutor(9) as pool:
        good = [pool.submit(send, served, protocol, "content_intelligence", GOOD) for _ in range(4)]
        bad = pool.submit(send, served, protocol, "content_intelligence", inputs)
        good += [pool.submit(send, served, protocol, "content_intelligence", GOOD) for _ in range(4)]
        with pytest.raises(InferenceServerException, match=says) as caught:
            bad.result()
        assert "content_intelligence" in str(caught.value)
        for future in good:
            assert int(future.result().as_numpy("IMAGE_SCORES").argmax()) == load_items()[1].digit


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unknown_model_and_version(served: Served, protocol: str) -> None:
    with pytest.raises(InferenceServerException, match="unknown model: 'nope'"):
        send(served, protocol, "nope", GOOD)
    with pytest.raises(InferenceServerException, match=r"missing required input\(s\) \['EMBEDDING'\]"):
        send(served, protocol, "text_classifier", {})
    with pytest.raises(InferenceServerException, match="version 9 is not found"):
        send(served, protocol, "content_intelligence", GOOD, model_version="9")


def test_a_truncated_http_body(served: Served) -> None:
    header = (
        b'{"inputs":[{"name":"EMBEDDING","shape":[1,384],"datatype":"FP32","parameters":{"binary_data_size":1536}}]}'
    )
    request = urllib.request.Request(
        f"http://{served.http}/v2/models/text_classifier/infer",
        data=header + b"\0" * 100,
        headers={"Inference-Header-Content-Length": str(len(header))},
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    assert caught.value.code == 400
    assert b"input 'EMBEDDING': expected 1536 bytes of binary data, only 100 are left" in caught.value.read()


def test_metrics_count_what_was_served(served: Served) -> None:
    def count() -> float:
        with urllib.request.urlopen(f"http://{served.metrics}/metrics", timeout=20) as page:
            lines = page.read().decode().splitlines()
        wanted = 'nv_inference_request_success{model="text_tokenizer",version="1"}'
        return float(next(line for line in lines if line.startswith(wanted)).split()[-1])

    before = count()
    send(served, "grpc", "text_tokenizer", {"TEXT": GOOD["TEXT"]})
    assert count() == before + 1


def test_large_tensors_both_ways(served: Served) -> None:
    """Ten minutes of audio: 38 MB in one request."""
    audio = np.tile(GOOD["AUDIO"], (1, 24))[:, : 16_000 * 600]
    frames = -(-audio.shape[1] // 512)
    for protocol in PROTOCOLS:
        result = send(served, protocol, "speech_vad", {"AUDIO": audio})
        assert result.as_numpy("SPEECH_PROBS").shape == (1, frames)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_load_and_unload(sample_repository: Path, tmp_path: Path, protocol: str) -> None:
    flags = ("--model-control-mode", "explicit", "--load-model", "text_tokenizer")
    with serving(sample_repository, tmp_path / "log", *flags) as own:
        client = connect(own, protocol)
        assert client.is_model_ready("text_tokenizer")
        with pytest.raises(InferenceServerException, match="image_decoder"):
            send(own, protocol, "image_decoder", {"IMAGE": GOOD["IMAGE"]})
        client.load_model("image_decoder")
        assert client.is_model_ready("image_decoder")
        assert send(own, protocol, "image_decoder", {"IMAGE": GOOD["IMAGE"]}).as_numpy("PIXELS").shape == (1, 3, 32, 32)
        client.unload_model("image_decoder")
        with pytest.raises(InferenceServerException, match="not ready"):
            send(own, protocol, "image_decoder", {"IMAGE": GOOD["IMAGE"]})
        with pytest.raises(InferenceServerException, match="failed to load 'nowhere'"):
            client.load_model("nowhere")
        with pytest.raises(InferenceServerException, match="failed to load 'image_decoder'"):
            client.load_model("image_decoder", config="{}")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_model_control_is_off_by_default(served: Served, protocol: str) -> None:
    for change in ("load_model", "unload_model"):
        with pytest.raises(InferenceServerException, match="not allowed"):
            getattr(connect(served, protocol), change)("text_tokenizer")
    assert connect(served, protocol).is_model_ready("text_tokenizer")


SPEECH = {"SPEECH_PROBS", "SEGMENTS", "SEGMENT_LEVELS"}
ALWAYS = {"EMBEDDING", "LABEL_SCORES", "MODERATION_SCORE"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("names", "made"),
    [
        (("AUDIO",), SPEECH | ALWAYS),
        (("TEXT",), {"TEXT_RISK"} | ALWAYS),
        (("IMAGE",), {"IMAGE_SCORES"} | ALWAYS),
        (("TEXT", "IMAGE"), {"TEXT_RISK", "IMAGE_SCORES"} | ALWAYS),
    ],
)
def test_the_ensemble_takes_what_an_item_has(
    served: Served, protocol: str, names: tuple[str, ...], made: set[str]
) -> None:
    item = load_items()[3]
    client = Client(protocol, getattr(served, protocol))
    whole, _ = client.infer("content_intelligence", item.inputs())
    part, _ = client.infer("content_intelligence", {name: item.inputs()[name] for name in names})
    assert part.keys() == made
    for name in made - ALWAYS:
        np.testing.assert_allclose(part[name], whole[name], atol=1e-4, err_msg=name)
    assert part["LABEL_SCORES"].any() == ("TEXT" in names)
    assert 0 <= part["MODERATION_SCORE"][0, 0] <= 1
    assert whole["SEGMENT_LEVELS"].shape == (1, len(item.segments_s), 1)
    assert (whole["SEGMENT_LEVELS"] < 0).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_text_that_needs_no_closer_look_costs_no_encoder(served: Served, protocol: str) -> None:
    client = Client(protocol, getattr(served, protocol))
    counts = connect(served, "http").get_inference_statistics("text_encoder")["model_stats"][0]["inference_count"]
    answer, _ = client.infer(
        "content_intelligence", {"TEXT": as_bytes([b"The train leaves at noon from the old station"])}
    )
    after = connect(served, "http").get_inference_statistics("text_encoder")["model_stats"][0]["inference_count"]
    assert (answer["TEXT_RISK"] <= 0.2).all()
    assert after == counts
    assert not answer["EMBEDDING"].any()
    np.testing.assert_allclose(answer["MODERATION_SCORE"], answer["TEXT_RISK"], atol=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_request_may_ask_what_happened(served: Served, protocol: str) -> None:
    item = load_items()[0]
    text = {"TEXT": item.inputs()["TEXT"]}
    result = send(served, protocol, "content_intelligence", text, parameters={"tutti_explain": True})
    response = result.get_response()
    told = json.loads(
        response["parameters"]["tutti_explain"] if protocol == "http"
        else response.parameters["tutti_explain"].string_param
    )  # fmt: skip
    by_step = {step["step"]: step for step in told["steps"]}
    assert by_step["text_gate"]["rows"] == 1
    assert by_step["image_decoder"]["skipped"] == "IMAGE: not given or made"
