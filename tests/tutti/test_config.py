"""config.pbtxt: what is read, and that everything else is refused with its path."""

import json
import re
from pathlib import Path

import pytest

from tests.models import Repository
from tutti.backends import completion
from tutti.core.errors import ConfigError
from tutti.repository import config, folders, model_config

TENSORS = """
    input { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] }
    output { name: "y" data_type: TYPE_STRING dims: 2 }
"""

ENSEMBLE = (
    TENSORS
    + """
    platform: "ensemble"
    ensemble_scheduling { step { model_name: "a" model_version: -1
      input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }
"""
)


def parse(text: str) -> model_config.ModelConfig:
    return config.parse(text, "m")


def test_a_full_configuration() -> None:
    model = parse(
        f"""
        backend: "onnxruntime" max_batch_size: 8 {TENSORS}
        dynamic_batching {{
          preferred_batch_size: [ 8, 4 ] max_queue_delay_microseconds: 250
          default_queue_policy {{ max_queue_size: 7 }}
        }}
        instance_group {{ kind: KIND_CPU count: 2 }}
        version_policy {{ latest {{ num_versions: 3 }} }}
        parameters {{ key: "a" value {{ string_value: "b" }} }}
        """
    )
    assert model.name == "m"
    assert model.inputs[0] == model_config.TensorSpec("x", "FP32", (-1, 3))
    assert model.outputs[0].datatype == "BYTES"
    assert model.batching is not None
    assert model.batching.preferred_batch_sizes == (4, 8)
    assert model.batching.max_queue_delay_ns == 250_000
    assert model.max_queued_rows == 7
    assert model.instance_groups == (model_config.InstanceGroup("cpu", 2),)
    assert model.version_policy.select([1, 2, 3, 4]) == [2, 3, 4]
    assert model.parameters["a"] == "b"
    assert model.wire_shape(model.inputs[0]) == (-1, -1, 3)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('backend: "b" max_batch_size: -3' + TENSORS, "max_batch_size"),
        ('name: "other" backend: "b"' + TENSORS, "name"),
        ('backend: "b" output { name: "y" data_type: TYPE_FP32 dims: 1 }', "input"),
        (TENSORS, "backend"),
        ('backend: "b" dynamic_batching {}' + TENSORS, "dynamic_batching"),
        ('backend: "b" sequence_batching { iterative_sequence: true }' + TENSORS, "iterative_sequence"),
        (
            'backend: "b" sequence_batching { control_input { name: "S" control { kind: CONTROL_SEQUENCE_START } } }'
            + TENSORS,
            "sequence_batching.control_input[0].control[0]",
        ),
        (
            'backend: "b" max_batch_size: 2 dynamic_batching {} sequence_batching {}' + TENSORS,
            "sequence_batching",
        ),
        (
            'backend: "b" response_cache { enable: true } model_transaction_policy { decoupled: true }' + TENSORS,
            "response_cache.enable",
        ),
        (
            'backend: "b" model_warmup { name: "w" inputs { key: "nope" value { zero_data: true } } }' + TENSORS,
            "model_warmup[0].inputs['nope']",
        ),
        (
            'backend: "b" batch_input { kind: BATCH_ACCUMULATED_ELEMENT_COUNT }' + TENSORS,
            "batch_input[0].source_input",
        ),
        ('backend: "b" instance_group { passive: true }' + TENSORS, "instance_group.passive"),
        ('backend: "b" instance_group { kind: KIND_MODEL }' + TENSORS, "instance_group[0].kind"),
        (
            'backend: "b" max_batch_size: 4 dynamic_batching { preferred_batch_size: 9 }' + TENSORS,
            "dynamic_batching.preferred_batch_size",
        ),
        (
            'backend: "b" max_batch_size: 4 dynamic_batching { priority_levels: 2 }' + TENSORS,
            "dynamic_batching.default_priority_level",
        ),
        (
            'backend: "b" input { name: "x" data_type: TYPE_FP32 dims: 0 } output { name: "y" data_type: TYPE_FP32 }',
            "input[0].dims",
        ),
        ('backend: "b" input { name: "x" dims: 1 } output { name: "y" data_type: TYPE_FP32 }', "input[0].data_type"),
        (
            'backend: "b" input { name: "z" data_type: TYPE_INT8 dims: 4 reshape { shape: 3 } }' + TENSORS,
            "input[0].reshape.shape",
        ),
        ("this is not a configuration", "does not parse"),
        (ENSEMBLE + "instance_group { count: 2 }", "instance_group"),
        (ENSEMBLE + "optimization { priority: PRIORITY_MAX }", "optimization"),
        (ENSEMBLE + 'model_warmup { name: "w" }', "model_warmup"),
    ],
)
def test_what_is_wrong_or_not_supported_is_refused_with_its_path(text: str, path: str) -> None:
    with pytest.raises(ConfigError, match="model 'm'") as caught:
        parse(text)
    assert path in str(caught.value)


