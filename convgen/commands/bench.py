"""``convgen bench``: time modules beside torch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from convgen.commands import options


@click.command("bench", short_help="Time modules beside torch's own.")
@options.layers
@click.option("--bias", is_flag=True, help="Give the one layer a bias.")
@options.setting
@click.option(
    "--layout",
    type=click.Choice(("contiguous", "channels_last", "both")),
    default="contiguous",
    show_default=True,
    help="Of inputs, outputs, gradients and, if channels_last, weights.",
)
@click.option(
    "--gradients",
    type=click.Choice(("all", "input", "weight")),
    default="all",
    show_default=True,
    help="What the backward pass is of.",
)
@options.seconds("Time for all layers, without compiling.  [default: about 10 s a layer]")
@click.option(
    "--overhead", is_flag=True, help="Measure instead what a forward call costs the host."
)
@click.option("--memory", is_flag=True, help="Print, too, what a step allocates on a GPU at most.")
@options.seed
@options.output("--json", "json_file", help_text="Write all figures as JSON, after every layer.")
@options.output(
    "--plot", "plot_file", metavar="FILE.png", help_text="Draw a roofline and the speed-ups."
)
def command(
    suite: str | None,
    patterns: tuple[str, ...],
    kernel: tuple[int, ...] | None,
    shape: tuple[int, ...] | None,
    out_channels: int | None,
    bias: bool,
    dtype: str,
    device: str | None,
    tf32: bool,
    fixed_channels: bool,
    layout: str,
    gradients: str,
    seconds: float | None,
    overhead: bool,
    memory: bool,
    seed: int,
    json_file: Path | None,
    plot_file: Path | None,
    **constants: Any,
) -> None:
    """Time layers forward and backward beside torch: as it comes, and at its best with the same
    memory layout and with any.

    All results are compared with float64 in the same run: a wrong one has no time. Exit status 1
    if one of convgen's is wrong, or if a layer did not run.

    \b
    Examples:
      convgen bench --suite kernelbench3d --seconds 300 --json out.json --plot out.png
      convgen bench --suite networks --layout both --dtype bf16 --gradients input
      convgen bench --suite models --layers hifigan*,3dgan* --dtype f16
      convgen bench --kernel 3 --stride 2 --padding 1 --shape 2,32,16,32,32 --out-channels 16
    """
    from convgen.commands import bench_report, report
    from convgen.measuring import plots

    chosen = options.chosen_layers(suite, patterns, kernel, shape, out_channels, bias, constants)
    if plot_file:
        plots.check(plot_file)  # Rather now than after the work.
    # These import torch, which takes a second or two.
    from convgen.measuring import bench
    from convgen.measuring.layers import LAYOUTS
    from convgen.measuring.overhead import overheads

    where = bench.device_for(device)
    if where is None:
        raise click.UsageError("--device cuda: there is no GPU that torch can use.")
    if memory and where.type != "cuda":
        raise click.UsageError("--memory is for GPUs: torch does not count a CPU's.")
    chosen = options.on_device(chosen, where.type, patterns)
    with report.Progress() as progress:
        modules = bench.compile_layers(chosen, where, dtype, fixed_channels, progress)
    if overhead:
        host = overheads(chosen, modules, device=where, dtype=dtype, tf32=tf32)
        bench_report.host_times(host)
        if json_file:
            report.write_json(json_file, host.to_dict())
        raise click.exceptions.Exit(0 if host.ok else 1)
    with report.Progress() as progress:

        def finished(result: bench.Report, layer: str) -> None:
            if json_file:
                report.write_json(json_file, result.to_dict())
            progress(result.finished, len(chosen), bench_report.progress_of(result, layer))

        result = bench.bench(
            chosen,
            modules,
            device=where,
            dtype=dtype,
            tf32=tf32,
            layouts=LAYOUTS if layout == "both" else (layout,),
            gradients=gradients,
            seconds=seconds,
            seed=seed,
            on_layer=finished,
        )
    bench_report.benchmark(result)
    if memory:
        bench_report.step_memory(result)
    if json_file:
        report.write_json(json_file, result.to_dict())
    if plot_file:
        plots.plot(result, plot_file)
    raise click.exceptions.Exit(0 if result.ok else 1)
