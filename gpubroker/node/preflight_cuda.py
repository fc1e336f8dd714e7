"""A context on every GPU through the driver itself, memory taken and given back, and the way there measured.

No torch, no toolkit: libcuda.so.1 comes with the driver. Source: CUDA Driver API reference; the `_v2` names
are those that cuda.h maps the calls to since CUDA 4.
"""

from __future__ import annotations

import ctypes
from typing import Any, Callable, Dict

Facts = Dict[str, Any]
Say = Callable[[str], None]
_MIB = 1 << 20
_COPY_BYTES = 64 * _MIB
_COPIES = 3


def facts(told: Facts, say: Say) -> Facts:
    """error 0 = it starts; each device may have an error of its own."""
    try:
        driver: Any = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"missing": str(error)}
    say("cuInit")
    code = driver.cuInit(0)
    if code:
        return {"error": code, "text": _words(driver, code), "devices": []}
    count, version = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    driver.cuDriverGetVersion(ctypes.byref(version))
    devices = [_device(driver, ordinal, say) for ordinal in range(count.value)]
    return {"error": 0, "text": "", "version": version.value, "devices": devices}


def _device(driver: Any, ordinal: int, say: Say) -> Facts:
    device, context, address = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    name, total = ctypes.create_string_buffer(128), ctypes.c_size_t()
    found: Facts = {"index": ordinal}

    def copy() -> int:
        found["copy_gb_s"] = _copy_gb_s(driver, address)
        return 0

    for step, call in (
        ("cuDeviceGet", lambda: driver.cuDeviceGet(ctypes.byref(device), ordinal)),
        ("cuDeviceGetName", lambda: driver.cuDeviceGetName(name, 128, device)),
        ("cuDeviceTotalMem", lambda: driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)),
        ("cuCtxCreate", lambda: driver.cuCtxCreate_v2(ctypes.byref(context), 0, device)),
        ("cuMemAlloc", lambda: driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(_COPY_BYTES))),
        ("copy", copy),
        ("cuCtxSynchronize", driver.cuCtxSynchronize),
        ("cuMemFree", lambda: driver.cuMemFree_v2(address)),
        ("cuCtxDestroy", lambda: driver.cuCtxDestroy_v2(context)),
    ):
        say(f"GPU {ordinal}: {step}")
        error = call()
        if error:
            found["error"] = f"{step}: {error} {_words(driver, error)}"
            break
    found["name"], found["total_mib"] = name.value.decode(errors="replace"), total.value // _MIB
    return found


def _copy_gb_s(driver: Any, address: Any) -> float | None:
    """From pinned memory, by the GPU's own clock, the best of a few; None = it could not be measured.

    The first copy wakes the link, which sleeps at a lower speed. Memory that is not pinned would measure the
    host's own copying.
    """
    pinned, start, end, spent_ms = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
    size, best = ctypes.c_size_t(_COPY_BYTES), 0.0
    if driver.cuMemHostAlloc(ctypes.byref(pinned), size, 0):
        return None
    try:
        if driver.cuEventCreate(ctypes.byref(start), 0) or driver.cuEventCreate(ctypes.byref(end), 0):
            return None
        for _ in range(1 + _COPIES):
            if (
                driver.cuEventRecord(start, None)
                or driver.cuMemcpyHtoD_v2(address, pinned, size)
                or driver.cuEventRecord(end, None)
                or driver.cuEventSynchronize(end)
                or driver.cuEventElapsedTime(ctypes.byref(spent_ms), start, end)
            ):
                return None
            if spent_ms.value > 0:
                best = max(best, _COPY_BYTES / 1e6 / spent_ms.value)
    finally:
        driver.cuMemFreeHost(pinned)
    return round(best, 3) if best else None


def _words(driver: Any, error: int) -> str:
    text = ctypes.c_char_p()
    if driver.cuGetErrorString(error, ctypes.byref(text)) or not text.value:
        return "unknown error"
    return text.value.decode(errors="replace")
