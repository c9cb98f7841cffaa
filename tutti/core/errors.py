"""Every error that leaves a public function.

TuttiError
├── ConfigError             a model configuration or repository that cannot be served; names the field's path
└── InferError              one request that cannot be answered
    ├── InvalidArgument     the request itself is wrong
    ├── NotFound            no such model or version
    ├── Unavailable         a queue is full, or nothing is there to execute (may pass: try again)
    │   ├── TooLate         it could not be done by its deadline, and was not begun
    │   └── DeviceLost      the device that was to execute it has failed; another process will take its place
    ├── DeadlineExceeded    the caller's time was up before the work was done
    ├── Unsupported         the request asks for something this server does not do
    ├── AlreadyExists       what is to be made is there already
    ├── Cancelled           the caller went away before the work began
    ├── Unknown             a model failed and did not say how
    └── Internal            a backend failed
        └── OutOfMemory     a device has too little memory for the batch

Knows nothing of HTTP or gRPC: each front-end maps these classes to its status codes in one table.
"""

MAX_MESSAGE = 6000


def sayable(text: object) -> str:
    """A text in characters that every protocol, and every file, can carry: half of a surrogate pair is escaped."""
    said = str(text)
    return said if said.isascii() else said.encode("utf-8", "backslashreplace").decode()


def shown(text: str) -> str:
    """A message as callers may see it: sayable, and of a long one the middle left out."""
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"
    return sayable(text)


def reason(error: BaseException) -> str:
    """What any error says, sayable; the name of its class where it says nothing."""
    return sayable((isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__)


class TuttiError(Exception):
    """Root of all errors raised on purpose."""


class ConfigError(TuttiError):
    """A model cannot be loaded as configured. The message names the model and the field's path."""


class InferError(TuttiError):
    """A request failed. The message names the model, the tensor, what was expected and what came."""

    @property
    def message(self) -> str:
        """What callers are told: text that every encoding can carry, and no longer than gRPC's trailers allow."""
        return shown(str(self.args[0]) if self.args else type(self).__name__)


class InvalidArgument(InferError):
    """The request does not fit the model or the protocol."""


class NotFound(InferError):
    """No such model or version."""


class Unavailable(InferError):
    """Refused for now: the queue is full, the model is not ready or no replica is there."""


class TooLate(Unavailable):
    """Refused at once: what waits before it and its own execution would take longer than the caller gives."""


class DeviceLost(Unavailable):
    """The device that was to execute the request has failed. Its process is replaced: try again later."""


class DeadlineExceeded(InferError):
    """The time that the caller gave has passed."""


class Unsupported(InferError):
    """Valid, but not offered by this server."""


class AlreadyExists(InferError):
    """What is to be made is there already."""


class Unknown(InferError):
    """A model failed and did not say how."""


class Cancelled(InferError):
    """The caller went away before the work began."""


class Internal(InferError):
    """A backend failed while it executed the request."""


class OutOfMemory(Internal):
    """A device has too little memory for the batch: a smaller one may fit."""