def test_version_policies() -> None:
    assert parse('backend: "b"' + TENSORS).version_policy.select([1, 10, 9]) == [10]
    every = parse('backend: "b" version_policy { all {} }' + TENSORS).version_policy
    assert every.select([3, 1]) == [1, 3]
    some = parse('backend: "b" version_policy { specific { versions: [ 1, 7 ] } }' + TENSORS).version_policy
    assert some.select([1, 2, 3]) == [1]


SAMPLE = sorted((Path(__file__).parents[2] / "model_repository").glob("*/config.pbtxt"))
ALTERNATIVES = """
    backend: "python" max_batch_size: 2
    model_warmup {
      name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 1, 3 ] zero_data: true } }
    }
    sequence_batching {
      state {
        input_name: "s" output_name: "t" data_type: TYPE_FP32 dims: 1
        initial_state { name: "i" data_type: TYPE_FP32 dims: 1 data_file: "f" }
      }
    }
"""


def test_what_clients_get_they_can_load() -> None:
    """Of alternatives, as the data of a warm-up, only the one that is set may be there."""
    assert len(SAMPLE) > 10
    for name, text in [("m", ALTERNATIVES + TENSORS), *((path.parent.name, path.read_text()) for path in SAMPLE)]:
        proto = config.parse(text, name).proto
        assert config.parse_json(json.dumps(config.as_json(proto)), name).proto == proto
    assert config.as_json(parse(ALTERNATIVES + TENSORS).proto)["model_warmup"][0]["inputs"]["x"] == {
        "data_type": "TYPE_FP32", "dims": [1, 3], "zero_data": True,
    }  # fmt: skip


def test_as_json_keeps_numbers_numbers_and_leaves_unset_messages_out() -> None:
    shown = config.as_json(parse('backend: "b" max_batch_size: 2' + TENSORS).proto)
    assert shown["input"][0]["dims"] == [-1, 3]
    assert shown["input"][0]["data_type"] == "TYPE_FP32"
    assert "dynamic_batching" not in shown


def test_the_repository_lists_model_folders_only(repository: Repository, tmp_path: Path) -> None:
    repository.add_onnx()
    (repository.root / "no_config").mkdir()
    (repository.root / ".hidden").mkdir()
    assert repository_names(repository.root) == ["add_one"]
    with pytest.raises(ConfigError, match="not a folder"):
        repository_names(tmp_path / "nowhere")


def repository_names(root: Path) -> list[str]:
    return folders.model_names(root)


@pytest.mark.parametrize("name", ["../outside", "a/b", "", ".hidden", "-x"])
def test_names_that_leave_the_repository_are_refused(repository: Repository, name: str) -> None:
    with pytest.raises(ConfigError):
        completion.open_model(repository.root, name)


def test_a_model_without_versions_is_refused(repository: Repository) -> None:
    repository.add_onnx()
    (repository.root / "add_one" / "1").rename(repository.root / "add_one" / "v1")
    with pytest.raises(ConfigError, match="no version folder"):
        completion.open_model(repository.root, "add_one")


def test_a_label_file_outside_the_folder_is_refused(repository: Repository) -> None:
    repository.add_onnx()
    path = repository.root / "add_one" / "config.pbtxt"
    path.write_text(path.read_text().replace("output {", 'output { label_filename: "../../secret" '))
    with pytest.raises(ConfigError, match="label_filename"):
        completion.open_model(repository.root, "add_one").labels()


