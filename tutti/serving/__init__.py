"""The models of one process: loaded, checked, warmed up, and found by name."""
