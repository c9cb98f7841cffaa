"""Maps that a converted classifier makes of its probabilities, taken off: the tensor they are made of is answered.

skl2onnx's default output is a list of maps from class to probability, which no client of Triton's protocol can carry.
Knows ONNX files only.
"""

from pathlib import Path
from typing import Any

_MAPPING = "ZipMap"


def taken_off(source: Path, target: Path) -> list[str]:
    """Write the graph to `target` without its maps; returns a sentence for each, none where it has none.

    Weights in files of their own stay where they are. Raises ValueError for what is no ONNX graph.
    """
    import onnx

    try:
        model = onnx.load(str(source), load_external_data=False)
    except Exception as error:  # protobuf's own
        raise ValueError(str(error)) from None
    outputs = {output.name: output for output in model.graph.output}
    told = [
        _take_off(node, outputs[node.output[0]], model.graph.input)
        for node in model.graph.node
        if node.op_type == _MAPPING and node.output[0] in outputs
    ]
    if told:
        onnx.save(model, str(target))
    return told


def rename_output(graph: Any, before: str, after: str) -> None:
    """Call an output of a graph otherwise, where it has one of that name."""
    for output in graph.output:
        if output.name == before:
            output.name = after
            for node in graph.node:
                node.output[:] = [after if name == before else name for name in node.output]
                node.input[:] = [after if name == before else name for name in node.input]


def _take_off(node: Any, output: Any, inputs: Any) -> str:
    """The node passes its tensor on, under the name that the map had: a column for each class."""
    from onnx import TensorProto, helper

    classes = [str(_decoded(label)) for attribute in node.attribute for label in helper.get_attribute_value(attribute)]
    shape = inputs[0].type.tensor_type.shape.dim
    rows = (shape[0].dim_param or None) if shape and not shape[0].HasField("dim_value") else 1
    value = helper.make_tensor_value_info(output.name, TensorProto.FLOAT, [rows, len(classes)])
    output.CopyFrom(value)
    node.op_type, node.domain = "Identity", ""
    del node.attribute[:]
    some = ", ".join(classes[:10]) + (f" and {len(classes) - 10} more" if len(classes) > 10 else "")
    return f"'{output.name}' was a map from class to number; it is a tensor of the numbers now, in the order {some}"


def _decoded(label: Any) -> Any:
    return label.decode() if isinstance(label, bytes) else label
