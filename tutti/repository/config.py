"""config.pbtxt, or its JSON -> a configuration, completed, checked and with what holds where nothing was said.

Touches no backend and no other model.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2 as pb

from tutti.core import files
from tutti.core.errors import ConfigError, reason
from tutti.repository import backend_records
from tutti.repository.backend_records import BackendRecord
from tutti.repository.config_checks import check
from tutti.repository.config_fields import DEFAULT_SEQUENCE_IDLE_US, build
from tutti.repository.misspelt import told
from tutti.repository.model_config import ModelConfig

Complete = Callable[[Any], None]
"""Fills in what a ModelConfig message leaves out, where it can be told from the model's files."""


def load(path: Path, complete: Complete = lambda _: None) -> ModelConfig:
    """Read `<model folder>/config.pbtxt`; a missing file is an empty one. Raises ConfigError naming model and field.

    What is not UTF-8 does no harm in a comment.
    """
    try:
        text = files.read_text(path) if os.path.lexists(path) else ""
    except OSError as error:
        raise ConfigError(f"model '{path.parent.name}': cannot read {path.name}: {reason(error)}") from None
    return parse(text, path.parent.name, complete)


def parse(text: str, folder: str, complete: Complete = lambda _: None) -> ModelConfig:
    """Parse, complete and check one config.pbtxt; `folder` gives the name where the file gives none."""
    try:
        proto = text_format.Parse(text, pb.ModelConfig())
    except (text_format.ParseError, ValueError, RecursionError) as error:
        raise ConfigError(f"model '{folder}': config.pbtxt does not parse: {told(error)}") from None
    return _complete_and_check(proto, folder, complete)


def parse_json(text: str | bytes, folder: str, complete: Complete = lambda _: None) -> ModelConfig:
    """As `parse`, for a configuration in JSON, as a client sends it with a load."""
    try:
        proto = _from_json(text)
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise ConfigError(f"model '{folder}': the configuration's JSON does not parse: {told(error)}") from None
    return _complete_and_check(proto, folder, complete)


def _from_json(text: str | bytes) -> Any:
    """The message. As in Triton a repeated field may be one value without its brackets."""
    if text.strip()[:1] not in ("{", b"{"):
        raise ValueError("expected an object")
    try:
        return json_format.Parse(text, pb.ModelConfig(), max_recursion_depth=20)
    except json_format.ParseError as error:
        value = json.loads(text, object_pairs_hook=_distinct)
        listed = _listed(value, pb.ModelConfig.DESCRIPTOR)
        if listed == value:
            raise error
        return json_format.ParseDict(listed, pb.ModelConfig(), max_recursion_depth=20)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return values


def _listed(value: Any, message: Any) -> Any:
    """A message's JSON, each repeated field of it a list."""
    if not isinstance(value, dict):
        return value
    fields = {name: field for field in message.fields for name in (field.name, field.json_name)}
    return {key: _field_listed(part, fields[key]) if key in fields else part for key, part in value.items()}


def _field_listed(value: Any, field: Any) -> Any:
    kind = field.message_type
    if kind is None:
        return value if value is None or isinstance(value, list) or not field.is_repeated else [value]
    if kind.GetOptions().map_entry:
        inner = kind.fields_by_name["value"].message_type
        if inner is None or not isinstance(value, dict):
            return value
        for key, part in value.items():
            if not isinstance(part, dict):
                raise ValueError(
                    f"{field.name}: expected {inner.name} objects by name, got {part!r:.100} as {key!r:.100}"
                )
        return {key: _listed(part, inner) for key, part in value.items()}
    if not field.is_repeated:
        return _listed(value, kind)
    if value is None:
        return value
    return [_listed(part, kind) for part in (value if isinstance(value, list) else [value])]


def _complete_and_check(proto: Any, folder: str, complete: Complete) -> ModelConfig:
    if not proto.name:
        proto.name = folder
    complete(proto)
    record = backend_of(proto, folder)
    check(proto, folder, record)
    config = build(proto, record)
    _fill_defaults(proto, record)
    return config


def backend_of(proto: Any, model: str) -> BackendRecord | None:
    """The backend that a ModelConfig message names, by its platform maybe; None for an ensemble, and for none.

    Raises ConfigError for an installed one that is broken.
    """
    if proto.HasField("ensemble_scheduling"):
        return None
    if proto.backend:
        return backend_records.find(proto.backend, model)
    return backend_records.of_platform(proto.platform)


def _fill_defaults(proto: Any, record: BackendRecord | None) -> None:
    """Say what holds where nothing was said, as Triton shows it to clients and to python models."""
    if record is not None:
        proto.backend = record.name
        proto.platform = proto.platform or (record.platform if record.shows_platform else "")
        proto.default_model_filename = proto.default_model_filename or next(iter(record.filenames), "")
        if not proto.instance_group:
            proto.instance_group.add()
        for index, group in enumerate(proto.instance_group):
            group.name = group.name or (proto.name if len(proto.instance_group) == 1 else f"{proto.name}_{index}")
            group.count = group.count or 1
    if not proto.HasField("version_policy"):
        proto.version_policy.latest.num_versions = 1
    for memory in ("input_pinned_memory", "output_pinned_memory"):
        if record is not None and not proto.optimization.HasField(memory):
            getattr(proto.optimization, memory).enable = True
    if proto.HasField("ensemble_scheduling"):
        proto.model_transaction_policy.SetInParent()
    sequences = proto.sequence_batching
    if proto.HasField("sequence_batching") and not sequences.max_sequence_idle_microseconds:
        sequences.max_sequence_idle_microseconds = DEFAULT_SEQUENCE_IDLE_US
    if proto.HasField("dynamic_batching") and not proto.dynamic_batching.preferred_batch_size:
        proto.dynamic_batching.preferred_batch_size.append(proto.max_batch_size)


def as_json(message: Any) -> dict[str, Any]:
    """A configuration as Triton's JSON: proto field names, enum names, numbers as numbers.

    What has a presence, as messages and alternatives of each other, is left out where it is not set.
    """
    shown: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            shown[field.name] = {key: as_json(v) if isinstance(v, Message) else v for key, v in value.items()}
        elif field.is_repeated:
            shown[field.name] = [_json_value(field, item) for item in value]
        elif not field.has_presence or message.HasField(field.name):
            shown[field.name] = _json_value(field, value)
    return shown


def _json_value(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return as_json(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value
