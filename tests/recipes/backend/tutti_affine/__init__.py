"""A backend for models that are two numbers: y = scale * x + offset."""

from tutti.backends.interface import BackendRecord, lacks_tensors

RECORD = BackendRecord(
    "affine",
    module="tutti_affine.backend",
    filenames=("affine.json",),
    joins_rows=True,
    completes=lacks_tensors,
    parameters=("repeat",),
)
