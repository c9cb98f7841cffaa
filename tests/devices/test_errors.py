"""What errors of torch, ONNX Runtime, cupy and others say of a device: their classes are made here by name."""

import pytest

from tutti.devices.errors import is_out_of_memory, is_unclear, sticky


def of_class(name: str, text: str, **attributes: object) -> Exception:
    """An exception as another library's, which is known by the name of its class alone."""
    error: Exception = type(name, (RuntimeError,), {})(text)
    for key, value in attributes.items():
        setattr(error, key, value)
    return error


TORCH = (
    "CUDA error: {}\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace "
    "below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
)
ORT = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Gather node. Name:'g' Status Message: "
    "CUDA failure {}: {} ; GPU=0 ; hostname=h ; file=/onnxruntime_src/x.cc ; line=129 ; expr=cudaStreamSynchronize(s);"
)
STICKY_TEXTS = {
    214: "uncorrectable ECC error encountered",
    226: "Invalid access of peer GPU memory over nvlink or a hardware error",
    700: "an illegal memory access was encountered",
    702: "the launch timed out and was terminated",
    710: "device-side assert triggered",
    714: "hardware stack error",
    715: "an illegal instruction was encountered",
    716: "misaligned address",
    717: "operation not supported on global/shared address space",
    718: "invalid program counter",
    719: "unspecified launch failure",
    721: "tensor memory not completely freed",
    810: "the MPS client has been terminated by the server",
    911: "an async error has occured in external entity outside of CUDA",
    999: "unknown error",
}
OTHER_TEXTS = {
    1: "invalid argument",
    2: "out of memory",
    9: "invalid configuration argument",
    98: "invalid device function",
    209: "no kernel image is available for execution on the device",
    600: "device not ready",
    900: "operation not permitted when stream is capturing",
    901: "operation failed due to a previous error during capture",
    907: "dependency created on uncaptured work in another stream",
}


@pytest.mark.parametrize(("code", "text"), STICKY_TEXTS.items())
def test_sticky_errors_by_code_or_text(code: int, text: str) -> None:
    for error in (
        of_class("AcceleratorError", TORCH.format(text), error_code=code),
        of_class("AcceleratorError", "CUDA error: words of another version", error_code=code),
        RuntimeError(TORCH.format(text)),
        of_class("Fail", ORT.format(code, text)),
        of_class("CUDARuntimeError", "cudaErrorSomething: words", status=code),
        RuntimeError(f"CUDA error code={code}(cudaErrorSomething)"),
    ):
        assert sticky(error), repr(error)
        assert not is_out_of_memory(error)


@pytest.mark.parametrize(("code", "text"), OTHER_TEXTS.items())
def test_errors_after_which_a_device_goes_on(code: int, text: str) -> None:
    for error in (
        of_class("AcceleratorError", TORCH.format(text), error_code=code),
        RuntimeError(TORCH.format(text)),
        of_class("Fail", ORT.format(code, text)),
        of_class("CUDARuntimeError", f"cudaErrorSomething: {text}", status=code),
    ):
        assert not sticky(error), repr(error)
        assert is_out_of_memory(error) is (code == 2), repr(error)


@pytest.mark.parametrize(
    "text",
    [
        "cudaErrorIllegalAddress: an illegal memory access was encountered",
        "CUDA_ERROR_ILLEGAL_ADDRESS: words",
        "[700] Call to cuMemcpyDtoH results in CUDA_ERROR_ILLEGAL_ADDRESS",
        "CUDA_ERROR_LAUNCH_FAILED: words",
        "cudaErrorLaunchFailure: words",
        "CUDA_ERROR_UNKNOWN: words",
        "cudaErrorAssert: words",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "cuStreamSynchronize failed: an illegal memory access was encountered",
    ],
)
def test_names_and_words_of_other_libraries(text: str) -> None:
    assert sticky(RuntimeError(text)) == f"RuntimeError: {text}"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("misaligned address in line 3 of the letter"),
        RuntimeError("unknown error"),
        RuntimeError("CUDA is not there: unknown error of the loader"),
        KeyError("cuda"),
        RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument"),
        RuntimeError("cudaErrorUnknownModule"),
        of_class("SomeError", "words", error_code=700),
        ValueError("got 700 rows"),
    ],
)
def test_what_is_no_error_of_a_device(error: Exception) -> None:
    assert sticky(error) == ""
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        of_class("OutOfMemoryError", "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
        of_class("OutOfMemoryError", "Out of memory allocating 8,589,934,592 bytes (allocated so far: 0 bytes)."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        of_class(
            "RuntimeException",
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. "
            "bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Failed to allocate memory "
            "for requested buffer of size 4194304000",
        ),
        RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    ],
)
def test_too_little_memory(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert sticky(error) == ""


def chained(behind: Exception, is_told: bool) -> Exception:
    try:
        try:
            raise behind
        except Exception as error:
            if is_told:
                raise ValueError("the model's own words") from error
            raise ValueError("the model's own words")  # noqa: B904 - it is what is tested
    except ValueError as error:
        return error


def test_errors_behind_others() -> None:
    lost = of_class("AcceleratorError", TORCH.format("device-side assert triggered"), error_code=710)
    for is_told in (True, False):  # it has failed, whatever a model raises next
        assert sticky(chained(lost, is_told)) == "AcceleratorError 710: CUDA error: device-side assert triggered"
    assert sticky(ExceptionGroup("two", [ValueError("a"), lost]))
    full = of_class("OutOfMemoryError", "CUDA out of memory.")
    assert is_out_of_memory(chained(full, is_told=True))
    assert not is_out_of_memory(chained(full, is_told=False))  # a model that has caught it may have gone on


def test_an_error_that_refers_to_itself_ends() -> None:
    error = RuntimeError("a")
    error.__cause__ = ValueError("b")
    error.__cause__.__cause__ = error
    assert sticky(error) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`", True),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", True),
        ("CUBLAS failure 14: CUBLAS_STATUS_INTERNAL_ERROR ; GPU=0", True),
        ("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_libraries_on_top_do_not_say_what_failed(text: str, expected: bool) -> None:
    assert is_unclear(RuntimeError(text)) is expected
    assert sticky(RuntimeError(text)) == ""
