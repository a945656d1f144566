"""``convgen export``: a layer, or a model with its layers, as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from convgen.commands import options
from convgen.engines.backends import BACKENDS
from convgen.spec import ConvSpec
from convgen.spec.dtypes import DTYPES


@click.command("export", short_help="Write a layer or a model as one file that needs torch alone.")
@click.argument("module", required=False)
@options.specification(required=False)
@click.option("--in-channels", type=int, metavar="N", help="Fix the input's channels.")
@click.option("--out-channels", type=int, metavar="N", help="Fix the output's channels.")
@click.option(
    "--model",
    "problem",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PROBLEM.py",
    help="Export a whole problem: a file with Model and get_init_inputs.",
)
@click.option(
    "--class",
    "class_name",
    default="ModelNew",
    show_default=True,
    metavar="NAME",
    help="The class, in Model's place, that --model writes.",
)
@click.option(
    "--fixed-channels", is_flag=True, help="With --model: kernels for the layers' channels alone."
)
@options.output("-o", "--output", metavar="FILE.py", help_text="The file to write.", required=True)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    callback=options.dtypes,
    metavar="|".join(DTYPES),
    help="Element type; repeat it or separate by commas.  [default: the MODULE's, else f32]",
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    help="What to hold kernels for.  [default: the MODULE's, else both]",
)
@click.option(
    "--backward/--no-backward", default=True, show_default=True, help="Hold gradients, too."
)
@click.option(
    "--precision",
    type=click.Choice(("torch", "match", "tf32", "fp32")),
    help="Of fp32 on tensor cores: as torch's switch says; TF32 where that agrees with torch's "
    "result; TF32; or accurate.  [default: match with --model, else torch]",
)
@click.option(
    "--arch",
    "archs",
    multiple=True,
    callback=options.split,
    metavar="90a|sm_80",
    help="Take the schedules measured on this GPU; the file serves any.  [default: the GPUs "
    "present]",
)
@click.option("--force", is_flag=True, help="Replace whatever lies at the output.")
def command(
    module: str | None,
    problem: Path | None,
    class_name: str,
    fixed_channels: bool,
    output: Path,
    dtypes: tuple[str, ...] | None,
    backend: str | None,
    backward: bool,
    precision: str | None,
    archs: tuple[str, ...],
    force: bool,
    op: str,
    kernel: tuple[int, ...] | None,
    **constants: Any,
) -> None:
    """Write a MODULE (name or path), a layer by its options, or a model as one Python file.

    The file needs torch and a compiler alone, and compiles its kernels when they are first called.

    \b
    Examples:
      convgen export conv_transpose3d_k3_s2 -o upsample.py
      convgen export --kernel 3 --stride 2 --backend cuda -o upsample.py
      convgen export --model problem.py --class ModelNew -o solution.py
    """
    from convgen.commands import catalog, report
    from convgen.exporting import one_file

    if sum(given is not None for given in (module, kernel, problem)) != 1:
        raise click.UsageError("Give one of MODULE, --kernel and --model.")
    one_file.check_replaceable(output, force)
    common: dict[str, Any] = {
        "dtypes": dtypes,
        "backends": backend,
        "backward": backward,
        "archs": archs or None,
        "force": force,
    }
    if precision is not None:
        common["precision"] = precision
    if problem is not None:
        written = one_file.export_model(
            problem, output, class_name=class_name, fixed_channels=fixed_channels, **common
        )
        offered = class_name
    else:
        what: Any
        if module is not None:
            (found,) = catalog.find([module], Path(options.FOLDER))
            what, spec = found.path, found.spec
        else:
            what = spec = ConvSpec.make(op, kernel_size=kernel or (), **constants)
        written = one_file.export(what, output, **common)
        offered = spec.class_name
    report.exported(written)
    stem = output.stem
    click.echo(f"from {stem} import {offered}" if stem.isidentifier() else str(output))
