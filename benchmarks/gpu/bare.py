"""A loop around a module with nothing else: what a server could reach at best, with the inputs that it is asked.

Inputs come from pinned memory and answers go to pinned memory, each batch anew. Overlapped, three batches are under
way: one is copied in, one executes, one is copied out, on a stream each, ordered by events.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_DEPTH = 3
_WARM = 3


class Slot:
    """One batch's place: pinned inputs and output, the tensors on the card, and the events between the streams."""

    def __init__(self, inputs: Sequence[torch.Tensor], output: torch.Tensor, device: str) -> None:
        self.host = [tensor.pin_memory() for tensor in inputs]
        self.there = [torch.empty_like(tensor, device=device) for tensor in inputs]
        self.answer = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
        self.output = output
        self.graph: Any = None
        self.loaded, self.ran = torch.cuda.Event(), torch.cuda.Event()
        self.done = torch.cuda.Event(blocking=True)


class Loop:
    """`module` on `device` over batches of `inputs` (on the host). Raises torch.OutOfMemoryError."""

    def __init__(self, module: Callable[..., Any], inputs: Sequence[torch.Tensor], device: str) -> None:
        self._module = module
        self._inputs = inputs
        self._device = device
        self.rows = inputs[0].shape[0]
        self._is_gpu = device != "cpu"
        self._slots: list[Slot] = []
        if self._is_gpu:
            self._streams = [torch.cuda.Stream(device) for _ in range(3)]
            self._prepare()

    def _prepare(self) -> None:
        _, execute, _ = self._streams
        execute.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(execute):
            there = [tensor.to(self._device) for tensor in self._inputs]
            for _ in range(_WARM):
                output = self._module(*there)
            execute.synchronize()
            self._slots = [Slot(self._inputs, output, self._device) for _ in range(_DEPTH)]
        torch.cuda.synchronize()

    def capture(self) -> None:
        """A graph for each slot, each with memory of its own: the output of one is read while the next executes."""
        _, execute, _ = self._streams
        with torch.inference_mode():
            for slot in self._slots:
                for tensor, source in zip(slot.there, slot.host, strict=True):
                    tensor.copy_(source)
                torch.cuda.synchronize()
                slot.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(slot.graph, stream=execute):
                    slot.output = self._module(*slot.there)
        torch.cuda.synchronize()

    def one_s(self, seconds: float) -> float:
        """The median time of a batch that is waited for before the next is begun."""
        times: list[float] = []
        began = time.perf_counter()
        with torch.inference_mode():
            while len(times) < _WARM + 3 or time.perf_counter() - began < seconds:
                start = time.perf_counter()
                self._once()
                times.append(time.perf_counter() - start)
        return statistics.median(times[_WARM:])

    def _once(self) -> None:
        if not self._is_gpu:
            self._module(*self._inputs)
            return
        slot, (_, execute, _) = self._slots[0], self._streams
        with torch.cuda.stream(execute):
            for tensor, source in zip(slot.there, slot.host, strict=True):
                tensor.copy_(source, non_blocking=True)
            self._execute(slot)
            slot.answer.copy_(slot.output, non_blocking=True)
        execute.synchronize()

    def rate(self, seconds: float) -> float:
        """Rows a second with three batches under way (on a processor, one after the other)."""
        with torch.inference_mode():
            count, began = 0, time.perf_counter()
            slots = itertools.cycle(self._slots or [None])
            while count < 2 * _DEPTH or time.perf_counter() - began < seconds:
                slot = next(slots)
                if slot is None:
                    self._module(*self._inputs)
                else:
                    slot.done.synchronize()  # the batch that was in it before
                    self._submit(slot)
                count += 1
            if self._is_gpu:
                torch.cuda.synchronize()
            return float(count * self.rows / (time.perf_counter() - began))

    def _submit(self, slot: Slot) -> None:
        copy_in, execute, copy_out = self._streams
        with torch.cuda.stream(copy_in):
            for tensor, source in zip(slot.there, slot.host, strict=True):
                tensor.copy_(source, non_blocking=True)
            slot.loaded.record(copy_in)
        with torch.cuda.stream(execute):
            execute.wait_event(slot.loaded)
            self._execute(slot)
            slot.ran.record(execute)
        with torch.cuda.stream(copy_out):
            copy_out.wait_event(slot.ran)
            slot.answer.copy_(slot.output, non_blocking=True)
            slot.done.record(copy_out)

    def _execute(self, slot: Slot) -> None:
        if slot.graph is not None:
            slot.graph.replay()
        else:
            slot.output = self._module(*slot.there)

    def answer(self) -> torch.Tensor:
        """Of one batch, to compare."""
        with torch.inference_mode():
            if not self._is_gpu:
                return torch.as_tensor(self._module(*self._inputs))
            self._once()
            return self._slots[0].answer.clone()
