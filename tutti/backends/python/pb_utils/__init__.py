"""What `triton_python_backend_utils` is made of, a module for each idea of Triton's module."""