def test_an_onnx_model_needs_no_configuration(repository: Repository) -> None:
    from tests.models import onnx_gather

    folder = repository.root / "bare" / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(onnx_gather())
    assert repository_names(repository.root) == ["bare"]
    model = completion.open_model(repository.root, "bare").config
    assert (model.backend, model.max_batch_size, model.batching is not None) == ("onnxruntime", 4, True)
    assert model.inputs == (model_config.TensorSpec("ids", "INT64", (-1,)),)
    assert model.outputs == (model_config.TensorSpec("y", "FP32", (-1,)),)


@pytest.mark.parametrize(("given", "batch", "dims"), [("max_batch_size: 16", 16, (4,)), ("", 4, (4,))])
def test_a_partial_configuration_is_completed(repository: Repository, given: str, batch: int, dims: tuple) -> None:
    from tests.models import onnx_add_one

    repository.add("partial", f'platform: "onnxruntime_onnx" {given}', {"model.onnx": onnx_add_one()})
    model = completion.open_model(repository.root, "partial").config
    assert model.max_batch_size == batch
    assert model.inputs[0].dims == model.outputs[0].dims == dims


def test_a_graph_that_cannot_be_read_is_named(repository: Repository) -> None:
    repository.add("broken", 'backend: "onnxruntime"', {"model.onnx": b"not a graph"})
    with pytest.raises(ConfigError, match="model 'broken': onnxruntime cannot load"):
        completion.open_model(repository.root, "broken")


SPEC = {"name": "x", "data_type": "TYPE_FP32", "dims": [-1]}
WHOLE: dict[str, object] = {
    "backend": "python",
    "max_batch_size": 8,
    "input": [SPEC],
    "output": [{**SPEC, "name": "y"}],
    "instance_group": [{"count": 2, "kind": "KIND_CPU"}],
    "version_policy": {"specific": {"versions": [3]}},
    "dynamic_batching": {"preferred_batch_size": [4]},
    "model_warmup": [{"name": "w", "inputs": {"x": {"data_type": "TYPE_FP32", "dims": [2], "zero_data": True}}}],
    "parameters": {"a": {"string_value": "b"}},
}


def without_brackets(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_brackets(part) for key, part in value.items()}
    return without_brackets(value[0]) if isinstance(value, list) else value


def test_a_list_of_one_needs_no_brackets_in_json() -> None:
    """Triton's own tests and many clients write configurations so."""
    whole, short = (config.parse_json(json.dumps(value), "m") for value in (WHOLE, without_brackets(WHOLE)))
    assert short.proto == whole.proto
    assert short.inputs[0].dims == (-1,)
    camel = {"maxBatchSize": 4, **{k: v for k, v in WHOLE.items() if k not in ("max_batch_size", "dynamic_batching")}}
    camel["input"] = {"name": "x", "dataType": "TYPE_FP32", "dims": "-1"}
    assert config.parse_json(json.dumps(camel), "m").max_batch_size == 4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "expected an object"),
        ('"x"', "expected an object"),
        ("", "expected an object"),
        ("{", "does not parse"),
        ('{"input": {"name": "a"}, "input": {"name": "b"}}', "duplicate key 'input'"),
        ('{"input": {"nosuch": 1}}', 'no field named "nosuch"'),
        (
            '{"parameters": {"key": "EXECUTION_ENV_PATH", "value": {"string_value": "p"}}}',
            "parameters: expected ModelParameter objects by name, got 'EXECUTION_ENV_PATH' as 'key'",
        ),
    ],
)
def test_json_that_is_no_configuration_is_told_by_what_is_wrong(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        config.parse_json(text, "m")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "max_batchsize: 8",
            "'dense': config.pbtxt does not parse: 1:1 : Message type \"inference.ModelConfig\" has no ",
        ),
        ("max_batchsize: 8", 'has no field named "max_batchsize"; did you mean max_batch_size?'),
        ("input { data_type: FP32 }", "has no value named FP32; did you mean TYPE_FP32?"),
        ("ensemble_scheduling { step { inputmap { } } }", 'named "inputmap"; did you mean input_map?'),
        ("zzzzzz: 8", 'has no field named "zzzzzz".'),
    ],
)
def test_a_field_that_is_misspelt_is_told_with_the_one_that_was_meant(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse(text, "dense")
    assert told in str(error.value)
