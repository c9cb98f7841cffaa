"""The sample's models and a plain ensemble over them, in a real tritonserver and in tutti: the same answers."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from demo.client import Arrays, Client, as_bytes, load_items
from tests.models import plain_sample
from tests.peers import tritonserver
from tests.serving import serving
from tutti.loadtest.payloads import Payloads, TensorInfo

pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

TOLERANCE = 1e-4
ROUNDS = 12


@pytest.fixture(scope="module")
def pairs(sample_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[Client, Client]]]:
    """(tutti, tritonserver) per protocol, both over one repository."""
    tritonserver.require()
    scratch = tmp_path_factory.mktemp("triton")
    repository = plain_sample(sample_repository, scratch / "repository")
    with (
        tritonserver.running(repository, scratch) as theirs,
        serving(repository, scratch / "tutti.log") as ours,
    ):
        yield [(Client(p, getattr(ours, p)), Client(p, getattr(theirs, p))) for p in ("http", "grpc")]


def assert_same(ours: Arrays, theirs: Arrays) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        other = theirs[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape), name
        if array.dtype.kind == "f" and name != "SEGMENTS":
            assert np.abs(array - other).max(initial=0.0) <= TOLERANCE, name
            if name.endswith("_SCORES"):
                np.testing.assert_array_equal(array.argmax(-1), other.argmax(-1), name)
        else:
            np.testing.assert_array_equal(array, other, name)


def test_the_ensemble_on_the_samples(pairs: list[tuple[Client, Client]]) -> None:
    for item in load_items():
        for ours, theirs in pairs:
            assert_same(
                ours.infer("content_intelligence", item.inputs())[0],
                theirs.infer("content_intelligence", item.inputs())[0],
            )


MODELS = (
    "speech_vad", "speech_segments", "text_gate", "text_tokenizer", "text_encoder", "text_classifier", "image_decoder",
    "image_classifier", "moderation_score", "content_intelligence",
)  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_every_model_on_drawn_inputs(pairs: list[tuple[Client, Client]], model: str) -> None:
    metadata = pairs[0][0]._client.get_model_metadata(model)
    theirs_metadata = pairs[0][1]._client.get_model_metadata(model)
    for part in ("name", "versions", "inputs"):
        assert metadata[part] == theirs_metadata[part]
    infos = [TensorInfo.of(tensor) for tensor in metadata["inputs"]]
    payloads = Payloads(seed=11)
    for _ in range(ROUNDS):
        inputs = payloads.draw(infos)
        for ours, theirs in pairs:
            assert_same(ours.infer(model, inputs)[0], theirs.infer(model, inputs)[0])


def test_batches_of_several_rows(pairs: list[tuple[Client, Client]]) -> None:
    items = load_items()
    samples = min(len(item.audio) for item in items)
    inputs = {
        "AUDIO": np.stack([item.audio[:samples] for item in items]),
        "TEXT": as_bytes([item.text.encode() for item in items]),
        "IMAGE": as_bytes([item.image for item in items]),
    }
    for ours, theirs in pairs:
        assert_same(ours.infer("content_intelligence", inputs)[0], theirs.infer("content_intelligence", inputs)[0])


@pytest.mark.parametrize(
    ("model", "output"), [("image_classifier", "IMAGE_SCORES"), ("text_classifier", "LABEL_SCORES")]
)
def test_classification(pairs: list[tuple[Client, Client]], model: str, output: str) -> None:
    for ours, theirs in pairs:
        infos = [TensorInfo.of(tensor) for tensor in pairs[0][0]._client.get_model_metadata(model)["inputs"]]
        (name, array), *_ = Payloads(seed=2).draw(infos).items()
        shown = []
        for client in (ours, theirs):
            tensor = client._library.InferInput(name, list(array.shape), infos[0].datatype)
            tensor.set_data_from_numpy(array)
            wanted = client._library.InferRequestedOutput(output, class_count=3)
            top = client._client.infer(model, [tensor], outputs=[wanted]).as_numpy(output)
            shown.append([text.decode().split(":") for text in top[0]])
        assert [row[1:] for row in shown[0]] == [row[1:] for row in shown[1]]
        for ours_value, theirs_value in zip(*shown, strict=True):
            assert abs(float(ours_value[0]) - float(theirs_value[0])) <= TOLERANCE
            assert len(ours_value[0]) == len(theirs_value[0])


@pytest.mark.parametrize("mistake", ["image", "audio type", "no text"])
def test_both_refuse_the_same_mistakes(pairs: list[tuple[Client, Client]], mistake: str) -> None:
    inputs = load_items()[0].inputs()
    if mistake == "image":
        inputs["IMAGE"] = as_bytes([b"no picture"])
    elif mistake == "audio type":
        inputs["AUDIO"] = inputs["AUDIO"].astype(np.float64)
    else:
        del inputs["TEXT"]
    for pair in pairs:
        for client in pair:
            with pytest.raises(Exception, match=r"content_intelligence|image_decoder"):
                client.infer("content_intelligence", inputs)
