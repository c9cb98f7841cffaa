"""Traces of single requests: Triton's trace settings, its JSON files, and OpenTelemetry spans.

Timestamps are of the monotonic clock in nanoseconds, as in Triton's files; spans are moved to wall-clock time.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from tutti import extras
from tutti.errors import ConfigError, InvalidArgument, Unsupported
from tutti.types import Call, InferResponse, Tensor, now_ns

_log = logging.getLogger(__name__)

LEVELS = ("OFF", "TIMESTAMPS", "TENSORS")
_OLD_LEVELS = {"MIN": "TIMESTAMPS", "MAX": "TIMESTAMPS"}
_NUMBERS = {"trace_rate": 1, "trace_count": -1, "log_frequency": 0}  # name -> the least allowed
_MAX_HELD = 1000
_MAX_HELD_BYTES = 8 * 1024 * 1024
# Of a larger tensor a trace has only so many elements: their text takes 20 bytes each.
MAX_ELEMENTS = 64 * 1024
_LEAST_DELAY_S, _GREATEST_DELAY_S = 1.0, 60.0
_PIECE_BYTES = 1024 * 1024
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


class Record:
    """One request's trace. `context` is the W3C traceparent of the span that the request is part of."""

    def __init__(self, identity: int, call: Call, with_tensors: bool, context: str) -> None:
        self.id = identity
        self.request = call.request
        self.with_tensors = with_tensors
        self.context = context
        self.timestamps: list[tuple[str, int]] = []
        self.tensors: list[tuple[str, Tensor]] = []
        self.version = ""
        self.error = ""

    def record(self, activity: str, ns: int) -> None:
        self.timestamps.append((activity, ns))

    def executed_with(self, rows: int) -> None:
        """Triton's traces do not say."""


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
        if self._global["trace_level"] != ["OFF"] and config.mode == "triton" and not config.file:
            raise ConfigError("--trace-config: level is set, but triton,file is not")
        self._writer: Writer = OpenTelemetryWriter(config) if config.mode == "opentelemetry" else JsonWriter(self)
        self.is_on = self._is_any_on()

    @property
    def file(self) -> str:
        return self._config.file

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

    def begin(self, call: Call, context: str = "") -> None:
        """Trace the call if its turn has come. Ask `is_on` first."""
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
            record = Record(self._traced, call, "TENSORS" in values["trace_level"], context)
        record.record("REQUEST_START", now_ns())
        call.trace = record

    def end(self, call: Call) -> None:
        """The call has its answer."""
        record = call.trace
        if not isinstance(record, Record):
            return
        record.record("REQUEST_END", now_ns())
        if isinstance(call.answer, InferResponse):
            record.version = call.answer.model_version
            if record.with_tensors:
                record.tensors = [("TENSOR_QUEUE_INPUT", tensor) for tensor in call.request.inputs.values()]
                record.tensors += [("TENSOR_BACKEND_OUTPUT", tensor) for tensor in call.answer.outputs]
        elif call.answer is not None:
            record.error = call.answer.message
        try:
            self._writer.write(record)
        except Exception:
            _log.exception("a trace could not be written")

    def close(self) -> None:
        self._writer.flush()


