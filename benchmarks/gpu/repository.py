"""Model repositories for what is measured: exported packages with their configurations, and small python models."""

import hashlib
import itertools
import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import models
from benchmarks.gpu.models import Spec

GRAPHS = "optimization { cuda { graphs: true } }"
COMPILED = 'parameters { key: "tutti.compile" value { string_value: "torch_compile" } }'


def kind(device: str) -> str:
    return "KIND_CPU" if device == "cpu" else "KIND_GPU"


def config(
    spec: Spec, precision: str, device: str, max_batch_size: int, extra: str = "", backend: str = "pytorch",
    count: int = 1,
) -> str:  # fmt: skip
    """Without its name. Lengths are fixed, as those of requests are."""
    inputs = ", ".join(_tensor(one.name, one.datatype, one.dims) for one in spec.inputs)
    output = _tensor(spec.output, spec.datatype(precision), spec.output_dims or (1,))
    return (
        f'backend: "{backend}" max_batch_size: {max_batch_size}\n'
        f"input [ {inputs} ]\noutput [ {output} ]\n"
        f"instance_group {{ kind: {kind(device)} count: {count} }}\n"
        f"{extra or 'dynamic_batching {}'}\n"
    )


def _tensor(name: str, datatype: str, dims: Sequence[int]) -> str:
    return f'{{ name: "{name}" data_type: TYPE_{datatype} dims: [ {", ".join(map(str, dims))} ] }}'


def add(root: Path, name: str, text: str, version: int = 1) -> Path:
    """A model's folder with its configuration; returns the folder of the version."""
    folder = root / name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    (root / name / "config.pbtxt").write_text(f'name: "{name}"\n{text}')
    return folder


def export(module: torch.nn.Module, inputs: Sequence[Any], path: Path) -> None:
    """A package with a batch axis of any size. Written whole or not at all: parts share it."""
    axes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=axes, strict=False)
        fresh = path.with_suffix(".new.pt2")
        torch.export.save(program, str(fresh))
    fresh.replace(path)


def kept(folder: Path, name: str, suffix: str) -> Path:
    """A file's path, which is another one once the sources or PyTorch are."""
    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    sources = [(here / f"{one}.py").read_bytes() for one in ("models", "modules", "repository", "onnx_models")]
    key = hashlib.sha256(b"".join([torch.__version__.encode(), *sources])).hexdigest()[:12]
    return folder / f"{name}-{key}.{suffix}"


def package(spec: Spec, precision: str, folder: Path, is_short: bool) -> Path:
    """The model's `model.pt2`, made once in `folder`."""
    path = kept(folder, f"{spec.name}-{precision}{'-short' if is_short else ''}", "pt2")
    if not path.exists():
        inputs = models.as_tensors(spec.draw(2))
        export(models.build(spec, precision), inputs, path)
    return path


def add_spec(
    root: Path, spec: Spec, precision: str, device: str, work: Path, is_short: bool, max_batch_size: int,
    extra: str = "", count: int = 1,
) -> str:  # fmt: skip
    """The exported model, under "NAME_PRECISION", which is returned."""
    name = f"{spec.name}_{precision}"
    folder = add(root, name, config(spec, precision, device, max_batch_size, extra, count=count))
    os.link(package(spec, precision, work / "packages", is_short), folder / "model.pt2")
    return name


def add_tiny(root: Path) -> str:
    """Three dense layers [384] -> [10] on the processor, by ONNX Runtime: what front-ends and a queue cost."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights, at = [], [], "x"
    widths = (384, 64, 64, 10)
    for number, (inside, outside) in enumerate(itertools.pairwise(widths)):
        weight = rng.normal(0, inside**-0.5, (inside, outside)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{number}"))
        to = "y" if number == 2 else f"h{number}"
        nodes.append(helper.make_node("MatMul", [at, f"w{number}"], [to]))
        if number < 2:
            nodes.append(helper.make_node("Relu", [to], [f"r{number}"]))
        at = f"r{number}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 384])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])
    model = helper.make_model(
        helper.make_graph(nodes, "tiny", [x], [y], weights), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    folder = add(
        root, "tiny",
        'backend: "onnxruntime" max_batch_size: 128 dynamic_batching {} instance_group { kind: KIND_CPU }\n'
        'input { name: "x" data_type: TYPE_FP32 dims: 384 } output { name: "y" data_type: TYPE_FP32 dims: 10 }\n'
        'parameters { key: "intra_op_thread_count" value { string_value: "1" } }\n',
    )  # fmt: skip
    onnx.save(model, folder / "model.onnx")
    return "tiny"


def floats(
    backend: str, device: str, inside: int, outside: int, most: int = 8, extra: str = "dynamic_batching {}"
) -> str:
    """The configuration of a model x FP32 [inside] -> y FP32 [outside]."""
    return (
        f'backend: "{backend}" max_batch_size: {most} {extra}\n'
        f'input {{ name: "x" data_type: TYPE_FP32 dims: {inside} }}\n'
        f'output {{ name: "y" data_type: TYPE_FP32 dims: {outside} }}\n'
        f"instance_group {{ kind: {kind(device)} }}\n"
    )


_PYTHON = """
    import time

    import numpy as np
    import triton_python_backend_utils as pb_utils


    def answer(x):
        {body}


    class TritonPythonModel:
        def execute(self, requests):
            found = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
            return [pb_utils.InferenceResponse([pb_utils.Tensor("y", answer(x))]) for x in found]
"""


def add_python(root: Path, name: str, body: str, inside: int, outside: int, extra: str = "") -> None:
    """A model.py; `body` is of a function of the array x, which returns another."""
    folder = add(root, name, floats("python", "cpu", inside, outside, extra=extra))
    (folder / "model.py").write_text(textwrap.dedent(_PYTHON).lstrip().replace("{body}", body.replace("\n", "\n    ")))


def add_module(root: Path, name: str, module: torch.nn.Module, inside: int, text: str) -> None:
    """A module of x FP32 [inside], exported, with its configuration."""
    folder = add(root, name, text)
    export(module.eval().requires_grad_(False), (torch.zeros(2, inside),), folder / "model.pt2")


def add_chain(root: Path, name: str, steps: Sequence[str], inside: int, outside: int, most: int = 8) -> None:
    """An ensemble of models x -> y, one after the other."""
    names = ["x", *(f"t{number}" for number in range(1, len(steps))), "y"]
    shown = ", ".join(
        f'{{ model_name: "{step}" model_version: -1 input_map {{ key: "x" value: "{before}" }} '
        f'output_map {{ key: "y" value: "{after}" }} }}'
        for step, before, after in zip(steps, names, names[1:], strict=False)
    )
    add(
        root, name,
        f'platform: "ensemble" max_batch_size: {most}\n'
        f'input {{ name: "x" data_type: TYPE_FP32 dims: {inside} }}\n'
        f'output {{ name: "y" data_type: TYPE_FP32 dims: {outside} }}\n'
        f"ensemble_scheduling {{ step [ {shown} ] }}\n",
    )  # fmt: skip
