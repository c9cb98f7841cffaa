"""What graphs say about the values of their integer inputs, and that what is published is held to it."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn import functional as F

from tests.export import checkpoints
from tests.serving import Served, serving
from tutti.export import indices, pipeline, whisper
from tutti.export import onnx as to_onnx
from tutti.export.graphs import Graph, Product
from tutti.export.sources import resolve
from tutti.export.variants import Builder
from tutti.repository import config
from tutti.repository.value_bounds import Range

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = 10
Made = Callable[["Table", torch.Tensor], torch.Tensor]


class Table(torch.nn.Module):
    """A table [10, 4], and what `made` does with it and with ids [batch, 5]."""

    def __init__(self, made: Made) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.few = torch.nn.Parameter(torch.randn(ROWS, 4)), torch.nn.Parameter(torch.randn(3, 4))
        self._made = made

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._made(self, ids)


def saved(module: torch.nn.Module, folder: Path, **example: torch.Tensor) -> Path:
    path = folder / "model.onnx"
    given = example or {"ids": torch.randint(0, 3, (2, 5))}
    to_onnx.save(module.eval(), path, given, ["y"], {name: {0: "batch"} for name in given})
    return path


def rows_of(one: Table, ids: torch.Tensor) -> torch.Tensor:
    return F.embedding(ids, one.table)


PLAIN: dict[str, Made] = {
    "embedding": rows_of,
    "index": lambda one, ids: one.table[ids],
    "index_select": lambda one, ids: one.table.index_select(0, ids.reshape(-1)),
    "gather": lambda one, ids: (
        one.table.T.unsqueeze(0).expand(ids.shape[0], -1, -1).gather(2, ids.unsqueeze(1).expand(-1, 4, -1))
    ),
    "scatter": lambda one, ids: torch.zeros(ids.shape[0], ROWS).scatter(1, ids, 1.0),
    "cast": lambda one, ids: rows_of(one, ids.to(torch.int32)),
    "flattened": lambda one, ids: rows_of(one, ids.reshape(-1).unsqueeze(1)),
    "turned": lambda one, ids: rows_of(one, ids.T.flip(0)),
    "joined": lambda one, ids: rows_of(one, torch.cat([torch.zeros_like(ids[:, :1]), ids], 1)),
    "in the smaller one too": lambda one, ids: rows_of(one, ids) + F.embedding(ids, torch.zeros(99, 4)),
    "and added to": lambda one, ids: rows_of(one, ids) + ids.sum(),
    "a column": lambda one, ids: rows_of(one, ids[:, 1]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_moved_and_indexes_a_table_is_bounded_by_it(name: str, tmp_path: Path) -> None:
    found = indices.find(saved(Table(PLAIN[name]), tmp_path))
    assert found == indices.Found({"ids": (0, ROWS - 1)}, [])


@pytest.mark.parametrize(
    ("made", "high"),
    [
        (lambda one, ids: rows_of(one, ids) + F.embedding(ids, one.few), 2),
        (lambda one, ids: one.table[ids, ids], 3),
        (lambda one, ids: one.table[:, ids], 3),
        (lambda one, ids: one.table[ids, torch.zeros_like(ids)], 9),
        (lambda one, ids: one.table[torch.zeros_like(ids), ids], 3),
    ],
)
def test_the_smallest_axis_counts(made: Made, high: int, tmp_path: Path) -> None:
    assert indices.find(saved(Table(made), tmp_path)).bounds == {"ids": (0, high)}


@pytest.mark.parametrize(
    ("made", "through"),
    [
        (lambda one, ids: rows_of(one, ids + 1), "Add"),
        (lambda one, ids: rows_of(one, ids.clamp(0, 9)), "Clip"),
        (lambda one, ids: rows_of(one, ids % 10), "Mod"),
        (lambda one, ids: rows_of(one, ids.float().long()), "Cast"),
        (lambda one, ids: rows_of(one, ids.masked_fill(ids == -100, 0)), "Where"),
        (lambda one, ids: rows_of(one, ids.ne(1).cumsum(1)), "Equal"),
        (lambda one, ids: rows_of(one, ids.argmax(1)), "ArgMax"),
    ],
)
def test_arithmetic_is_not_guessed_at_but_told(
    made: Made, through: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = indices.find(saved(Table(made), tmp_path))
    assert found.bounds == {}
    assert any(
        "input 'ids' reaches the indices of Gather" in one and f"through {through}" in one for one in found.unclear
    )
    assert all(one in caplog.text for one in found.unclear)


def test_direct_uses_count_beside_arithmetic(tmp_path: Path) -> None:
    """As in RoBERTa: ids are rows of the words' table, and places follow from where there is padding."""
    made: Made = lambda one, ids: rows_of(one, ids) + F.embedding(ids.ne(1).cumsum(1), one.table)  # noqa: E731
    found = indices.find(saved(Table(made), tmp_path))
    assert found.bounds == {"ids": (0, ROWS - 1)}
    assert len(found.unclear) == 1


