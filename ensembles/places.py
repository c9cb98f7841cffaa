"""Where in a person's Python file something was written. Knows nothing of what that is."""

import traceback

from tutti.core.errors import ConfigError

# (file, line) of the calls that lead to it, the innermost first.
Place = tuple[tuple[str, int], ...]


class MistakeAt(ConfigError):
    """A mistake that shows only later than it was made: `place` is where that was."""

    def __init__(self, message: str, place: Place = ()) -> None:
        super().__init__(message)
        self.place = place


def here() -> Place:
    """Where the program is."""
    return tuple((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None))
