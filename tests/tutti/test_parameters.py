"""Parameters that nobody reads are refused, as fields are; and folders with names that need a second look."""

from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from tests.models import Repository
from tests.serving import engine_over, infer, serving
from tests.tutti.test_model_config import x, y
from tutti.core.errors import ConfigError
from tutti.repository import unserved
from tutti.repository.folders import check_name, model_names


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("intra_op_thread_count", "1", ""),
        ("execution_mode", "1", ""),
        ("execution_mode", "2", "parameters.execution_mode: expected '0' or '1', got '2'"),
        ("enable_mem_arena", "false", ""),
        ("enable_mem_pattern", "maybe", "parameters.enable_mem_pattern: expected true or false, got 'maybe'"),
        ("session.use_env_allocators", "1", ""),
        ("tutti.latency_ms", "1:0.1", ""),
        ("tutti.latency_m", "1:0.1", "parameters.tutti.latency_m: the onnxruntime backend does not read it"),
        ("intra_op_threads", "1", "parameters.intra_op_threads: the onnxruntime backend does not read it"),
        ("INFERENCE_MODE", "true", "parameters.INFERENCE_MODE: the onnxruntime backend does not read it"),
    ],
)
def test_a_parameter_is_honoured_or_refused(repository: Repository, key: str, value: str, why: str) -> None:
    repository.add_onnx("m", extra="dynamic_batching {} " + parameter(key, value))
    with engine_over(repository.root) as engine:
        told = " ".join(engine.failures())
        assert (why in told) if why else not told, told
        if not why:
            assert y(infer(engine, [x("m", 1, 2, 3, 4)])[0]) == [2, 3, 4, 5]


def test_an_ensembles_parameters_are_its_own(repository: Repository) -> None:
    repository.add_onnx("m")
    repository.add(
        "e",
        """
        platform: "ensemble" max_batch_size: 8
        input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }
        ensemble_scheduling { step { model_name: "m" model_version: -1
            input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }
        """
        + parameter("timeout", "5"),
        {},
    )
    with engine_over(repository.root) as engine:
        assert "parameters.timeout: an ensemble reads those of tutti only" in " ".join(engine.failures())


def test_a_name_may_have_spaces_and_letters_of_any_language(repository: Repository, tmp_path: Path) -> None:
    names = ["my model", "größe", "模型", "a+b@c"]
    for name in names:
        repository.add_onnx(name)
    with serving(repository.root, tmp_path / "log") as served:
        array = np.ones((1, 4), np.float32)
        for library, address in ((tritonclient.grpc, served.grpc), (tritonclient.http, served.http)):
            client = library.InferenceServerClient(address)
            given = library.InferInput("x", [1, 4], "FP32")
            given.set_data_from_numpy(array)
            for name in names:
                assert client.infer(name, [given]).as_numpy("y").tolist() == [[2, 2, 2, 2]]
            client.close()


def test_a_folder_that_cannot_be_a_model_is_named(repository: Repository) -> None:
    repository.add_onnx("m")
    (repository.root / "m").rename(repository.root / "two\nlines")
    assert model_names(repository.root) == []
    assert unserved.unserved(repository.root) == [r"folder 'two\nlines' is not served: that is no valid model name"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", " a", "a\n", "\x00", ".git", "\ud800", "a" * 256])
def test_what_leaves_the_repository_or_a_line_is_no_name(name: str) -> None:
    with pytest.raises(ConfigError, match="not a valid model name"):
        check_name(name)


def test_a_parameter_of_nvidias_quick_start_is_told_and_loaded(
    repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    repository.add_onnx("m", extra=parameter("execute_delay_ms", "3"))
    with engine_over(repository.root) as engine:
        assert not engine.failures()
    assert "model 'm': parameters.execute_delay_ms: no backend of Triton's or of ours reads it" in caplog.messages
