"""Traces of single requests: Triton's trace settings, and which requests are traced.

Timestamps are of the monotonic clock in nanoseconds, as in Triton's files.
"""

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from tutti.core.errors import ConfigError, InvalidArgument, Unsupported
from tutti.core.types import Call
from tutti.observing.trace_files import JsonWriter
from tutti.observing.trace_records import Record, VersionOf, numbers
from tutti.observing.trace_spans import OpenTelemetryWriter

_log = logging.getLogger(__name__)

LEVELS = ("OFF", "TIMESTAMPS", "TENSORS")
_OLD_LEVELS = {"MIN": "TIMESTAMPS", "MAX": "TIMESTAMPS"}
_NUMBERS = {"trace_rate": 1, "trace_count": -1, "log_frequency": 0}  # name -> the least allowed
_SETTINGS = ("trace_level", "trace_rate", "trace_count", "log_frequency", "trace_file", "trace_mode")


@dataclass(frozen=True, slots=True)
class TraceConfig:
    """`--trace-config`. `url` is where OpenTelemetry's OTLP over HTTP goes, `resource` its attributes."""

    mode: Literal["triton", "opentelemetry"] = "triton"
    file: str = ""
    levels: tuple[str, ...] = ("OFF",)
    rate: int = 1000
    count: int = -1
    log_frequency: int = 0
    url: str = "http://localhost:4318/v1/traces"
    resource: Mapping[str, str] = field(default_factory=dict)


def parse_config(arguments: Sequence[str]) -> TraceConfig:
    """The `--trace-config` flags, as `rate=1`, `triton,file=F`, `opentelemetry,url=U`. Raises ConfigError."""
    values: dict[str, Any] = {}
    levels: list[str] = []
    resource: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.removeprefix("triton,").removeprefix("opentelemetry,")
        if not equals:
            raise ConfigError(f"--trace-config {argument}: expected KEY=VALUE")
        if key == "level":
            levels.append(_OLD_LEVELS.get(value, value))
            if levels[-1] not in LEVELS:
                raise ConfigError(f"--trace-config level: expected one of {', '.join(LEVELS)}, got '{value}'")
        elif key == "mode":
            if value not in ("triton", "opentelemetry"):
                raise ConfigError(f"--trace-config mode: expected triton or opentelemetry, got '{value}'")
            values["mode"] = value
        elif key in ("rate", "count", "log-frequency"):
            name = key.replace("-", "_")
            setting = name if name == "log_frequency" else f"trace_{name}"
            try:
                values[name] = _number(setting, value)
            except InvalidArgument as error:
                raise ConfigError(f"--trace-config {key}: {error.message}") from None
        elif key == "resource":
            name, _, text = value.partition("=")
            resource[name] = text
        elif key in ("file", "url"):
            values[key] = value
        else:
            raise ConfigError(f"--trace-config: unknown setting '{key}'")
    if levels:
        values["levels"] = tuple(levels)
    return TraceConfig(**values, resource=resource)


def _number(setting: str, text: str) -> int:
    least = _NUMBERS[setting]
    try:
        number = int(text)
    except ValueError:
        raise InvalidArgument(f"Unable to parse '{setting}', got: {text[:100]}") from None
    if number < least:
        raise InvalidArgument(f"Unable to parse '{setting}'. Expecting value >= {least}, got:{number}")
    return number


class Writer(Protocol):
    """Where finished traces go."""

    def write(self, record: Record) -> None: ...
    def flush(self) -> None: ...


