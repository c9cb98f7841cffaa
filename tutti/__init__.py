"""tutti: a high-throughput inference server for Triton model repositories."""

__version__ = "0.2.0"
SERVER_NAME = "tutti"
