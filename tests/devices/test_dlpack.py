"""Capsules as torch and numpy make them, old and new: what they say, and what is made of them."""

import ctypes
import gc
import weakref
from typing import Any

import numpy as np
import pytest

from tests.devices.fakes import on_device
from tutti.devices import dlpack

torch = pytest.importorskip("torch")

TYPES = [
    (torch.bool, "BOOL"),
    (torch.uint8, "UINT8"),
    (torch.uint16, "UINT16"),
    (torch.uint32, "UINT32"),
    (torch.uint64, "UINT64"),
    (torch.int8, "INT8"),
    (torch.int16, "INT16"),
    (torch.int32, "INT32"),
    (torch.int64, "INT64"),
    (torch.float16, "FP16"),
    (torch.bfloat16, "BF16"),
    (torch.float32, "FP32"),
    (torch.float64, "FP64"),
]
VERSIONS = [None, (1, 0)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("dtype", "datatype"), TYPES)
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4), (1, 1, 5)])
def test_a_capsule_is_read_and_becomes_an_array(dtype: Any, datatype: str, shape: Any, version: Any) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    capsule = tensor.__dlpack__(max_version=version)
    described = dlpack.describe(capsule)
    assert described == dlpack.Description(dlpack.CPU, 0, datatype, shape)
    assert described.nbytes == tensor.numel() * tensor.element_size()
    array = dlpack.as_array(capsule)
    assert array.shape == shape
    assert array.dtype == dlpack.NUMPY[datatype]
    assert array.tobytes() == bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if array.size else True


def test_no_byte_is_copied() -> None:
    tensor = torch.arange(6)
    assert dlpack.as_array(tensor.__dlpack__()).ctypes.data == tensor.data_ptr()
    part = torch.arange(12).reshape(4, 3)[2:]  # row-major, and begins elsewhere
    assert dlpack.as_array(part.__dlpack__()).tolist() == [[6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize("version", VERSIONS)
def test_memory_lives_as_long_as_its_array(version: Any) -> None:
    memory = np.arange(4.0)
    array = dlpack.as_array(memory.__dlpack__(max_version=version))
    gone = weakref.ref(memory)
    del memory
    gc.collect()
    assert array.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert gone() is not None
    del array
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("version", VERSIONS)
def test_a_capsule_is_good_for_one_consumer(version: Any) -> None:
    capsule = torch.arange(3).__dlpack__(max_version=version)
    dlpack.as_array(capsule)
    with pytest.raises(ValueError, match="consumed already"):
        dlpack.describe(capsule)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3).T,
        torch.arange(6)[::2],
        torch.arange(12).reshape(3, 4)[:, :2],
        torch.ones(1).expand(3),
    ],
)
def test_gaps_and_other_orders_are_refused(tensor: Any) -> None:
    with pytest.raises(ValueError, match="Only contiguous DLPack"):
        dlpack.describe(tensor.__dlpack__())


def test_strides_of_axes_with_one_element_do_not_matter() -> None:
    tensor = torch.arange(8).reshape(4, 2)[:1]
    assert dlpack.describe(tensor.as_strided((1, 2), (99, 1)).__dlpack__()).shape == (1, 2)


def test_elements_without_a_name_are_refused() -> None:
    with pytest.raises(ValueError, match="code 5, 64 bits, 1 lanes"):
        dlpack.describe(torch.zeros(2, dtype=torch.complex64).__dlpack__())


def test_a_capsule_of_something_else_or_too_new_is_refused() -> None:
    new = ctypes.PyDLL(None).PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p,) * 3
    name = ctypes.create_string_buffer(b"datetime_CAPI")
    with pytest.raises(ValueError, match="no DLPack capsule: b'datetime_CAPI'"):
        dlpack.describe(new(ctypes.addressof(name), ctypes.addressof(name), None))
    struct = dlpack._Versioned(major=2, minor=3)
    title = ctypes.create_string_buffer(b"dltensor_versioned")
    with pytest.raises(ValueError, match=r"version 2\.3, expected 1\.x"):
        dlpack.describe(new(ctypes.addressof(struct), ctypes.addressof(title), None))


def test_devices_are_told() -> None:
    described = dlpack.describe(on_device(torch.ones(2).__dlpack__(), dlpack.CUDA, 3))
    assert (described.device_type, described.device_id) == (dlpack.CUDA, 3)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_same_bits_by_another_name(version: Any) -> None:
    numbers = np.array([0x3F80, 0x4000], np.uint16)
    tensor = torch.from_dlpack(dlpack.relabel(numbers.__dlpack__(max_version=version), "BF16"))
    assert tensor.dtype == torch.bfloat16
    assert tensor.tolist() == [1.0, 2.0]


def test_what_is_a_capsule() -> None:
    assert dlpack.is_capsule(torch.ones(1).__dlpack__())
    assert not dlpack.is_capsule(torch.ones(1))