class Tracer:
    """Decides which requests are traced, and hands the traces on. Thread-safe."""

    def __init__(self, config: TraceConfig | None = None) -> None:
        self._config = config or TraceConfig()
        config = self._config
        self._lock = threading.Lock()
        self._global: dict[str, Any] = {
            "trace_level": [level for level in config.levels if level != "OFF"] or ["OFF"],
            "trace_rate": config.rate,
            "trace_count": config.count,
            "log_frequency": config.log_frequency,
        }
        self._by_model: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, int] = {}
        self._traced = 0
        check(config)
        self._numbers = numbers()
        # Whoever knows the models says which version a refused request was for.
        self.version_of: VersionOf = lambda request: request.model_version
        self._writer: Writer = (
            OpenTelemetryWriter(config.url, config.resource)
            if config.mode == "opentelemetry"
            else JsonWriter(config.file, self.log_frequency)
        )
        self.is_on = self._is_any_on()
        # Who is told when settings have changed.
        self._listeners: list[Callable[[], None]] = []

    def listen(self, changed: Callable[[], None]) -> None:
        """Have `changed` called whenever settings have."""
        self._listeners.append(changed)

    @property
    def needs_headers(self) -> bool:
        """Whether a trace may be part of one that the request's headers name."""
        return self._config.mode == "opentelemetry"

    def settings(self, model: str = "") -> dict[str, Any]:
        """A model's settings, or the global ones: level as a list, all else as text."""
        values = {**self._global, **self._by_model.get(model, {})}
        return {
            "trace_level": list(values["trace_level"]),
            **{name: str(values[name]) for name in _NUMBERS},
            "trace_file": self._config.file,
            "trace_mode": self._config.mode,
        }

    def log_frequency(self) -> int:
        return int(self._global["log_frequency"])

    def update(self, model: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change a model's settings, or with "" the global ones; None goes back to the default. Returns all.

        Raises InvalidArgument for a name or value that does not fit; Unsupported for the file: a client must not
        choose where the server writes.
        """
        checked = {key: self._checked(key, value) for key, value in changes.items()}
        with self._lock:
            target = self._by_model.setdefault(model, {}) if model else self._global
            for key, value in checked.items():
                if value is not None:
                    target[key] = value
                elif model:
                    target.pop(key, None)
                else:
                    defaults = {"trace_level": list(self._config.levels), "trace_rate": self._config.rate}
                    defaults |= {"trace_count": self._config.count, "log_frequency": self._config.log_frequency}
                    target[key] = defaults[key]
            if "trace_count" in checked:
                self._traced = 0
            self.is_on = self._is_any_on()
        for changed in self._listeners:
            changed()
        self._writer.flush()
        return self.settings(model)

    def _checked(self, key: str, value: Any) -> Any:
        if key == "trace_file":
            raise Unsupported("trace file location can not be updated through network protocol")
        if key == "trace_mode":
            raise Unsupported("trace mode can not be updated through network protocol")
        if key not in _SETTINGS:
            raise InvalidArgument(f"trace setting {key[:100]!r}: expected one of {', '.join(_SETTINGS)}")
        if value is None:
            return None
        if key == "trace_level":
            named = value if isinstance(value, list) else [None]
            levels = [_OLD_LEVELS.get(level, level) if isinstance(level, str) else "" for level in named]
            if not all(level in LEVELS for level in levels):
                raise InvalidArgument(f"trace setting 'trace_level': expected a list of {', '.join(LEVELS)}")
            if "OFF" in levels or not levels:
                return ["OFF"]
            if self._config.mode == "triton" and not self._config.file:
                raise InvalidArgument(
                    "Attempting to set invalid trace setting :trace file name is not given: start the server with "
                    "--trace-config triton,file=FILE"
                )
            return levels
        if not isinstance(value, str):
            raise InvalidArgument(f"trace setting '{key}': expected a number as text, got {str(value)[:100]!r}")
        return _number(key, value)

    def _is_any_on(self) -> bool:
        return any(values.get("trace_level", ["OFF"]) != ["OFF"] for values in (self._global, *self._by_model.values()))

    def begin(
        self, call: Call, context: str = "", protocol: str = "", received_ns: int = 0, started_ns: int = 0
    ) -> None:
        """Trace the call if its turn has come. Ask `is_on` first.

        `protocol` is that of the front-end that takes it, "HTTP" or "GRPC", which has begun to at `received_ns`. One in
        another process has taken it at `started_ns`.
        """
        model = call.request.model_name
        with self._lock:
            values = {**self._global, **self._by_model.get(model, {})}
            if values["trace_level"] == ["OFF"]:
                return
            # Each model with settings of its own is sampled on its own.
            counter = model if model in self._by_model else ""
            seen = self._seen.get(counter, 0) + 1
            self._seen[counter] = seen
            if seen % values["trace_rate"] or 0 <= values["trace_count"] <= self._traced:
                return
            self._traced += 1
        record = Record(self._numbers, call, "TENSORS" in values["trace_level"], context, version_of=self.version_of)
        record.protocol = protocol
        if started_ns:
            record.timestamps = [("REQUEST_START", started_ns)]
        if protocol:
            ((_, started_ns),) = record.timestamps
            record.record(f"{protocol}_RECV_START", received_ns or started_ns)
            record.record(f"{protocol}_RECV_END", started_ns)
        call.trace = record
        # It goes through ensembles by itself: what is told of its steps is to be about it alone.
        call.request.signature = None

    def end(self, call: Call) -> None:
        """The call has its answer."""
        record = call.trace
        if not isinstance(record, Record):
            return
        call.trace = None
        try:
            record.end(call)
            self._writer.write(record)
        except Exception:
            _log.exception("a trace could not be written")

    def close(self) -> None:
        self._writer.flush()


def check(config: TraceConfig) -> None:
    """Raises ConfigError for traces that have no file, or one that cannot be written on this machine."""
    if config.mode == "triton" and config.file:
        _check_file(Path(config.file))
    elif config.mode == "triton" and set(config.levels) != {"OFF"}:
        raise ConfigError("--trace-config: level is set, but triton,file is not")


def _check_file(path: Path) -> None:
    """Raises ConfigError for a file that cannot be written."""
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"--trace-config triton,file={path}: there is no folder '{folder}'")
    if path.is_dir():
        raise ConfigError(f"--trace-config triton,file={path}: expected a file, and that is a folder")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"--trace-config triton,file={path}: it may not be written")
