"""Triton's python backend: model.py in a process of its own or in the server's, and its module."""
