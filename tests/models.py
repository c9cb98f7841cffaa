"""Small models for tests: ONNX graphs made by hand, and python models from a few lines."""

import shutil
import textwrap
from pathlib import Path

import onnx
from onnx import TensorProto, helper


def onnx_add_one(width: int = 4, amount: float = 1.0) -> bytes:
    """y = x + amount, [batch, width] FP32."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [amount])
    graph = helper.make_graph([helper.make_node("Add", ["x", "one"], ["y"])], "add_one", [x], [y], [one])
    return _serialized(graph)


def onnx_gather() -> bytes:
    """y = table[ids], ids [batch, -1] INT64: an id of 4 or more fails at run time."""
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length"])
    table = helper.make_tensor("table", TensorProto.FLOAT, [4], [0.0, 10.0, 20.0, 30.0])
    graph = helper.make_graph([helper.make_node("Gather", ["table", "ids"], ["y"])], "gather", [ids], [y], [table])
    return _serialized(graph)


def onnx_doubling() -> bytes:
    """y = 2x + 1 and its total, [batch, -1] FP32."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length"]) for name in ("x", "y"))
    total = helper.make_tensor_value_info("total", TensorProto.FLOAT, ["batch", 1])
    one, two = (helper.make_tensor(str(value), TensorProto.FLOAT, [1], [value]) for value in (1.0, 2.0))
    last = helper.make_tensor("last", TensorProto.INT64, [1], [1])
    nodes = [
        helper.make_node("Mul", ["x", "2.0"], ["twice"]),
        helper.make_node("Add", ["twice", "1.0"], ["y"]),
        helper.make_node("ReduceSum", ["y", "last"], ["total"], keepdims=1),
    ]
    return _serialized(helper.make_graph(nodes, "doubling", [x], [y, total], [one, two, last]))


def onnx_text() -> bytes:
    """y = x for any number of strings."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.STRING, [None]) for name in ("x", "y"))
    return _serialized(helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "text", [x], [y]))


def _serialized(graph: onnx.GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


# For python models that share objects with their test, or need no process of their own.
IN_PROCESS = 'parameters { key: "tutti.isolate" value { string_value: "no" } }'


class Repository:
    """A model repository being filled."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    def add(self, name: str, config: str, files: dict[str, str | bytes], version: int = 1) -> None:
        """One model version; `config` without its name."""
        folder = self.root / name / str(version)
        folder.mkdir(parents=True)
        (self.root / name / "config.pbtxt").write_text(f'name: "{name}"\n{textwrap.dedent(config)}')
        for filename, content in files.items():
            path = folder / filename
            path.write_bytes(content if isinstance(content, bytes) else textwrap.dedent(content).encode())

    def add_onnx(self, name: str = "add_one", max_batch_size: int = 8, extra: str = "dynamic_batching {}") -> None:
        self.add(
            name,
            f"""
            backend: "onnxruntime" max_batch_size: {max_batch_size}
            input {{ name: "x" data_type: TYPE_FP32 dims: 4 }}
            output {{ name: "y" data_type: TYPE_FP32 dims: 4 }}
            {extra}
            """,
            {"model.onnx": onnx_add_one()},
        )

    def add_gather(self, name: str = "gather") -> None:
        self.add(
            name,
            """
            backend: "onnxruntime" max_batch_size: 8
            input { name: "ids" data_type: TYPE_INT64 dims: -1 }
            output { name: "y" data_type: TYPE_FP32 dims: -1 }
            dynamic_batching {}
            """,
            {"model.onnx": onnx_gather()},
        )

    def add_slow(self, began: Path | None = None) -> None:
        """Waits for as many seconds as input "s" says; one request at a time. Makes the file `began` as it begins."""
        tells = f"pathlib.Path({str(began)!r}).touch()" if began else ""
        self.add_python(
            "slow",
            """
            backend: "python" max_batch_size: 1
            input { name: "s" data_type: TYPE_FP32 dims: 1 }
            output { name: "n" data_type: TYPE_FP32 dims: 1 }
            """
            + IN_PROCESS,
            f"""
            import pathlib, threading
            {tells}
            threading.Event().wait(float(pb_utils.get_input_tensor_by_name(request, "s").as_numpy()[0, 0]))
            return pb_utils.InferenceResponse([pb_utils.Tensor("n", np.zeros((1, 1), np.float32))])
            """,
        )

    def add_python(self, name: str, config: str, execute: str, initialize: str = "pass") -> None:
        """A python model; `execute` is the body of `def answer(self, request)` and returns a response."""
        body = textwrap.indent(textwrap.dedent(execute).strip(), "        ")
        setup = textwrap.indent(textwrap.dedent(initialize).strip(), "        ")
        source = (
            "import json\nimport numpy as np\nimport triton_python_backend_utils as pb_utils\n\n\n"
            "class TritonPythonModel:\n"
            f"    def initialize(self, args):\n{setup}\n\n"
            "    def execute(self, requests):\n        return [self.answer(request) for request in requests]\n\n"
            f"    def answer(self, request):\n{body}\n"
        )
        self.add(name, config, {"model.py": source})


def plain_sample(sample: Path, at: Path) -> Path:
    """The sample repository, its ensemble in what a stock Triton understands, in the new folder `at`."""
    at.mkdir()
    for model in sorted(sample.iterdir()):
        if model.is_dir() and model.name != "content_intelligence":
            (at / model.name).symlink_to(model.resolve())
    ensemble = at / "content_intelligence"
    (ensemble / "1").mkdir(parents=True)
    shutil.copyfile(Path(__file__).parent / "peers" / "plain_ensemble.pbtxt", ensemble / "config.pbtxt")
    return at
