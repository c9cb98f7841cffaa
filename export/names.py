"""The variants of a graph, by the names that people give them. Light: the command line knows no more of them.

Order matters: fp32 is what the others are made from.
"""

FILES = {
    "fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx", "torch": "model.pt2",
    "torch-fp16": "model.fp16.pt2", "torch-bf16": "model.bf16.pt2", "tensorrt": "model.plan",
}  # fmt: skip
VARIANTS = tuple(FILES)
