"""Models that load and unload others: the server does it, where it may."""

import contextlib
from collections.abc import Iterator, Mapping

from tutti.backends.python.pb_utils import server
from tutti.backends.python.pb_utils.errors import TritonModelException
from tutti.backends.python.pb_utils.values import text_of
from tutti.core import errors
from tutti.core.types import ModelControl

_FILE_PREFIX = "file:"


def load_model(model_name: str, config: str = "", files: Mapping[str, bytes | str] | None = None) -> None:
    """Have the server load a model, or load it anew: as a client's load, with Triton's parameters.

    `config` is a configuration in JSON; `files`, "file:VERSION/FILE" -> content, needs it. Returns when the model
    serves. Raises TritonModelException with the reason, as where load and unload are not allowed.
    """
    contents = {}
    for key, value in (files or {}).items():
        path = text_of(key)
        if not path.startswith(_FILE_PREFIX):
            raise TritonModelException(
                f"failed to load '{model_name}': files: expected 'file:VERSION/FILE', got '{path}'"
            )
        contents[path.removeprefix(_FILE_PREFIX)] = value.encode() if isinstance(value, str) else bytes(value)
    with _told_to_models(f"failed to load '{model_name}'"):
        _controlled().load(text_of(model_name), text_of(config) or None, contents)


def unload_model(model_name: str, unload_dependents: bool = False) -> None:
    """Have the server serve a model no longer; returns before all that is inside it has ended, as in Triton.

    `unload_dependents` unloads an ensemble's models, too. Raises TritonModelException.
    """
    with _told_to_models(f"failed to unload '{model_name}'"):
        _controlled().unload(text_of(model_name), bool(unload_dependents))


def is_model_ready(model_name: str, model_version: str = "") -> bool:
    """Whether a model, or one version of it, answers now. Raises TritonModelException for what is no version."""
    with _told_to_models("Failed to check model readiness"):
        return _controlled().is_ready(text_of(model_name), text_of(model_version))


def _controlled() -> ModelControl:
    if server.control is None:
        raise TritonModelException("no server loads models in this process")
    return server.control


@contextlib.contextmanager
def _told_to_models(failure: str) -> Iterator[None]:
    """Errors of the server's are TritonModelExceptions, which say what has failed once."""
    try:
        yield
    except (errors.TuttiError, ValueError) as error:
        why = errors.sayable(error)
        raise TritonModelException(why if why.startswith(failure) else f"{failure}: {why}") from None
