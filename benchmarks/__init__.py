"""Comparisons with other servers: each figure a ratio of medians from one interleaved run."""
