"""``convgen scan``: where a network's time goes, and what convgen would change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from convgen.commands import networks, options


@click.command("scan", short_help="Where a network's time goes, and what convgen would change.")
@networks.network
@click.option(
    "--measure",
    is_flag=True,
    help="Build packages and time them.  [default: what was measured before, or a prediction]",
)
@options.as_json
@options.output("--plot", help_text="Draw the network's time before and after (png, svg, pdf).")
def command(
    only: tuple[str, ...],
    fixed_channels: bool,
    measure: bool,
    as_json: bool,
    plot: Path | None,
    **network: Any,
) -> None:
    """Time a network and its convolutions, and say which of them convgen computes faster.

    MODULE:FACTORY is a function or class that makes the network, looked for in the working folder,
    too; it may have arguments: 'monai.networks.nets:SegResNet(spatial_dims=3)'. Times are for one
    run, forward / backward; those with a ~ are predicted.

    \b
    Examples:
      convgen scan networks:unet --input 2,1,128,128,128 --amp f16
      convgen scan networks:vocoder --input 1,80,860 --inference --measure
      convgen scan networks:unet --input 2,1,64,64,64 --channels-last --plot unet.png
    """
    from convgen.commands import report
    from convgen.measuring import plots as charts

    if plot:
        charts.check(plot)
    with networks.prepared(**network) as (model, inputs), report.Progress() as progress:
        from convgen.models.scan import scan

        found = scan(
            model,
            inputs,
            only=only or None,
            fixed_channels=fixed_channels,
            measure=measure,
            progress=progress,
        )
    if plot:
        from convgen.models import plots

        plots.plot(found, plot)
    if as_json:
        report.json(found.to_dict())
    else:
        networks.show(found)
