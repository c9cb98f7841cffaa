"""Backends: each loads a model's instances by its library, which is imported only when used."""
