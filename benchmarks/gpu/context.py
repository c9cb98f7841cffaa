"""What a line of a part is told, and what it tells: rows of figures, as soon as it has them.

A line runs in a process of its own (`child.py`); nothing here knows which.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]

Array = np.ndarray[Any, Any]
Figures = dict[str, Any]
Emit = Callable[[str, Figures], None]
"""(name of the row, its figures)."""


class NotThereYetError(Exception):
    """What is to be measured does not exist in this server, or on this machine; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Context:
    """Where a line runs. `out` has the parts' JSON, `work` keeps models and programs between the parts.

    With `is_short` models are tiny and times are short: it shows that all works, and its figures mean nothing.
    """

    device: str
    is_short: bool
    out: Path
    work: Path
    emit: Emit

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"

    def check(self, name: str, is_right: bool, **figures: Any) -> None:
        """A row that is right or wrong."""
        self.emit(name, {"right": bool(is_right), **figures})

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
