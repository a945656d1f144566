"""``convgen generate``: generate and compile a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from convgen.commands import options
from convgen.engines.backends import BACKENDS
from convgen.spec import ConvSpec
from convgen.spec.dtypes import DTYPES


@click.command("generate", short_help="Generate and compile a module.")
@options.specification(required=True)
@click.option(
    "--in-channels", type=int, metavar="N", help="Fix the input's channels; any number otherwise."
)
@click.option(
    "--out-channels", type=int, metavar="N", help="Fix the output's channels; any number otherwise."
)
@click.option(
    "--activation",
    metavar="NAME[:NUMBERS]",
    help="Computed in the same kernel: relu, leaky_relu:0.01, silu, gelu, gelu:tanh, sigmoid, "
    "tanh, hardswish, clamp:MIN,MAX, hardtanh:MIN,MAX, relu6.",
)
@click.option(
    "--residual",
    is_flag=True,
    help="Take a tensor of the output's shape to add, before the activation.",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    callback=options.dtypes,
    metavar="|".join(DTYPES),
    help="Element type; repeat it or separate by commas.  [default: f32,f64 for cpu, f32 for cuda]",
)
@click.option(
    "--backend",
    type=click.Choice([*BACKENDS, "auto"]),
    default="auto",
    show_default=True,
    help="What to compile for; auto is cpu, and cuda where a GPU is present.",
)
@click.option(
    "--arch",
    "archs",
    multiple=True,
    callback=options.split,
    metavar="90a|sm_80|80+ptx",
    help="GPU architecture; repeat it or separate by commas.  [default: of the GPUs present, else "
    "80+ptx]",
)
@click.option(
    "--out",
    default=options.FOLDER,
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write the module into.",
)
@click.option("--name", metavar="NAME", help="Name of the module instead of the canonical one.")
def command(
    op: str,
    kernel: tuple[int, ...],
    dtypes: tuple[str, ...] | None,
    backend: str,
    archs: tuple[str, ...],
    out: Path,
    name: str | None,
    **arguments: Any,
) -> None:
    """Generate and compile a module, and print the line that imports it.

    \b
    Examples:
      convgen generate --kernel 3 --stride 2
      convgen generate --kernel 3,5,5 --padding 1,2,2 --dtype f32,f16 --backend cuda --arch 90a
      convgen generate --op conv1d --kernel 7 --padding same --dilation 3 --groups 64
      convgen generate --op conv2d --kernel 3 --padding 1 --activation leaky_relu:0.01 --residual
    """
    from convgen.commands import catalog, report
    from convgen.specialize import export
    from convgen.specialize import generate as build

    spec = ConvSpec.make(op, kernel_size=kernel, **arguments)
    if archs and backend == "cpu":
        raise click.UsageError("--arch is for --backend cuda or auto.")
    target = catalog.destination(out, spec.name if name is None else name, spec)
    with report.Progress() as progress:
        package = build(
            spec,
            dtypes=dtypes,
            backends=None if backend == "auto" else (backend,),
            archs=archs or None,
            progress=progress,
        )
    module = catalog.load(export(package, out, target.name))
    report.written(module, compiled=progress.total > 0, seconds=progress.seconds)
    click.echo(catalog.import_line(module))
