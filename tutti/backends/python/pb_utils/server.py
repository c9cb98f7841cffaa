"""The server as models see it: what answers their requests to other models, and what loads others for them."""

from collections.abc import Callable

from tutti.core.types import Call, Infer, ModelControl

# Where exec and async_exec send their requests: the server this process runs.
infer: Infer | None = None
# What is told of requests that a model does not wait for any longer.
given_up: Callable[[Call], None] = lambda call: None  # noqa: E731
# What loads and unloads models for models.
control: ModelControl | None = None


def serve_with(
    answering: Infer, forgetting: Callable[[Call], None] = lambda call: None, controlling: ModelControl | None = None
) -> None:
    """Say what answers models' requests, what is told of those that they give up, and what loads others for them."""
    global infer, given_up, control
    infer = answering
    given_up = forgetting
    control = controlling
