"""Of `check`: device memory that runs out, that comes back, and that clients share."""

import contextlib
import threading
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import models, repository, served, server
from benchmarks.gpu.context import Context, NotThereYetError
from benchmarks.gpu.requests import Request

_MIB = 1 << 20
_REQUESTS = 16


class Hungry(torch.nn.Module):
    """x [batch, 1] -> x, by way of `mib` MiB for each row."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        self.mib = mib
        self.register_buffer("ones", torch.ones(_MIB // 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.unsqueeze(2).expand(-1, self.mib, -1) * self.ones
        return wide.mean((1, 2)).unsqueeze(1)


def halving(context: Context) -> None:
    """Eight rows need half as much again as the card has; five or fewer fit."""
    total = torch.cuda.get_device_properties(0).total_memory
    folder = served.fresh(context, "check-halving")
    root = served.fresh(context, "check-halving/models")
    text = repository.floats("pytorch", context.device, 1, 1)
    repository.add_module(root, "hungry", Hungry(int(total / 5.5) // _MIB), 1, text)
    with server.tutti(root, folder / "server.log") as tutti:
        said: dict[int, Any] = {}

        def ask(number: int) -> None:
            try:
                said[number] = float(
                    tutti.infer(Request("hungry", [("x", np.array([[number]], np.float32))]))["y"][0, 0]
                )
            except Exception as error:
                said[number] = f"{type(error).__name__}: {error}"

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(_REQUESTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wrong = [
            value for number, value in said.items() if isinstance(value, str) or abs(value - number) > 0.01 * number
        ]
        context.check(f"{_REQUESTS} at once", not wrong, wrong=str(wrong[0])[:300] if wrong else "none")
        told = [line for line in tutti.said().splitlines() if "memory" in line.lower()]
        context.emit("log", {"said": told[-1][:200] if told else "nothing of memory"})


def load_unload(context: Context) -> None:
    """Fifty times; what it takes is given back, and no more is taken at the end than near the beginning."""
    times = 4 if context.is_short else 50
    spec = models.specs(context.is_short)["minilm"]
    folder = served.fresh(context, "check-loading")
    root = served.fresh(context, "check-loading/models")
    name = repository.add_spec(root, spec, "fp32", context.device, context.work, context.is_short, 64)
    asked = served.request(spec, name)
    truth = models.reference(spec, [array for _, array in asked.tensors])
    # A server without a model is not ready: it begins with it.
    flags = ("--model-control-mode=explicit", f"--load-model={name}")
    with server.tutti(root, folder / "server.log", *flags) as tutti:
        loaded, unloaded, is_right = [], [], True
        for _ in range(times):
            tutti.post(f"repository/models/{name}/load")
            is_right &= models.difference(tutti.infer(asked)[spec.output], truth) < served.NEAR["fp32"]
            loaded.append(_used_mib(context, tutti))
            tutti.post(f"repository/models/{name}/unload")
            _wait_until_gone(tutti, name)
            unloaded.append(_used_mib(context, tutti))
        early, kind = unloaded[min(4, times - 2)], "device" if context.is_gpu else "server's"
        context.check("answers", is_right, times=times)
        context.check(
            f"{kind} memory", unloaded[-1] - early < 64, **{
                "MiB loaded": loaded[-1], "MiB unloaded": unloaded[-1], "MiB since early": unloaded[-1] - early,
            },
        )  # fmt: skip


def _wait_until_gone(tutti: server.Server, name: str) -> None:
    pause = threading.Event()
    for _ in range(200):
        if not tutti.is_ready(name):
            return
        pause.wait(0.05)
    raise RuntimeError(f"model '{name}' is still ready ten seconds after it was unloaded")


def _used_mib(context: Context, tutti: server.Server) -> float:
    """Of the card, or of the server's processes on a processor."""
    if not context.is_gpu:
        return float(sum(process.memory_info().rss for process in tutti.processes()) / _MIB)
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    return float(pynvml.nvmlDeviceGetMemoryInfo(handle).used / _MIB)


def cuda_shared_memory(context: Context) -> None:
    """NVIDIA's client writes its inputs on the card and reads the answers there, over both protocols."""
    wanted = _flags()
    if not wanted:
        raise NotThereYetError("`tutti serve` has no flag for shared memory")
    folder = served.fresh(context, "check-shared")
    root = served.fresh(context, "check-shared/models")
    from benchmarks.gpu.check import Double

    text = repository.floats("pytorch", context.device, 1024, 1024)
    repository.add_module(root, "double", Double(), 1024, text)
    with server.tutti(root, folder / "server.log", *wanted) as tutti:
        for protocol in ("http", "grpc"):
            _share(context, protocol, tutti)


def _flags() -> list[str]:
    """What allows it: a flag of its own, where there is one, and that of system shared memory."""
    found = []
    for parts in (("cuda", "shm"), ("cuda", "shared"), ("allow", "shm")):
        with contextlib.suppress(NotThereYetError):
            found.append(server.flag(*parts))
    return list(dict.fromkeys(found))


def _share(context: Context, protocol: str, tutti: server.Server) -> None:
    import importlib

    from tritonclient.utils import InferenceServerException
    from tritonclient.utils import cuda_shared_memory as shm

    library = importlib.import_module(f"tritonclient.{protocol}")
    x = np.arange(4 * 1024, dtype=np.float32).reshape(4, 1024)
    regions = {name: shm.create_shared_memory_region(name, x.nbytes, 0) for name in ("x", "y")}
    try:
        shm.set_shared_memory_region(regions["x"], [x])
        with library.InferenceServerClient(tutti.http if protocol == "http" else tutti.grpc) as client:
            try:
                for name, region in regions.items():
                    client.register_cuda_shared_memory(name, shm.get_raw_handle(region), 0, x.nbytes)
            except InferenceServerException as error:
                raise NotThereYetError(f"{protocol}: {error}") from None
            tensor = library.InferInput("x", list(x.shape), "FP32")
            tensor.set_shared_memory("x", x.nbytes)
            wanted = library.InferRequestedOutput("y")
            wanted.set_shared_memory("y", x.nbytes)
            client.infer("double", [tensor], outputs=[wanted])
            said = shm.get_contents_as_numpy(regions["y"], np.float32, list(x.shape))
            client.unregister_cuda_shared_memory()
        context.check(protocol, bool((said == 2 * x + 1).all()))
    finally:
        for region in regions.values():
            shm.destroy_shared_memory_region(region)