class JsonWriter:
    """Triton's trace files: all in `file`; or with a log frequency every so many traces in `file.0`, `file.1`, ...

    Without a frequency they are written at the end, when settings change, and whenever _MAX_HELD, or _MAX_HELD_BYTES of
    their text, wait. A full disk costs the traces, and no more.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._lock = threading.Lock()
        self._texts: list[bytes] = []
        self._held = 0
        self._waiting = 0
        # After a failure nothing is tried for so long, each time twice as long.
        self._delay_s = self._waits_until_s = 0.0
        self._files = 0
        self._is_begun = False

    def write(self, record: Record) -> None:
        version = int(record.version or 0)
        entries: list[dict[str, Any]] = [
            {"id": record.id, "model_name": record.request.model_name, "model_version": version},
            {"id": record.id, "timestamps": [{"name": name, "ns": ns} for name, ns in sorted_by_time(record)]},
        ]
        if record.request.id:
            entries[0]["request_id"] = record.request.id
        entries += [{"id": record.id, "activity": what, "tensor": _shown(tensor)} for what, tensor in record.tensors]
        with self._lock:
            if self._waits_until_s > time.monotonic():
                return
            self._texts += [json.dumps(entry).encode() for entry in entries]
            self._held += sum(map(len, self._texts[-len(entries) :]))
            self._waiting += 1
            is_full = self._waiting >= (self._tracer.log_frequency() or _MAX_HELD)
            # With a frequency a file has so many traces, unless they are too large to wait for each other.
            if is_full or self._held >= _MAX_HELD_BYTES:
                self._put()

    def flush(self) -> None:
        with self._lock:
            if self._waiting and self._tracer.file:
                self._put()

    def _put(self) -> None:
        """Write what is held; where that fails it is dropped, and so is what comes before the next try."""
        texts, self._texts, self._held, self._waiting = self._texts, [], 0, 0
        try:
            if self._tracer.log_frequency():
                Path(f"{self._tracer.file}.{self._files}").write_bytes(b"[%b]" % b", ".join(texts))
                self._files += 1
            else:
                self._append(Path(self._tracer.file), b", ".join(texts))
        except OSError as error:
            self._delay_s = min(max(2 * self._delay_s, _LEAST_DELAY_S), _GREATEST_DELAY_S)
            self._waits_until_s = time.monotonic() + self._delay_s
            _log.error("traces are dropped for %g s, they cannot be written: %s", self._delay_s, error)
        else:
            self._delay_s = 0.0

    def _append(self, path: Path, entries: bytes) -> None:
        """Put entries before the bracket that ends the file's array. It ends with one even where this fails."""
        if not self._is_begun:
            path.write_bytes(b"[%b]" % entries)
            self._is_begun = True
            return
        with path.open("r+b", buffering=0) as file:
            end = file.seek(-1, os.SEEK_END)
            try:
                _write_all(file, b", %b]" % entries)
            except OSError:
                file.truncate(end)
                file.seek(end)
                file.write(b"]")
                raise


def _write_all(file: Any, data: bytes) -> None:
    at = 0
    while at < len(data):
        at += file.write(data[at : at + _PIECE_BYTES])


def sorted_by_time(record: Record) -> list[tuple[str, int]]:
    return sorted(record.timestamps, key=lambda one: one[1])


def _shown(tensor: Tensor) -> dict[str, Any]:
    elements = tensor.array().reshape(-1)
    values = ",".join(_text(value) for value in elements[:MAX_ELEMENTS].tolist())
    cut = {"elements_left_out": len(elements) - MAX_ELEMENTS} if len(elements) > MAX_ELEMENTS else {}
    return {
        **cut,
        "name": tensor.name,
        "data": values,
        "shape": ",".join(map(str, tensor.shape)),
        "dtype": tensor.datatype,
    }


def _text(value: object) -> str:
    """An element; of a long text the beginning, as of a long tensor."""
    return value[:MAX_ELEMENTS].decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class OpenTelemetryWriter:
    """A span per request, and one for its computation within it, by OTLP over HTTP."""

    def __init__(self, config: TraceConfig) -> None:
        """Raises ConfigError when OpenTelemetry is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(
                f"--trace-config mode=opentelemetry needs {error.name}: {extras.install('tracing')}"
            ) from None
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "triton-inference-server", **config.resource}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=config.url), schedule_delay_millis=500)
        )
        self._tracer = self._provider.get_tracer("tutti")
        self._propagator = TraceContextTextMapPropagator()
        self._offset_ns = time.time_ns() - now_ns()

    def write(self, record: Record) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        times = sorted_by_time(record)
        at = {name: ns + self._offset_ns for name, ns in times}
        above = self._propagator.extract({"traceparent": record.context}) if record.context else None
        span = self._tracer.start_span(
            "InferRequest",
            above,
            kind=SpanKind.SERVER,
            start_time=at["REQUEST_START"],
            attributes={
                "triton.model_name": record.request.model_name,
                "triton.model_version": record.version or "-1",
                "triton.trace_id": record.id,
                "triton.request_id": record.request.id,
            },
        )
        for name, ns in times:
            span.add_event(name, timestamp=ns + self._offset_ns)
        if "COMPUTE_START" in at:
            compute = self._tracer.start_span("compute", set_span_in_context(span), start_time=at["COMPUTE_START"])
            compute.end(at["COMPUTE_END"])
        if record.error:
            span.set_status(Status(StatusCode.ERROR, record.error))
        span.end(at["REQUEST_END"])

    def flush(self) -> None:
        self._provider.force_flush(5000)
