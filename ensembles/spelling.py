"""The name that may have been meant. Knows nothing of what it is of."""

import difflib
from collections.abc import Iterable


def near(name: str, names: Iterable[str]) -> str:
    """A hint to end a message with; "" where none is near."""
    known = difflib.get_close_matches(str(name), list(names), 1)
    return f"; did you mean {known[0]}?" if known else ""
