"""Whether convgen computes a layer: what was measured before, or else a rule.

What is measured is kept beside the user's table of tuned schedules (``CONVGEN_TUNED``), in
``choices.json``, and taken from there as long as everything that it depends on is the same: layer,
shapes, layouts, dtype, gradients, device, torch's version and switches, convgen's version.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from convgen import __version__
from convgen.building import disk
from convgen.building.processor import processor_name
from convgen.engines import tuned
from convgen.models import beside, layers
from convgen.models.beside import Times
from convgen.models.capture import Case
from convgen.spec import ConvSpec, documents
from convgen.spec.documents import DocumentError, Length, Range

_VERSION = 1
_FILE = "choices.json"

Word = Annotated[str, Length(1, 200)]
Extent = Annotated[int, Range(0, 1 << 48)]
Milliseconds = Annotated[float, Range(0, 1e12)]


class ChoiceWarning(UserWarning):
    """The file of choices cannot be used; layers are measured again each time."""


@dataclass(frozen=True)
class Choice:
    """What was measured of one case."""

    spec: Word
    """Canonical name, with output padding; with channels if kernels were generated for them."""
    input: Annotated[tuple[Extent, ...], Length(3, 5)]
    out_channels: Extent
    layouts: Word
    """Of input and weight."""
    dtype: Word
    """Of the tensors and, under autocast, of the products: ``f32 as f16``."""
    results: Word
    """``output``, and which gradients beside it."""
    device: Word
    setting: Word
    """Versions and switches of torch, and convgen's version."""
    torch_ms: tuple[Milliseconds, Milliseconds]
    convgen_ms: tuple[Milliseconds, Milliseconds]
    agrees: bool

    @property
    def key(self) -> tuple[object, ...]:
        """What a newer measurement replaces."""
        own = asdict(self)
        return tuple(v for k, v in own.items() if k not in ("torch_ms", "convgen_ms", "agrees"))

    @property
    def times(self) -> Times:
        return Times(self.torch_ms, self.convgen_ms, self.agrees)


def choice_of(case: Case, generated: ConvSpec, times: Times) -> Choice:
    """A measurement under its key; ``generated`` says whether channels were fixed."""
    fixed = {"in_channels": generated.in_channels, "out_channels": generated.out_channels}
    spec = ConvSpec.from_dict(case.spec.to_dict() | fixed)
    names = ("input", "weight", "bias")
    operands = (case.input, case.weight, case.bias)
    gradients = [
        f"grad_{name}"
        for name, like in zip(names, operands, strict=True)
        if like is not None and like.requires_grad and case.grad
    ]
    own, used = (layers.dtype_name(d) or str(d) for d in (case.input.dtype, case.dtype))
    weight = layers.dtype_name(case.weight.dtype) or str(case.weight.dtype)
    dtype = used if own == used == weight else f"{own} x {weight} as {used}"
    return Choice(
        spec.name,
        case.input.shape,
        case.output_shape[1],
        f"{case.input.layout}, {case.weight.layout}",
        dtype,
        ", ".join(["output" if case.bias is None else "output with bias", *gradients]),
        _device_name(case.device),
        _setting(case.device),
        times.torch_ms,
        times.convgen_ms,
        times.agrees,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).name)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def _setting(device: torch.device) -> str:
    words = [f"convgen {__version__}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        cudnn: Any = torch.backends.cudnn
        words += [f"CUDA {torch.version.cuda}", f"cuDNN {cudnn.version()}"]
        words += ["TF32"] * beside.allows_tf32() + ["benchmark"] * bool(cudnn.benchmark)
        words += ["without cuDNN"] * (not cudnn.enabled) + ["deterministic"] * cudnn.deterministic
    words += ["deterministic"] * torch.are_deterministic_algorithms_enabled()
    return ", ".join(dict.fromkeys(words))


def read() -> dict[tuple[object, ...], Times]:
    """What was measured before, by :attr:`Choice.key`; nothing where tables are switched off."""
    path = _path()
    if path is None:
        return {}
    try:
        return {choice.key: choice.times for choice in _read(path)}
    except (OSError, DocumentError) as error:
        _warn(path, error)
        return {}


def store(new: Iterable[Choice]) -> None:
    """Keeps measurements, in the place of older ones of the same key.

    Where they cannot be written a warning says so.
    """
    new, path = list(new), _path()
    if path is None or not new:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            held: dict[tuple[object, ...], Choice] = {}
            with contextlib.suppress(DocumentError):  # damaged: it is replaced
                held = {choice.key: choice for choice in _read(path)}
            held |= {choice.key: choice for choice in new}
            rows = [asdict(held[key]) for key in sorted(held, key=str)]
            text = json.dumps({"version": _VERSION, "choices": rows}, indent=1)
            disk.write_anywhere(path, text + "\n")
    except OSError as error:
        _warn(path, error)


def _path() -> Path | None:
    table = tuned.user_table()
    return None if table is None else table.with_name(_FILE)


def _read(path: Path) -> list[Choice]:
    try:
        data = documents.read(path)
    except FileNotFoundError:
        return []
    if not isinstance(data, dict) or data.get("version") != _VERSION:
        raise DocumentError(f"it has no version {_VERSION}")
    entries = data.get("choices")
    if not isinstance(entries, list):
        raise DocumentError("it has no list of choices")
    return [documents.record(entry, Choice, "") for entry in entries]


def _warn(path: Path, error: Exception) -> None:
    why = error.strerror if isinstance(error, OSError) else error
    warnings.warn(
        f"{path}: what was measured of layers cannot be kept there ({why}); set {tuned.VARIABLE} "
        "to a file in another folder, or to 0",
        ChoiceWarning,
        stacklevel=3,
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def rule(spec: ConvSpec, channels: tuple[int, int], device: torch.device) -> tuple[bool, str]:
    """Whether to swap a layer that nothing was measured of, and why.

    Kinds of layers that were faster than torch's default in every measurement of docs/results.md,
    forward and backward together. On GPUs other than Hopper's none has been measured.

    Args:
        spec: what the layer computes.
        channels: of its input and output.
        device: where.
    """
    group = tuple(count // spec.groups for count in channels)
    depthwise = spec.groups > 1 and 1 in group
    upward = spec.transposed and any(s > 1 for s in spec.stride)
    if device.type == "cpu":
        if spec.ndim == 3 and (depthwise or upward):
            return True, "rule: 3-D, " + ("depthwise" if depthwise else "strided transposed")
        return False, "rule: of layers on the CPU only 3-D ones, depthwise or strided transposed"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False, "rule: nothing was measured on such a GPU; give example inputs"
    if depthwise:
        return True, "rule: depthwise"
    if upward and (spec.ndim == 3 or max(group) <= 256):
        return True, "rule: strided transposed"
    dense = not spec.transposed and spec.ndim == 3 and set(spec.stride) == {1}
    if dense and max(spec.kernel_size) > 1 and min(group) >= 16 and max(group) <= 128:
        return True, "rule: 3-D of 16 to 128 channels"
    return False, "rule: a kind of layer that torch may compute faster; give example inputs"
