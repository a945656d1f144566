"""What a benchmark ran on: names, versions and clocks, and the ceilings that bound its times."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from convgen import __version__
from convgen.building.processor import processor_name, vector_instructions
from convgen.measuring.peak import fma_peak
from convgen.measuring.timing import Clock, clock_for
from convgen.spec.dtypes import DTYPES

_MATRIX = {"cuda": 8192, "cpu": 1024}
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
_CEILING_RUNS = {"cuda": 12, "cpu": 4}

_HALF_PRODUCTS = {
    "f16": {"avx512_fp16", "amx_fp16", "asimdhp"},
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
}
"""Instructions for products of half types; without them such a product takes torch seconds."""

_PATIENCE_S = 10.0
"""How long nvidia-smi may take."""

_CLOCKS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "most_sm_mhz": "clocks.max.sm",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
"""Names here, and nvidia-smi's."""


@dataclass
class Ceilings:
    """The best rates measured before and after: of arithmetic and of a large copy."""

    flops_per_s: float
    bytes_per_s: float
    mode: str
    """What the arithmetic was: a large matrix product in ``"f32 (TF32)"``, or ``"f32 FMA"``."""

    def raise_to(self, other: Ceilings) -> None:
        """Takes what is higher in another measurement: a machine may have been disturbed."""
        if other.flops_per_s > self.flops_per_s:
            self.flops_per_s, self.mode = other.flops_per_s, other.mode
        self.bytes_per_s = max(self.bytes_per_s, other.bytes_per_s)

    def peak_ms(self, flops: int) -> float:
        """The least time for so many operations."""
        return 1e3 * flops / self.flops_per_s

    def floor_ms(self, flops: int, traffic_bytes: int) -> float:
        """The least time for so many operations and bytes."""
        return max(self.peak_ms(flops), 1e3 * traffic_bytes / self.bytes_per_s)


@contextlib.contextmanager
def settings(tf32: bool, benchmark: bool = False) -> Iterator[None]:
    """Sets torch's switches for TF32 (of convolutions and products) and ``cudnn.benchmark``."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = tf32, tf32, benchmark
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def ceilings(device: torch.device, dtype: str, tf32: bool) -> Ceilings:
    """Measures the rates that bound a layer of ``dtype``; takes a second or two.

    Best of a few runs, so that a floor made of them is one. Where fp32 may not be rounded to
    TF32, the ceiling is the faster of the fp32 units and of three TF32 products in place of one,
    which give an accuracy close to fp32's. On a CPU it is what its vector units multiply and add,
    in fp32 for the half types, or a product in these where that is faster.
    """
    clock = clock_for(device)
    on_gpu = device.type == "cuda"
    if dtype == "f32" and on_gpu:
        rates = {"f32 (TF32)": _rate(clock, device, dtype, True)}
        if not tf32:
            rates = {
                "f32": _rate(clock, device, dtype, False),
                "f32 (3 x TF32)": rates["f32 (TF32)"] / 3,
            }
    elif not on_gpu:
        of = "f64" if dtype == "f64" else "f32"
        rates = {f"{of} FMA" + f", for {dtype}" * (of != dtype): fma_peak(of)}
        if _HALF_PRODUCTS.get(dtype, set()) & set(vector_instructions()):
            rates[dtype] = _rate(clock, device, dtype, False)
    else:
        rates = {dtype: _rate(clock, device, dtype, False)}
    mode = max(rates, key=lambda name: rates[name])
    return Ceilings(rates[mode], _bandwidth(clock, device), mode)


def describe(device: torch.device) -> dict[str, Any]:
    """Names and versions of what runs: GPU or CPU, driver, torch, CUDA, cuDNN, convgen.

    Of a CPU its vector instructions, the threads that torch and convgen run on, and oneDNN.
    """
    facts: dict[str, Any] = {
        "convgen": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device.type,
    }
    if device.type == "cpu":
        return facts | {
            "name": _processor(),
            "instructions": list(vector_instructions()),
            "threads": torch.get_num_threads(),
            "onednn": _onednn(),
        }
    properties = gpu(device)
    cudnn: Any = torch.backends.cudnn
    return {
        **facts,
        **_under_load(device, {"driver": "driver_version"}),
        "name": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": _dotted(cudnn.version()),
    }


def gpu(device: torch.device) -> Any:
    """The properties of a GPU, as CUDA gives them."""
    return torch.cuda.get_device_properties(device)


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature under the load of a matrix product, by nvidia-smi.

    Empty on the CPU, or without nvidia-smi.
    """
    return _under_load(device, _CLOCKS) if device.type == "cuda" else {}


def _under_load(device: torch.device, fields: Mapping[str, str]) -> dict[str, str]:
    """What nvidia-smi says of a GPU while it multiplies: an idle one reports clocks of rest."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}"]
    query.append("--format=csv,noheader,nounits")
    # Torch has its own order of the GPUs.
    if uuid := str(getattr(torch.cuda.get_device_properties(device), "uuid", "")):
        query.append(f"--id=GPU-{uuid.removeprefix('GPU-')}")
    try:
        process = subprocess.Popen(
            query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return {}
    with process:
        a = torch.randn(4096, 4096, device=device).to(torch.float16)
        give_up = time.monotonic() + _PATIENCE_S
        while process.poll() is None and time.monotonic() < give_up:
            for _ in range(10):
                a @ a
            torch.cuda.synchronize(device)
        if process.poll() is None:
            process.kill()
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    if process.returncode or len(values) != len(fields):
        return {}
    return dict(zip(fields, values, strict=True))


def _rate(clock: Clock, device: torch.device, dtype: str, tf32: bool) -> float:
    """Operations per second of a large matrix product."""
    size = _MATRIX[device.type] // (2 if dtype == "f64" else 1)
    torch_dtype = getattr(torch, DTYPES[dtype].torch_name)
    # Not zeros: those draw less power, and run faster than data would.
    a, b = (torch.randn(size, size, device=device).to(torch_dtype) for _ in range(2))
    with settings(tf32):
        best_ms = _best(clock, device, lambda: a @ b)
    return 2 * size**3 / (best_ms / 1e3)


def _bandwidth(clock: Clock, device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.randn(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    best_ms = _best(clock, device, lambda: target.copy_(source))
    return 2 * _COPY_BYTES[device.type] / (best_ms / 1e3)


def _best(clock: Clock, device: torch.device, call: Callable[[], object]) -> float:
    """The least time of a few runs, in ms, after one that does not count."""
    intervals = [clock.time(call)[1] for _ in range(_CEILING_RUNS[device.type] + 1)]
    clock.wait()
    return min(interval.ms for interval in intervals[1:])


def _dotted(version: int | None) -> str | None:
    """``91900`` -> ``9.19.0``."""
    if version is None:
        return None
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _onednn() -> str | None:
    """The version of oneDNN in torch, which tells it among much else."""
    found = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    return found[1] if found else None


def _processor() -> str:
    """Name of the processor, and how many of its cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor_name()} ({cores} cores)"