@pytest.mark.parametrize(
    "made",
    [
        lambda one, ids: rows_of(one, ids[:, 0]) + F.embedding(ids[:, 1], one.few),
        lambda one, ids: rows_of(one, ids[:, 0]) * ids[:, 1:2],
        lambda one, ids: one.table[ids[:, 0], ids[:, 1]],
    ],
)
def test_parts_that_mean_different_things_have_no_bounds_in_common(made: Made, tmp_path: Path) -> None:
    found = indices.find(saved(Table(made), tmp_path))
    assert found.bounds == {}
    assert "parts of it index tables of" in found.unclear[0]


def test_what_no_table_is_indexed_by_has_no_bounds(tmp_path: Path) -> None:
    one_hot: Made = lambda one, ids: F.one_hot(ids, ROWS).float() @ one.table  # noqa: E731
    assert indices.find(saved(Table(one_hot), tmp_path)) == indices.Found({}, [])


def graph_of(node: Any, table: Any, kind: int = TensorProto.INT64, shape: Any = ("batch", 3)) -> Any:
    ids = helper.make_tensor_value_info("ids", kind, list(shape))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    inputs, constants = ([ids, table], []) if isinstance(table, onnx.ValueInfoProto) else ([ids], [table])
    return helper.make_graph([node], "g", inputs, [y], constants)


def find(graph: Any, folder: Path) -> indices.Found:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return indices.find(path)


def weights(*dims: int) -> Any:
    return helper.make_tensor("table", TensorProto.FLOAT, dims, np.zeros(dims).ravel())


@pytest.mark.parametrize(("kind", "high"), [("UINT8", 255), ("INT8", 127), ("INT16", 299), ("INT64", 299)])
def test_bounds_are_values_of_the_datatype(kind: str, high: int, tmp_path: Path) -> None:
    """Gather takes 32 and 64 bits: smaller ones are cast to them."""
    number = getattr(TensorProto, kind)
    graph = graph_of(helper.make_node("Gather", ["table", "wide"], ["y"]), weights(300), number)
    graph.node.insert(0, helper.make_node("Cast", ["ids"], ["wide"], to=TensorProto.INT64))
    assert find(graph, tmp_path).bounds == {"ids": (0, high)}


def test_an_axis_whose_size_varies_gives_no_bounds(tmp_path: Path) -> None:
    table = helper.make_tensor_value_info("table", TensorProto.FLOAT, ["batch", "time", 7])
    node = helper.make_node("GatherND", ["table", "ids"], ["y"], batch_dims=1)
    found = find(graph_of(node, table, shape=("batch", 1)), tmp_path)
    assert found.bounds == {}
    assert "indexes an axis of GatherND '' whose size varies" in found.unclear[0]
    node = helper.make_node("Gather", ["table", "ids"], ["y"], axis=-1)
    assert find(graph_of(node, table), tmp_path).bounds == {"ids": (0, 6)}, "of its other axes one is known"


def test_nested_graphs_are_looked_into(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["z"])],
        "branch", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )  # fmt: skip
    graph = graph_of(helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch), weights(6))
    graph.input.append(helper.make_tensor_value_info("yes", TensorProto.BOOL, []))
    assert find(graph, tmp_path).bounds == {"ids": (0, 5)}


def test_what_a_loop_takes_is_told(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Gather", ["table", "i"], ["o"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, [3])],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, [3])],
    )  # fmt: skip
    node = helper.make_node("Scan", ["ids"], ["y"], body=body, num_scan_inputs=1)
    found = find(graph_of(node, weights(6)), tmp_path)
    assert found.bounds == {}
    assert "input 'ids' reaches the indices of Gather '' through Scan" in found.unclear[0]


def test_functions_are_looked_into(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    body = [helper.make_node("Gather", ["t", "i"], ["o"])]
    function = helper.make_function("own", "Look", ["t", "i"], ["o"], body, opsets)
    graph = graph_of(helper.make_node("Look", ["table", "ids"], ["y"], domain="own"), weights(6))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=[function])
    onnx.save(model, str(tmp_path / "model.onnx"))
    assert indices.find(tmp_path / "model.onnx").bounds == {"ids": (0, 5)}


# What is published

VOCABULARY, KINDS = 50, 3


