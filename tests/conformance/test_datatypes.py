"""Every datatype and several shapes through identity models: tutti and a real tritonserver give back the same bytes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient

from tests.models import Repository
from tests.peers import tritonserver
from tests.serving import serving
from tutti.dtypes import NUMPY

pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

DATATYPES = [name for name in NUMPY if name != "BF16"]  # numpy, and so Triton's python backend, knows no BF16
SHAPES = [(1,), (7,), (0,)]
ECHO = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x)])
"""


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, str]]]:
    """Addresses of tutti and of tritonserver, both over the same identity models."""
    tritonserver.require()
    scratch = tmp_path_factory.mktemp("datatypes")
    repository = Repository(scratch / "models")
    for datatype in DATATYPES:
        kind = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
        repository.add_python(
            f"echo_{datatype}",
            f"""
            backend: "python" max_batch_size: 0
            input {{ name: "x" data_type: {kind} dims: -1 }}
            output {{ name: "y" data_type: {kind} dims: -1 }}
            """,
            ECHO,
        )
    with (
        tritonserver.running(repository.root, scratch) as theirs,
        serving(repository.root, scratch / "tutti.log") as ours,
    ):
        yield [{"http": ours.http, "grpc": ours.grpc}, {"http": theirs.http, "grpc": theirs.grpc}]


def values(datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(len(datatype) + sum(shape))
    dtype = NUMPY[datatype]
    if datatype == "BYTES":
        array = np.empty(shape, dtype=object)
        array[...] = [[b"", b"a", "ü".encode(), b"\x00\xff", b"long" * 100][i % 5] for i in range(array.size)]
        return array
    if dtype.kind == "f":
        return rng.normal(0, 100, shape).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def echo(library: Any, url: str, datatype: str, array: np.ndarray, **data: bool) -> np.ndarray:
    client = library.InferenceServerClient(url)
    tensor = library.InferInput("x", list(array.shape), datatype)
    tensor.set_data_from_numpy(array, **data)
    wanted = [library.InferRequestedOutput("y", **data)]
    return client.infer(f"echo_{datatype}", [tensor], outputs=wanted).as_numpy("y")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("datatype", DATATYPES)
def test_the_same_comes_back_from_both(addresses: list[dict[str, str]], datatype: str, shape: tuple[int, ...]) -> None:
    array = values(datatype, shape)
    for server in addresses:
        for answer in (
            echo(grpcclient, server["grpc"], datatype, array),
            echo(httpclient, server["http"], datatype, array, binary_data=True),
        ):
            # An empty BYTES tensor comes back from the client without its type.
            assert answer is not None
            assert answer.shape == array.shape
            assert answer.tolist() == array.tolist()


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name != "FP16"])
def test_json_carries_every_datatype_but_fp16(addresses: list[dict[str, str]], datatype: str) -> None:
    array = values(datatype, (7,))
    if datatype == "BYTES":  # JSON carries text only
        array = np.array([b"a", "ü".encode(), b""], dtype=object)
    ours, theirs = (echo(httpclient, server["http"], datatype, array, binary_data=False) for server in addresses)
    assert [str(x) for x in ours.tolist()] == [str(x) for x in theirs.tolist()]
    np.testing.assert_array_equal(ours, theirs)
