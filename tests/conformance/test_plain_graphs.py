"""Random plain ensembles in a real tritonserver and in tutti: the same answers, the same refusals."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from demo.client import Client
from tests.peers import tritonserver
from tests.serving import serving

pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

GRAPHS = 40
WIDTH = 4
SPEC = f"data_type: TYPE_FP32 dims: {WIDTH}"


def add_sum(root: Path, inputs: int) -> None:
    """y = tanh(a + b + ...) / 2."""
    folder = root / f"sum_{inputs}" / "1"
    folder.mkdir(parents=True)
    names = "abc"[:inputs]
    half = helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])
    nodes = [
        helper.make_node("Sum", list(names), ["s"]), helper.make_node("Tanh", ["s"], ["t"]),
        helper.make_node("Mul", ["t", "half"], ["y"]),
    ]  # fmt: skip
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in (*names, "y")]
    graph = helper.make_graph(nodes, "sum", tensors[:-1], tensors[-1:], [half])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    given = " ".join(f'input {{ name: "{name}" {SPEC} }}' for name in names)
    (folder.parent / "config.pbtxt").write_text(
        f'name: "sum_{inputs}" backend: "onnxruntime" max_batch_size: 8 {given} output {{ name: "y" {SPEC} }} '
        "dynamic_batching {}"
    )


def add_graph(root: Path, number: int) -> None:
    """Up to eight steps over earlier tensors, in any order; some of them nested graphs drawn before.

    Triton wants every tensor to be read: those that no step reads are outputs.
    """
    rng = random.Random(number)
    tensors, steps, read = ["X", "W"], [], set()
    for index in range(rng.randint(1, 8)):
        nested = bool(index and number) and rng.random() < 0.2
        inputs = 2 if nested or not index else rng.randint(1, 3)
        model = f"graph_{rng.randrange(number)}" if nested else f"sum_{inputs}"
        keys = ("X", "W") if nested else "abc"[:inputs]
        reads = [rng.choice(tensors) for _ in keys] if index else ["X", "W"]
        read.update(reads)
        maps = " ".join(f'input_map {{ key: "{key}" value: "{read}" }}' for key, read in zip(keys, reads, strict=True))
        out = "Y" if nested else "y"
        steps.append(
            f'step {{ model_name: "{model}" model_version: -1 {maps} output_map {{ key: "{out}" value: "T{index}" }} }}'
        )
        tensors.append(f"T{index}")
    last = f'"{tensors[-1]}"'
    text = " ".join(rng.sample(steps, len(steps))).replace(f"value: {last}", 'value: "Y"')
    others = " ".join(f'output {{ name: "{name}" {SPEC} }}' for name in tensors[2:-1] if name not in read)
    folder = root / f"graph_{number}" / "1"
    folder.mkdir(parents=True)
    (folder / ".keep").touch()
    (folder.parent / "config.pbtxt").write_text(
        f'name: "graph_{number}" platform: "ensemble" max_batch_size: 8 input {{ name: "X" {SPEC} }} '
        f'input {{ name: "W" {SPEC} }} output {{ name: "Y" {SPEC} }} {others} ensemble_scheduling {{ {text} }}'
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[Client, Client]]]:
    tritonserver.require()
    scratch = tmp_path_factory.mktemp("graphs")
    root = scratch / "repository"
    for inputs in (1, 2, 3):
        add_sum(root, inputs)
    for number in range(GRAPHS):
        add_graph(root, number)
    with tritonserver.running(root, scratch) as theirs, serving(root, scratch / "tutti.log") as ours:
        yield [(Client(p, getattr(ours, p)), Client(p, getattr(theirs, p))) for p in ("http", "grpc")]


@pytest.mark.parametrize("number", range(GRAPHS))
def test_the_same_answers(pairs: list[tuple[Client, Client]], number: int) -> None:
    numbers = np.random.default_rng(number)
    for ours, theirs in pairs:
        for rows in (1, 5):
            inputs = {name: numbers.normal(size=(rows, WIDTH)).astype(np.float32) for name in ("X", "W")}
            got, expected = (client.infer(f"graph_{number}", inputs)[0] for client in (ours, theirs))
            assert got.keys() == expected.keys()
            for name, array in got.items():
                np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_same_refusals(pairs: list[tuple[Client, Client]]) -> None:
    good = np.zeros((1, WIDTH), np.float32)
    many = np.zeros((9, WIDTH), np.float32)
    for wrong in (
        {"X": good},
        {"X": good, "W": np.zeros((1, WIDTH + 1), np.float32)},
        {"X": good, "W": good.astype(np.float64)},
        {"X": many, "W": many},
        {"X": good, "W": good, "Z": good},
    ):
        for pair in pairs:
            for client in pair:
                with pytest.raises(Exception, match="graph_0"):
                    client.infer("graph_0", wrong)
