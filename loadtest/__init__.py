"""Load tests with Locust against any Triton server. Imports no server code."""
