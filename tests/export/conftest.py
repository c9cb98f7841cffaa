"""Exports make many objects, and so wake the collector often."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """What a module's tests begin with stays: libraries are imported as they are needed."""
    gc.collect()
    gc.freeze()
