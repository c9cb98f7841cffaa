"""A client with CUDA memory of its own, by NVIDIA's utilities: `python -m tests.devices.tritonclient_process KIND URL`.

The model is add_one. Says "done" when everything was as it should be.
"""

import sys
from types import ModuleType

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
import tritonclient.utils.cuda_shared_memory as cuda_shared_memory

ROWS = 4
X = np.array([[1, 2, 3, 4]], np.float32)


def main(kind: str, url: str) -> None:
    library = {"http": httpclient, "grpc": grpcclient}[kind]
    with library.InferenceServerClient(url) as client:
        for size in (ROWS * X.nbytes, 8 * 1024 * 1024):  # within a block that others share, and one of its own
            use(client, library, size)
    assert not cuda_shared_memory.allocated_shared_memory_regions()
    print("done")


def use(client: object, library: ModuleType, size: int) -> None:
    memory = cuda_shared_memory.create_shared_memory_region("r", size, 0)
    rows = np.concatenate([X, np.zeros((ROWS - 1, 4), np.float32)])
    cuda_shared_memory.set_shared_memory_region(memory, [rows])
    handle = cuda_shared_memory.get_raw_handle(memory)
    for name in ("r", "again"):
        client.register_cuda_shared_memory(name, handle, 0, size)  # type: ignore[attr-defined]
    for source, target in ((0, 2), (2, 3), (3, 3)):
        ask(client, library, source * X.nbytes, target * X.nbytes)
        rows[target] = rows[source] + 1
        assert content(memory).tolist() == rows.tolist()
    rows[0] = 7  # what is there now counts
    cuda_shared_memory.set_shared_memory_region(memory, [rows])
    ask(client, library, 0, X.nbytes)
    assert content(memory)[1].tolist() == [8] * 4
    client.unregister_cuda_shared_memory("r")  # type: ignore[attr-defined]
    ask(client, library, X.nbytes, 0, "again")
    assert content(memory)[0].tolist() == [9] * 4
    client.unregister_cuda_shared_memory()  # type: ignore[attr-defined]
    cuda_shared_memory.destroy_shared_memory_region(memory)


def ask(client: object, library: ModuleType, source: int, target: int, region: str = "r") -> None:
    sent = library.InferInput("x", [1, 4], "FP32")
    sent.set_shared_memory(region, X.nbytes, offset=source)
    wanted = library.InferRequestedOutput("y")
    wanted.set_shared_memory(region, X.nbytes, offset=target)
    client.infer("add_one", [sent], outputs=[wanted])  # type: ignore[attr-defined]


def content(memory: object) -> np.ndarray:
    made: np.ndarray = cuda_shared_memory.get_contents_as_numpy(memory, np.float32, [ROWS, 4])
    return made


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
