"""``convgen swap``: builds ahead, and measures, what a program's ``convgen.swap`` takes."""

from __future__ import annotations

from typing import Any

import click

from convgen.commands import networks, options


@click.command("swap", short_help="Build what convgen.swap takes for a network, and measure it.")
@networks.network
@click.option(
    "--fuse", is_flag=True, help="Build kernels with the activations behind convolutions, too."
)
@click.option("--again", is_flag=True, help="Measure what was measured before, too.")
@options.as_json
def command(
    only: tuple[str, ...],
    fixed_channels: bool,
    fuse: bool,
    again: bool,
    as_json: bool,
    **network: Any,
) -> None:
    """Build the packages of a network and time its layers beside torch, ahead of its use.

    A program's `convgen.swap(model, inputs)` then finds both: packages in the cache, and what was
    measured beside the table of tuned schedules. MODULE:FACTORY is as for `convgen scan`.

    \b
    Example:
      convgen swap networks:unet --input 2,1,128,128,128 --amp f16
    """
    from convgen.commands import report

    with networks.prepared(**network) as (model, inputs), report.Progress() as progress:
        from convgen.models import layers
        from convgen.models.errors import NetworkError
        from convgen.models.swap import swap

        if not layers.find(model):
            raise NetworkError("the network has no convolution")
        found = swap(
            model,
            inputs,
            only=only or None,
            fixed_channels=fixed_channels,
            measure=True if again else None,
            fuse=fuse,
            progress=progress,
        )
    if as_json:
        report.json(found.to_dict())
    else:
        networks.show(found)
