"""GPUs as NVIDIA's driver reports them through its library NVML; this starts no CUDA context and needs no torch."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

_TEXT = 96  # bytes, as nvml.h has it for names and UUIDs


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def read_driver(library: Any = None) -> dict[str, Any] | None:
    """Return the driver's version, the newest CUDA version it serves, and its GPUs; None where there is no driver.

    Memory is in bytes. GPUs are listed whether or not CUDA_VISIBLE_DEVICES shows them to this process.

    Args:
        library: functions by the names of nvml.h; the driver's own library when None.

    Raises:
        RuntimeError: the library is there and fails, for example because it has another version than the module in
            the kernel.
    """
    if library is None:
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return None
    _call(library, "nvmlInit_v2")
    try:
        cuda, count = ctypes.c_int(), ctypes.c_uint()
        _call(library, "nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(cuda))
        _call(library, "nvmlDeviceGetCount_v2", ctypes.byref(count))
        return {
            "version": _text(library, "nvmlSystemGetDriverVersion"),
            "cuda": [cuda.value // 1000, cuda.value % 1000 // 10],
            "gpus": [_read_gpu(library, index) for index in range(count.value)],
        }
    finally:
        library.nvmlShutdown()


def _read_gpu(library: Any, index: int) -> dict[str, Any]:
    handle, memory = ctypes.c_void_p(), _Memory()
    _call(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    with suppress(RuntimeError):  # not supported where GPU and CPU share their memory; both numbers stay 0
        _call(library, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
    return {
        "name": _text(library, "nvmlDeviceGetName", handle),
        "uuid": _text(library, "nvmlDeviceGetUUID", handle).removeprefix("GPU-"),
        "total": memory.total,
        "free": memory.free,
    }


def _text(library: Any, function: str, *arguments: Any) -> str:
    buffer = ctypes.create_string_buffer(_TEXT)
    _call(library, function, *arguments, buffer, ctypes.c_uint(_TEXT))
    return buffer.value.decode("utf-8", "replace")


def _call(library: Any, function: str, *arguments: Any) -> None:
    code = getattr(library, function)(*arguments)
    if code:
        explain = library.nvmlErrorString
        explain.restype = ctypes.c_char_p
        raise RuntimeError(f"{function}: {(explain(code) or b'').decode('utf-8', 'replace')} (code {code})")
