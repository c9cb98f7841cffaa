"""What a GPU does for tutti, in parts that fit half an hour: `python -m benchmarks.gpu PART --out DIR`."""
