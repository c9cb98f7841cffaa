"""What protobuf says of a configuration that does not parse, with the field or value that may have been meant."""

import difflib
import re

from tritonclient.grpc import model_config_pb2 as pb

from tutti.core.errors import reason

_FIELD = re.compile(r'Message type "(?P<type>[\w.]+)" has no field named "(?P<name>\w+)"')
_VALUE = re.compile(r'Enum type "(?P<type>[\w.]+)" has no value named (?P<name>\w+)')


def told(error: Exception) -> str:
    """In a sentence; of a text, the line and column first."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    said = reason(error)
    near = next(iter(difflib.get_close_matches(*_known(said), 1)), "")
    return f"{said.removesuffix('.')}; did you mean {near}?" if near else said


def _known(said: str) -> tuple[str, list[str]]:
    """The name that is not known, and those that its type has."""
    pool = pb.DESCRIPTOR.pool
    try:
        if match := _FIELD.search(said):
            return match["name"], list(pool.FindMessageTypeByName(match["type"]).fields_by_name)
        if match := _VALUE.search(said):
            return match["name"], list(pool.FindEnumTypeByName(match["type"]).values_by_name)
    except KeyError:  # a type of another file
        pass
    return "", []
