"""What `auto_complete_config` of a model changes: its configuration."""

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2 as pb

from tutti.repository.config import as_json


class ModelConfig:
    """What `auto_complete_config` completes: a model's configuration, as a dictionary in Triton's JSON form."""

    def __init__(self, proto: Any) -> None:
        self._proto = proto

    def as_dict(self) -> dict[str, Any]:
        return as_json(self._proto)

    def add_input(self, spec: Mapping[str, Any]) -> None:
        """Add `{"name", "data_type", "dims"[, "optional"]}`, or check it against what is there."""
        self._add(self._proto.input, "input", spec)

    def add_output(self, spec: Mapping[str, Any]) -> None:
        self._add(self._proto.output, "output", spec)

    def _add(self, field: Any, kind: str, spec: Mapping[str, Any]) -> None:
        unknown = set(spec) - {"name", "data_type", "dims", "optional"}
        if unknown:
            raise ValueError(f"model '{self._proto.name}': {kind} has unexpected properties {sorted(unknown)}")
        for key in ("name", "data_type", "dims"):
            if key not in spec:
                raise ValueError(f"model '{self._proto.name}': {kind} lacks the property '{key}'")
        for known in field:
            if known.name == spec["name"]:
                data_type, dims = pb.DataType.Value(spec["data_type"]), list(spec["dims"])
                if known.data_type and (known.data_type, list(known.dims)) != (data_type, dims):
                    raise ValueError(
                        f"model '{self._proto.name}': {kind} '{known.name}' is configured otherwise than "
                        f"auto_complete_config says: {spec}"
                    )
                known.data_type = data_type
                known.dims[:] = dims
                return
        json_format.ParseDict(dict(spec), field.add())

    def set_max_batch_size(self, size: int) -> None:
        """Where the configuration gives none, or less. Raises ValueError where it asks for more than the model can."""
        if self._proto.max_batch_size > size:
            raise ValueError(
                f"model '{self._proto.name}': configuration specified max_batch_size {self._proto.max_batch_size}, "
                f"auto_complete_config says that the model takes {size}"
            )
        self._proto.max_batch_size = size

    def set_dynamic_batching(self) -> None:
        """Raises ValueError where the configuration has another scheduler."""
        other = self._proto.WhichOneof("scheduling_choice")
        if other not in (None, "dynamic_batching"):
            raise ValueError(
                f"model '{self._proto.name}': Configuration specified scheduling_choice as '{other}', "
                "auto_complete_config sets dynamic_batching"
            )
        self._proto.dynamic_batching.SetInParent()

    def set_model_transaction_policy(self, policy: Mapping[str, bool]) -> None:
        """Raises ValueError where the configuration says that the model is decoupled, and this that it is not."""
        unknown = set(policy) - {"decoupled"}
        if unknown:
            raise ValueError(f"model '{self._proto.name}': model_transaction_policy has unknown {sorted(unknown)}")
        configured = self._proto.model_transaction_policy
        is_decoupled = policy.get("decoupled", configured.decoupled)
        if configured.decoupled and not is_decoupled:
            raise ValueError(
                f"model '{self._proto.name}': trying to change decoupled property, which its configuration sets to "
                "'True': auto_complete_config sets it to 'False'"
            )
        configured.decoupled = is_decoupled
