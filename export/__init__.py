"""Export scripts: PyTorch -> ONNX or TensorRT -> a Triton model repository, checked before it is published."""
