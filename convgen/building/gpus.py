"""The GPUs of this machine, by NVML or the CUDA driver; without torch."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from dataclasses import dataclass


def gpu_architectures() -> tuple[str, ...]:
    """Architectures of the GPUs present, such as ``("90a",)``; () if there are none.

    Asks NVML, or the CUDA driver where NVML is missing, without importing torch. NVML first: it
    creates no CUDA context, so it is quick and the process may still fork, or set
    ``CUDA_VISIBLE_DEVICES``, before it uses a GPU. A ``CUDA_VISIBLE_DEVICES`` that hides every
    GPU is respected.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip() in ("", "-1", "NoDevFiles"):
        return ()
    capabilities = nvml().capabilities or driver_capabilities()
    # From 9.0 on, the best instructions exist only in the architecture-specific targets.
    return tuple(
        f"{major}{minor}{'a' if major >= 9 else ''}" for major, minor in sorted(set(capabilities))
    )


@dataclass(frozen=True)
class Nvml:
    cuda_version: tuple[int, int] | None
    capabilities: tuple[tuple[int, int], ...]


@functools.lru_cache(maxsize=1)
def nvml() -> Nvml:
    """What NVML knows: the newest CUDA version that the driver serves, and the GPUs."""
    nothing = Nvml(None, ())
    if sys.platform != "linux":
        return nothing
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return nothing
    except (OSError, AttributeError):
        return nothing
    try:
        version, count = ctypes.c_int(), ctypes.c_uint()
        known = nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version)) == 0
        capabilities = []
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for index in range(count.value):
            device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) == 0 and (
                nvml.nvmlDeviceGetCudaComputeCapability(
                    device, ctypes.byref(major), ctypes.byref(minor)
                )
                == 0
            ):
                capabilities.append((major.value, minor.value))
        cuda_version = (version.value // 1000, version.value % 1000 // 10) if known else None
        return Nvml(cuda_version, tuple(capabilities))
    except AttributeError:
        return nothing
    finally:
        nvml.nvmlShutdown()


@functools.lru_cache(maxsize=1)
def driver_capabilities() -> tuple[tuple[int, int], ...]:
    """Compute capabilities by the CUDA driver, for systems without NVML (Jetson)."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}; a device is the int of its index.
    capabilities = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if (
            cuda.cuDeviceGet(ctypes.byref(device), index) == 0
            and cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device) == 0
            and cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device) == 0
        ):
            capabilities.append((major.value, minor.value))
    return tuple(capabilities)
