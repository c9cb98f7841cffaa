"""An ONNX file as a draft: its graph tells its tensors."""

from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2 as pb

from tutti.core.dtypes import from_config
from tutti.core.errors import ConfigError
from tutti.export import maps
from tutti.export.draft import MAX_BATCH_SIZE, Draft, Field


def draft(source: Path, name: str, work: Path, origin: str = "") -> Draft:
    """Raises ConfigError for what ONNX Runtime does not load. A graph that is changed for it is written into `work`."""
    from tutti.backends import onnxruntime

    proto = pb.ModelConfig(name=name)
    beside = tuple(path for path in sorted(source.parent.glob(f"{source.name}*")) if path != source and path.is_file())
    origin = origin or source.name
    notes: list[str] = []
    try:
        onnxruntime.complete(proto, source)
    except ConfigError as error:
        if "zipmap" not in str(error):
            raise
        notes, source = maps.taken_off(source, work / "unmapped.onnx"), work / "unmapped.onnx"
        proto = pb.ModelConfig(name=name)
        onnxruntime.complete(proto, source)
    size = MAX_BATCH_SIZE if proto.max_batch_size else 0
    if not size:
        notes.append("requests are not joined: not all tensors have a free first axis")
    inputs, outputs = _fields(proto.input), _fields(proto.output)
    return Draft("onnxruntime", source, "model.onnx", inputs, outputs, size, origin, tuple(notes), beside)


def _fields(side: Any) -> tuple[Field, ...]:
    """Of a configuration's message."""
    return tuple(
        Field(
            tensor.name,
            from_config(pb.DataType.Name(tensor.data_type)),
            () if tensor.HasField("reshape") else tuple(tensor.dims),
            tensor.HasField("reshape"),
        )
        for tensor in side
    )
