"""Traces as OpenTelemetry spans, nested as Triton's are, sent by OTLP over HTTP.

A request is "InferRequest", with the front-end's events; in it is a span named as its model, with one for its
computation, and those of its steps. Monotonic times are moved to wall-clock time.
"""

import time
from collections.abc import Mapping
from typing import Any

from tutti.core import extras
from tutti.core.errors import ConfigError
from tutti.core.types import now_ns
from tutti.observing.trace_records import Record


class OpenTelemetryWriter:
    """Spans of finished traces; the library sends them from a thread of its own."""

    def __init__(self, url: str, resource: Mapping[str, str]) -> None:
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
            resource=Resource.create({"service.name": "triton-inference-server", **resource}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url), schedule_delay_millis=500))
        self._tracer = self._provider.get_tracer("tutti")
        self._propagator = TraceContextTextMapPropagator()
        self._offset_ns = time.time_ns() - now_ns()

    def write(self, record: Record) -> None:
        above = self._propagator.extract({"traceparent": record.context}) if record.context else None
        times = record.sorted()
        of_front_end = [stamp for stamp in times if _is_of_front_end(stamp[0])]
        attributes = {"triton.request_id": record.request.id} if record.request.id else {}
        span = self._begun("InferRequest", above, times[0][1], attributes)
        self._told(span, of_front_end)
        self._write_model(record, self._within(span))
        self._end(span, times[-1][1], record.error)

    def _write_model(self, record: Record, above: Any) -> None:
        times = [stamp for stamp in record.sorted() if not _is_of_front_end(stamp[0])]
        outside = [stamp for stamp in times if not stamp[0].startswith("COMPUTE_")]
        computing = [stamp for stamp in times if stamp[0].startswith("COMPUTE_")]
        span = self._begun(record.request.model_name, above, times[0][1], _attributes(record))
        self._told(span, outside)
        if computing:
            compute = self._begun("compute", self._within(span), computing[0][1], {})
            self._told(compute, computing)
            self._end(compute, computing[-1][1], "")
        for step in list(record.steps):
            self._write_model(step, self._within(span))
        self._end(span, times[-1][1], record.error)

    def _begun(self, name: str, above: Any, at_ns: int, attributes: Mapping[str, Any]) -> Any:
        from opentelemetry.trace import SpanKind

        return self._tracer.start_span(
            name, above, kind=SpanKind.SERVER, start_time=at_ns + self._offset_ns, attributes=dict(attributes)
        )

    def _told(self, span: Any, times: list[tuple[str, int]]) -> None:
        for name, ns in times:
            span.add_event(name, timestamp=ns + self._offset_ns)

    def _end(self, span: Any, at_ns: int, error: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        if error:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(at_ns + self._offset_ns)

    def _within(self, span: Any) -> Any:
        from opentelemetry.trace import set_span_in_context

        return set_span_in_context(span)

    def flush(self) -> None:
        self._provider.force_flush(5000)


def _is_of_front_end(activity: str) -> bool:
    return activity.startswith(("HTTP_", "GRPC_", "INFER_"))


def _attributes(record: Record) -> dict[str, Any]:
    """Triton's, and under our own name what its traces do not say."""
    request_id = {"triton.request_id": record.request.id} if record.request.id else {}
    return {
        "triton.model_name": record.request.model_name,
        "triton.model_version": record.version or "-1",
        "triton.trace_id": record.id,
        "triton.trace_parent_id": record.parent.id if record.parent is not None else 0,
        **request_id,
        **{f"tutti.{fact}": value for fact, value in record.notes.items()},
    }