class Bert(torch.nn.Module):
    """A model with random weights, and with the inputs that checkpoints of its kind have."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        self.model = BertModel(BertConfig(vocab_size=VOCABULARY, type_vocab_size=KINDS, **shape)).eval()

    def forward(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        return self.model(input_ids, attention_mask, token_type_ids).last_hidden_state[:, 0]


def bert() -> Graph:
    highest = {"input_ids": VOCABULARY, "token_type_ids": KINDS, "attention_mask": 2}
    rng = np.random.default_rng(0)

    def case(*shape: int) -> dict[str, Any]:
        made = {name: rng.integers(0, high, shape) for name, high in highest.items()}
        made["attention_mask"][:, 0] = 1
        return made

    example = {name: torch.from_numpy(array) for name, array in case(2, 6).items()}
    axes: Mapping[int, str] = {0: "batch", 1: "length"}
    return Graph(
        "bert", Bert(), example, ("FIRST",), dict.fromkeys(example, axes), [case(1, 4), case(3, 9)],
        dict.fromkeys(example, ((1, 4), (2, 8), (8, 16))), max_batch_size=8,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["onnxruntime", "pytorch"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "work").mkdir()
    options = pipeline.Options(("fp32", "fp16", "torch"), request.param, gpu="fp16")
    repository = folder / "models"
    pipeline.run(Product([bert()]), resolve("config:bert"), "bert", repository, options, folder / "work")
    model = config.load(repository / "bert" / "config.pbtxt")
    assert model.backend == request.param
    assert model.bounds.ranges == {
        "input_ids": Range("INT64", 0, VOCABULARY - 1),
        "token_type_ids": Range("INT64", 0, KINDS - 1),
    }, "and a mask may be anything"
    with serving(repository, folder / "log") as one:
        yield one


def ask(served: Served, **given: list[int]) -> tuple[int, str]:
    inputs = {"input_ids": [1, 2, 3], "token_type_ids": [0, 0, 0], "attention_mask": [1, 1, 1], **given}
    tensors = [{"name": k, "datatype": "INT64", "shape": [1, len(v)], "data": v} for k, v in inputs.items()]
    request = urllib.request.Request(
        f"http://{served.http}/v2/models/bert/infer", json.dumps({"inputs": tensors}).encode()
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert np.isfinite(json.load(answer)["outputs"][0]["data"]).all()
            return answer.status, ""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["error"]


def test_the_last_row_is_answered_and_the_one_behind_it_refused(served: Served) -> None:
    for name, rows in (("input_ids", VOCABULARY), ("token_type_ids", KINDS)):
        assert ask(served, **{name: [0, rows - 1, 0]}) == (200, "")
        for value in (rows, -1, 2**40, -(2**63)):
            what = f"model 'bert': input '{name}': expected values from 0 to {rows - 1}, got {value} at [0, 2]"
            assert ask(served, **{name: [0, 0, value]}) == (400, what)
    assert ask(served, attention_mask=[1, 7, -3]) == (200, ""), "what indexes nothing is not looked at"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Any], Builder, int]:
    folder = tmp_path_factory.mktemp("whisper")
    speech = whisper.load(str(checkpoints.whisper(folder / "checkpoint", encoder_layers=1, decoder_layers=1)))
    said = whisper.rules(speech, "", "transcribe")
    builder = Builder(whisper._decoder_graph(whisper.Decoder(speech.model).eval(), "m", speech, said), folder)
    builder.make("fp32")
    return said, builder, speech.model.config.vocab_size


def test_whispers_decoder_takes_ids_of_its_vocabulary(decoder: tuple[Mapping[str, Any], Builder, int]) -> None:
    said, builder, vocabulary = decoder
    assert builder.result.bounds == {"ids": (0, vocabulary - 1)}
    assert f"ids 0 to {vocabulary - 1}" in builder.result.built["fp32"].comparison.note
    assert whisper.check_tokens(said, builder.result).is_well


@pytest.mark.parametrize("key", ["prompt", "languages", "end", "pad"])
def test_tokens_that_are_no_rows_of_whispers_table_are_not_published(
    key: str, decoder: tuple[Mapping[str, Any], Builder, int]
) -> None:
    said, builder, vocabulary = decoder
    for token in (vocabulary, -1):
        wrong = {**said, key: [token] if isinstance(said[key], list) else token}
        check = whisper.check_tokens(wrong, builder.result)
        assert not check.is_well
        assert f"expected 0 to {vocabulary - 1}, decoding.json has [" in check.why
        assert str(token) in check.why


def test_bounds_that_would_refuse_what_was_verified_are_not_published(tmp_path: Path) -> None:
    """As where the rest of an input is not read at all, and may be anything."""

    def built(*ids: int) -> list[str]:
        cases = [{"ids": np.array([ids])}]
        example = {"ids": torch.zeros(2, 2, dtype=torch.int64)}
        module = Table(lambda one, ids: rows_of(one, ids[:, 0]))
        shapes = {"ids": ((1, 2), (1, 2), (2, 2))}
        builder = Builder(Graph("g", module, example, ("y",), {"ids": {0: "batch"}}, cases, shapes), tmp_path)
        builder.make("fp32")
        return builder.result.built["fp32"].comparison.failures

    assert built(9, 0) == []
    assert built(9, -7) == ["input 'ids': it indexes 0 to 9, and was verified on -7 to 9"]
