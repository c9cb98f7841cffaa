"""A model's callable in PyTorch: which input is which argument, which output is which result, and what it holds."""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tutti.backends.compiled import Kept
from tutti.core.errors import ConfigError, Internal
from tutti.devices.cuda import TORCH
from tutti.repository.model_config import ModelConfig

_INDEX = re.compile(r".*__(\d+)")


def order_of(config: ModelConfig, arguments: Sequence[str]) -> list[str]:
    """The inputs in the order of forward's arguments. Raises ConfigError naming an input that has no place."""
    names = [spec.name for spec in config.inputs]
    indexed = {int(match[1]): name for name in names if (match := _INDEX.fullmatch(name))}
    if len(indexed) == len(names):
        if sorted(indexed) != list(range(len(names))):
            raise ConfigError(f"model '{config.name}': input: expected __0 to __{len(names) - 1}, got {names}")
        ordered = [indexed[index] for index in range(len(names))]
    elif set(names) <= set(arguments):
        ordered = [name for name in arguments if name in names]
    else:
        ordered = names
    if len(ordered) > len(arguments):
        raise ConfigError(f"model '{config.name}': input: forward takes {list(arguments)}, configured are {names}")
    return ordered


def _tensors(forward: Callable[..., Any]) -> list[torch.Tensor]:
    """Parameters, buffers and constants. TorchScript does not tell of its constants, nor a package of anything."""
    if isinstance(forward, Kept):
        return forward.weights
    if not isinstance(forward, torch.nn.Module):
        return []
    constants = [value for module in forward.modules() for value in vars(module).values()]
    return [
        value for value in (*forward.parameters(), *forward.buffers(), *constants) if isinstance(value, torch.Tensor)
    ]


def _held_bytes(forward: Callable[..., Any]) -> int:
    """What a model's tensors take; what shares memory counts once."""
    storages = [tensor.untyped_storage() for tensor in _tensors(forward)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Module:
    """A model's callable, whose inputs and outputs have names. Instances share it: each begins to use it and ends."""

    def __init__(
        self,
        config: ModelConfig,
        forward: Callable[..., Any],
        arguments: Sequence[str],
        device: str = "cpu",
        writes_inputs: bool = False,
    ) -> None:
        """What `writes_inputs` gets copies: others read the same memory."""
        self._forward = forward
        self._writes_inputs = writes_inputs
        self._device = torch.device(device)
        # Of its weights; activations are the allocator's, which all models share.
        self.nbytes = _held_bytes(forward)
        self._users = 0
        self._lock = threading.Lock()
        self.order = order_of(config, arguments)
        self._outputs = {spec.name: TORCH[spec.datatype] for spec in config.outputs}
        for state in config.sequences.states if config.sequences is not None else ():
            self._outputs[state.output_name] = TORCH[state.datatype]
        self._mode = (
            torch.inference_mode if config.parameters.get("INFERENCE_MODE", "true") == "true" else torch.no_grad
        )

    def begin_use(self) -> None:
        with self._lock:
            self._users += 1

    def end_use(self) -> None:
        """With the last user the weights go: PyTorch's modules refer to themselves, and are collected late."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        for tensor in _tensors(self._forward):
            tensor.data = tensor.new_empty(0)  # what an answer still refers to stays

    def __call__(self, inputs: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
        """The outputs `names` on the module's device, in their configured datatypes and without gaps."""
        with self._mode():
            arguments = [inputs[name] for name in self.order if name in inputs]
            if self._writes_inputs:
                arguments = [tensor.clone() for tensor in arguments]
            outputs = self._named(self._forward(*arguments))
            return [outputs[name].detach().to(self._device, self._outputs[name]).contiguous() for name in names]

    def _named(self, returned: Any) -> Mapping[str, Any]:
        """The outputs by name."""
        names = list(self._outputs)
        if isinstance(returned, Mapping):
            missing = [name for name in names if name not in returned]
            if missing:
                raise Internal(f"forward returned {sorted(map(str, returned))}, not '{missing[0]}'")
            return returned
        tensors = list(returned) if isinstance(returned, tuple | list) else [returned]
        outputs = {}
        for position, name in enumerate(names):
            indexed = _INDEX.fullmatch(name)
            index = int(indexed[1]) if indexed else position
            if index >= len(tensors) or not isinstance(tensors[index], torch.Tensor):
                raise Internal(f"forward returned {len(tensors)} values, none is a tensor for output '{name}'")
            outputs[name] = tensors[index]
        return outputs
