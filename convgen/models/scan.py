"""``convgen.scan``: where a network's time goes, and what convgen would change."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from convgen.building.build import Progress
from convgen.building.progress import Bar
from convgen.measuring.timing import clock_for, spread
from convgen.models import capture, layers, survey
from convgen.models.classes import Swapped
from convgen.models.errors import NetworkError
from convgen.models.layers import Only
from convgen.models.report import Pair, ScanReport

_RUNS, _SECONDS = 10, 3.0
"""Runs of the whole network: so many, or as many as there is time for, three at least."""


def scan(
    model: nn.Module,
    example_inputs: Any,
    *,
    only: Only | None = None,
    dtypes: Iterable[object] | None = None,
    fixed_channels: bool = False,
    measure: bool = False,
    progress: Progress | None = None,
) -> ScanReport:
    """Times a network and its convolutions, and says what :func:`convgen.swap` would do.

    The network is run a few times, as it stands and in the caller's context, and torch's time for
    every kind of call is measured; nothing of the network changes. Convgen's times are those that
    were measured before; else, on a GPU, what its cost model predicts.

    Args:
        model, example_inputs, only, dtypes, fixed_channels, progress: as for ``swap``.
        measure: whether to build packages, and measure what was not measured before.

    Raises:
        NetworkError: if the network has no convolution, or takes no such inputs.
        SpecError, ToolchainError, BuildError, TunedError: as :func:`convgen.specialize` does.
    """
    found = layers.find(model, only)
    if not found:
        raise NetworkError("the network has no convolution")
    if any(isinstance(each.layer, Swapped) for each in found):
        raise NetworkError("the network is swapped: convgen.unswap it before it is scanned")
    with Bar(quiet=progress is not None or not sys.stderr.isatty()) as bar:
        result = survey.survey(
            model,
            example_inputs,
            only=only,
            dtypes=dtypes,
            fixed_channels=fixed_channels,
            measure=None,
            progress=progress or bar,
            build=measure,
        )
        with capture.undisturbed(model):
            network_ms = _network_ms(model, example_inputs)
    return ScanReport(result.rows(), result.device_name, network_ms)


def _network_ms(model: nn.Module, inputs: Any) -> Pair:
    """Medians of a run of the network, and of the derivatives of all that it returns."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    tensor = next(iter((*model.parameters(), *model.buffers())))
    clock = clock_for(tensor.device)
    forward: list[float] = []
    backward: list[float] = []
    end = time.monotonic() + _SECONDS
    for count in range(_RUNS + 1):
        if count > 3 and time.monotonic() > end:
            break
        torch.clear_autocast_cache()
        output, ran = clock.time(partial(capture.call, model, inputs))
        results = [
            each for each in tree_leaves(output) if isinstance(each, Tensor) and each.requires_grad
        ]
        derived = None
        if results and parameters:
            ones = [torch.ones_like(each) for each in results]
            derive = partial(torch.autograd.grad, results, parameters, ones, allow_unused=True)
            _, derived = clock.time(derive)
        clock.wait()
        if count:  # the first run finds memory and algorithms
            forward.append(ran.ms)
            backward += [derived.ms] if derived else []
    return spread(forward).median_ms, spread(backward).median_ms if backward else 0.0
