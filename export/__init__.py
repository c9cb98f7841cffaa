"""Export scripts: PyTorch -> ONNX or TensorRT -> a Triton model repository, checked against PyTorch before publishing."""
