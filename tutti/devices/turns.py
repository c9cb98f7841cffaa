"""Turns of code that computes on a device in its own thread, and that may wait for other models in the meantime.

Whoever waits for another model gives the turn up while it waits, and asks for it again: the other may need it, and two
that waited for each other's turns would wait for ever. Knows no model and no request.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tutti.devices.engine import DeviceEngine
from tutti.devices.pipeline import Pipeline, Turn

_lock = threading.Lock()
# The turns that are held now, or given up for a while.
_held: "set[HeldTurn]" = set()
# The folders of all models whose code may wait for others, with and without turns.
_folders: set[str] = set()
_here = threading.local()


class TurnTaker:
    """One user of a device, whose code lies in `folder`: it has a turn for each of its executions."""

    def __init__(self, engine: DeviceEngine, pipeline: Pipeline, folder: str) -> None:
        self._engine = engine
        self._pipeline = pipeline
        self._folder = _as_prefix(folder)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold a turn within the block, but where it is given up. Blocks; raises DeviceLost."""
        held = HeldTurn(self._engine, self._pipeline, self._folder)
        before = getattr(_here, "held", None)
        held.begin()
        _here.held = held
        try:
            yield
        finally:
            _here.held = before
            held.end()

    def close(self) -> None:
        self._pipeline.close()


class HeldTurn:
    """A turn for one execution. Several of the execution's threads may give it up at a time: the last asks again."""

    def __init__(self, engine: DeviceEngine, pipeline: Pipeline, folder: str) -> None:
        self.folder = folder
        self._engine = engine
        self._pipeline = pipeline
        self._lock = threading.Lock()
        self._turn: Turn | None = None
        self._waiting = 0
        self._is_over = False

    def begin(self) -> None:
        """Raises DeviceLost."""
        self._turn = self._engine.begin_turn(self._pipeline)
        with _lock:
            _held.add(self)

    def end(self) -> None:
        with _lock:
            _held.discard(self)
        with self._lock:
            self._is_over = True
            turn, self._turn = self._turn, None
        if turn is not None:
            self._engine.end_turn(turn)

    def give_up(self) -> None:
        """For as long as one waits; `ask_again` is to follow, from any thread."""
        with self._lock:
            self._waiting += 1
            turn, self._turn = self._turn, None
        if turn is not None:
            self._engine.end_turn(turn)

    def ask_again(self) -> None:
        """Blocks until the turn is there, unless another still waits, or the execution is over. Raises DeviceLost."""
        with self._lock:
            self._waiting -= 1
            if self._waiting or self._is_over:
                return
        turn = self._engine.begin_turn(self._pipeline)
        with self._lock:
            is_needed = not (self._waiting or self._is_over or self._turn is not None)
            if is_needed:
                self._turn = turn
        if not is_needed:
            self._engine.end_turn(turn)


def know(folder: str) -> None:
    """Code in this folder may wait for other models."""
    with _lock:
        _folders.add(_as_prefix(folder))


def held_here() -> HeldTurn | None:
    """The turn of this thread's execution."""
    held: HeldTurn | None = getattr(_here, "held", None)
    return held


@contextmanager
def given_up(held: HeldTurn | None = None) -> Iterator[None]:
    """Give up within the block the turns of whoever waits here for another model. Raises DeviceLost at its end.

    That is the execution of this thread, else the one that `held` belongs to. A thread that a model has started has no
    turn of its own, and the model's execution may wait for it: then it is all executions of the model whose code is on
    this thread's stack, and where none is, of all models.
    """
    own = held_here() or held
    giving = [own] if own is not None else _concerned()
    for each in giving:
        each.give_up()
    try:
        yield
    finally:
        for each in giving:
            each.ask_again()


def _concerned() -> list[HeldTurn]:
    with _lock:
        if not _held:
            return []
        all_held, folders = list(_held), list(_folders)
    folder = _folder_on_stack(folders)
    return [held for held in all_held if not folder or held.folder == folder]


def _folder_on_stack(folders: list[str]) -> str:
    """The model's folder whose code has led here; "" where there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        for folder in folders:
            if frame.f_code.co_filename.startswith(folder):
                return folder
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _as_prefix(folder: str) -> str:
    return folder.rstrip(os.sep) + os.sep
