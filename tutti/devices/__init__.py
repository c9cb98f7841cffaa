"""Accelerators: their streams, memory and turns. Knows no model and no request."""
