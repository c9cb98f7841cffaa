"""Why an export was not published.

TuttiError
└── ExportError      the source, the graph or an option is wrong
    └── ParityError  the exported graph does not answer as PyTorch does
"""

from tutti.core.errors import TuttiError


def first_line(error: BaseException) -> str:
    """What an exception says, in at most 300 characters of one line; its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


class ExportError(TuttiError):
    """The export cannot be done; the message says what was expected and what came."""


class ParityError(ExportError):
    """Something of what would have been published is not as it should be. Its second argument is all that was seen."""

    def __str__(self) -> str:
        return str(self.args[0])
