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
    """A turn for one execution, whose threads may give it up, several at a time: the last of them asks again.

    Nobody waits for a turn while the execution has one: all its threads ask as one.
    """

    def __init__(self, engine: DeviceEngine, pipeline: Pipeline, folder: str) -> None:
        self.folder = folder
        self._engine = engine
        self._pipeline = pipeline
        self._changed = threading.Condition()
        self._turn: Turn | None = None
        self._waiting = 0
        self._is_asking = False
        self._is_over = False

    def begin(self) -> None:
        """Raises DeviceLost."""
        self._turn = self._engine.begin_turn(self._pipeline)
        with _lock:
            _held.add(self)

    def end(self) -> None:
        with _lock:
            _held.discard(self)
        with self._changed:
            self._is_over = True
            turn, self._turn = self._turn, None
            self._changed.notify_all()
        if turn is not None:
            self._engine.end_turn(turn)

    def give_up(self) -> None:
        """For as long as one waits: one of the following is to come then, from any thread."""
        with self._changed:
            self._waiting += 1
            turn, self._turn = self._turn, None
            self._changed.notify_all()
        if turn is not None:
            self._engine.end_turn(turn)

    def ask_again(self) -> None:
        """Blocks until the turn is there, or another waits, or the execution is over. Raises DeviceLost."""
        with self._changed:
            self._waiting -= 1
            self._changed.wait_for(lambda: not (self._is_asking and self._is_needed()))
            if not self._is_needed():
                return
            self._is_asking = True
        try:
            turn = self._engine.begin_turn(self._pipeline)
        except BaseException:
            self._asked(None)
            raise
        if not self._asked(turn):
            self._engine.end_turn(turn)

    def wait_no_longer(self) -> None:
        """As one that does not ask: the execution goes on without a turn, unless another asks."""
        with self._changed:
            self._waiting -= 1

    def _is_needed(self) -> bool:
        return not (self._waiting or self._is_over or self._turn is not None)

    def _asked(self, turn: Turn | None) -> bool:
        """Keep what was granted; returns whether it is needed."""
        with self._changed:
            self._is_asking = False
            is_needed = self._is_needed()
            if is_needed:
                self._turn = turn
            self._changed.notify_all()
        return is_needed


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
    """Within the block, give up the turn of an execution that waits for another model. Raises DeviceLost at its end.

    It is the execution of this thread, else the one that `held` belongs to.
    """
    turn = held_here() or held
    if turn is None:
        with _given_up_by_stranger():
            yield
        return
    turn.give_up()
    try:
        yield
    finally:
        turn.ask_again()


@contextmanager
def _given_up_by_stranger() -> Iterator[None]:
    """A thread that a model has started has no turn of its own, and an execution of the model may wait for it.

    Which one is not known: all of the model whose code is on this thread's stack give up their turns, and where there
    is none, those of all models. They go on without: who asked for several turns, with one of them in hand, could wait
    for another who does so too.
    """
    giving = _concerned()
    for each in giving:
        each.give_up()
    try:
        yield
    finally:
        for each in giving:
            each.wait_no_longer()


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
