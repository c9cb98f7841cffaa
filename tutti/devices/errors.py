"""What an exception from a device's library means for the device. Pure: it imports no such library.

Each library has its own class and words for the same error of CUDA, and whether the device can go on is in none of
their types: it is in CUDA's code, where there is one, and else in the words.
"""

import re
from collections.abc import Iterator

# CUDA's error codes after which every further call of the process on that device fails, by the names that the driver
# (CUDA_ERROR_...) and the runtime (cudaError...) give them, without case and underscores, and what their texts say.
# 214 and 999 need not stick, but nothing can be trusted after them either.
_STICKY: dict[int, tuple[str, str]] = {
    214: ("eccuncorrectable", "uncorrectable ECC error encountered"),
    226: ("contained", "Invalid access of peer GPU memory over nvlink or a hardware error"),
    700: ("illegaladdress", "an illegal memory access was encountered"),
    702: ("launchtimeout", "the launch timed out and was terminated"),
    710: ("assert", "device-side assert triggered"),
    714: ("hardwarestackerror", "hardware stack error"),
    715: ("illegalinstruction", "an illegal instruction was encountered"),
    716: ("misalignedaddress", "misaligned address"),
    717: ("invalidaddressspace", "operation not supported on global/shared address space"),
    718: ("invalidpc", "invalid program counter"),
    719: ("launchfail", "unspecified launch failure"),  # FAILED in one, Failure in the other
    721: ("tensormemoryleak", "tensor memory not completely freed"),
    810: ("mpsclientterminated", "the MPS client has been terminated by the server"),
    911: ("externaldevice", "an async error has occured in external entity outside of CUDA"),
    999: ("unknown", "CUDA error: unknown error"),
}
_OUT_OF_MEMORY_CODE = 2

# "CUDA failure 710: ..." of ONNX Runtime, "CUDA error 700", "CUDA error code=700(...)" of others.
_CODE = re.compile(r"\bCUDA (?:driver |runtime )?(?:failure|error)[ :(]*(?:code)?[ :=(]*(\d{1,3})\b", re.IGNORECASE)
_NAME = re.compile(r"\b(?:cudaError|CUDA_ERROR_)(\w+)")
# A text counts only beside CUDA's name: "misaligned address" may be a model's own words.
_IS_OF_CUDA = re.compile(r"cuda|\bcu[A-Z]\w+ failed|driver error", re.IGNORECASE)
_IS_UNCLEAR = re.compile(r"\bCU(?:BLAS|DNN|FFT|RAND|SOLVER|SPARSE)(?:_STATUS_| failure| error)|\bNCCL error")
_OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY"
    r"|CU\w+_STATUS_ALLOC_FAILED|Failed to allocate memory for requested buffer"
)


def sticky(error: BaseException) -> str:
    """What the device has failed of, for good, where the error or one behind it says so; else ""."""
    return next((_first_line(link) for link in _chain(error) if _is_sticky(link)), "")


def is_unclear(error: BaseException) -> bool:
    """Whether a library on top of CUDA has failed and does not say of what: the device itself must be asked."""
    return any(_IS_UNCLEAR.search(str(link)) for link in _chain(error))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device has had too little memory. The device goes on: a smaller batch may fit."""
    return not sticky(error) and any(_lacks_memory(link) for link in _chain(error, is_told=True))


def _chain(error: BaseException, is_told: bool = False) -> Iterator[BaseException]:
    """The error and those behind it, each once; only what was raised `from` another where it `is_told`."""
    waiting, seen = [error], set[int]()
    while waiting:
        link = waiting.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        behind = link.__cause__
        if behind is None and not is_told and not link.__suppress_context__:
            behind = link.__context__
        waiting += [behind] if behind is not None else []
        waiting += link.exceptions if isinstance(link, BaseExceptionGroup) else ()


def _code(error: BaseException) -> int | None:
    """CUDA's code, where the error carries or names it: torch as `error_code`, cupy as `status`."""
    name = type(error).__name__
    carried = getattr(error, "error_code", None) if name == "AcceleratorError" else None
    carried = getattr(error, "status", None) if name in ("CUDARuntimeError", "CUDADriverError") else carried
    if type(carried) is int:
        return carried
    named = _CODE.search(str(error))
    return int(named.group(1)) if named is not None else None


def _is_sticky(error: BaseException) -> bool:
    code = _code(error)
    if code is not None:
        return code in _STICKY
    text = str(error)
    if not _IS_OF_CUDA.search(text):
        return False
    names = [name.replace("_", "").lower() for name in _NAME.findall(text)]
    if any(said.startswith("launchfail") or said == name for said in names for name, _ in _STICKY.values()):
        return True
    return any(words in text for _, words in _STICKY.values())


def _lacks_memory(error: BaseException) -> bool:
    is_named = type(error).__name__ == "OutOfMemoryError"  # of torch, and of cupy
    return is_named or _code(error) == _OUT_OF_MEMORY_CODE or bool(_OUT_OF_MEMORY.search(str(error)))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    code = _code(error)
    is_said = code is None or str(code) in text
    return f"{type(error).__name__}: {text}" if is_said else f"{type(error).__name__} {code}: {text}"
