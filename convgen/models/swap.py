"""``convgen.swap``: a network's convolutions computed by convgen, in place; ``convgen.unswap``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from convgen.building.build import Progress
from convgen.building.progress import Bar
from convgen.models import classes, fusion, layers, packages, survey
from convgen.models.classes import Swapped
from convgen.models.layers import Only
from convgen.models.report import FusedRow, SwapReport
from convgen.models.survey import Survey


def swap(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    only: Only | None = None,
    dtypes: Iterable[object] | None = None,
    fixed_channels: bool = False,
    measure: bool | None = None,
    fuse: bool = False,
    progress: Progress | None = None,
) -> SwapReport:
    """Lets convgen compute those convolutions of a network that it computes faster.

    In place, by the class of each layer: parameters and their names, buffers, hooks,
    parametrizations, optimizers, ``isinstance`` and checkpoints stay as they are. It takes torch's
    own (transposed) convolutions, with parametrizations too, and subclasses whose ``forward`` ends
    in torch's. The others stay torch's, and the report names them with the reason.

    With example inputs the network is run once, as it stands and in the caller's context: under
    ``torch.autocast`` and ``torch.no_grad`` where the call is, on its device and in its memory
    format. Then every kind of call is timed beside torch's (backward, too, where gradients are
    recorded), and a layer is swapped only if it is faster. Times are kept beside the user's table
    of tuned schedules (see ``CONVGEN_TUNED``) and taken from there the next time. Without example
    inputs a rule decides: :func:`convgen.models.choices.rule`.

    Swap once the weights are on their device. What ``torch.compile`` has compiled of the network is
    compiled anew. Processes of one job that measure for themselves may decide differently where
    times are close; after ``convgen swap``, or a run of one of them, all find the same times.

    Args:
        model: any module, a single layer too.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        only: a pattern of layers' names such as ``"decoder.*"``, several, or a function of name
            and layer; all layers by default.
        dtypes: to generate kernels for, beside those of parameters and autocast. Others are built
            when they are first asked for, with a warning.
        fixed_channels: generate kernels for the layers' channels alone, which may be faster, and
            takes as many packages as there are pairs of channels.
        measure: None for what is described above; True measures what was measured before, too;
            False lets the rule decide in any case.
        fuse: have the kernels compute what follows a swapped convolution in an ``nn.Sequential``,
            too: an activation, and a BatchNorm in eval mode between the two (folded into weight and
            bias; in training mode it is computed as ever). It is not timed by itself. Modules with
            hooks are left; the report's ``fused`` says which and why.
        progress: ``progress(done, total, what)``, called while packages are compiled and layers
            are timed; by default a bar on stderr, if that is a terminal.

    Raises:
        NetworkError: if ``only`` matches no convolution, the network takes no such inputs, or
            ``measure=True`` lacks example inputs.
        SpecError, ToolchainError, BuildError, TunedError: as :func:`convgen.specialize` does.
    """
    unswap(model, only=only)
    with Bar(quiet=progress is not None or not sys.stderr.isatty()) as bar:
        found = survey.survey(
            model,
            example_inputs,
            only=only,
            dtypes=dtypes,
            fixed_channels=fixed_channels,
            measure=measure,
            progress=progress or bar,
        )
        for kind in found.kinds:
            if kind.chosen:
                package = found.built[kind.wanted].package
                swapped = classes.register(
                    kind.wanted.spec, kind.wanted.dtypes, kind.wanted.backend, package
                )
                for each in kind.layers:
                    each.layer.__class__ = classes.derived(type(each.layer), swapped)
        fused = _fuse(model, found, progress or bar) if fuse else ()
    return SwapReport(found.rows(), found.device_name, fused=fused)


def _fuse(model: nn.Module, found: Survey, progress: Progress) -> tuple[FusedRow, ...]:
    """Neighbours of the layers that were just swapped, and what became of them."""
    names = {name for kind in found.kinds for each in kind.layers for name in each.names}
    neighbours = [each for each in fusion.find(model) if each.conv_name in names]
    wanted = [what for each in neighbours if (what := fusion.wanted(each))]
    for what, built in packages.build(wanted, progress).items():
        classes.remember(what.spec, what.dtypes, what.backend, built.package)
    for each in neighbours:
        fusion.fuse(each.container)
    return tuple(
        FusedRow(
            (each.conv_name, *each.names),
            what.spec.activation or "" if (what := fusion.wanted(each)) else "",
            each.run.refusal(),
        )
        for each in neighbours
    )


def unswap(model: nn.Module, *, only: Only | None = None) -> None:
    """Gives every swapped layer of a network the class that it had.

    Args:
        model: any module.
        only: which layers, as for :func:`swap`.
    """
    for found in layers.find(model, only):
        layer = found.layer
        if isinstance(layer, Swapped):
            layer.__dict__.pop("_convgen_refused", None)
            layer.__class__ = classes.original(type(layer))
    for module in model.modules():
        if isinstance(module, fusion.Fused):
            fusion.unfuse(module)
