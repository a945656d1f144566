"""``convgen tune``: find the fastest schedules by timing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from convgen.commands import options
from convgen.spec import CONTRACTIONS


@click.command("tune", short_help="Find the fastest schedules by timing them.")
@options.layers
@options.setting
@click.option(
    "--contraction",
    "contractions",
    multiple=True,
    type=click.Choice(CONTRACTIONS),
    help="Only this one; repeat it for several.  [default: all three]",
)
@click.option(
    "--candidates",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Schedules to compile for each contraction: the default, the table's, the model's best.",
)
@options.seconds("Time for all, without compiling.  [default: about 4 s a contraction]")
@options.seed
@click.option(
    "--table",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.json",
    help="Where to keep what won.  [default: the table that convgen generate reads]",
)
@click.option(
    "--dry-run", is_flag=True, help="Only list the candidates, with their predicted times."
)
@options.output("--json", "json_file", help_text="Write all candidates and their times as JSON.")
def command(
    suite: str | None,
    patterns: tuple[str, ...],
    kernel: tuple[int, ...] | None,
    shape: tuple[int, ...] | None,
    out_channels: int | None,
    dtype: str,
    device: str | None,
    tf32: bool,
    fixed_channels: bool,
    contractions: tuple[str, ...],
    candidates: int,
    seconds: float | None,
    seed: int,
    table: Path | None,
    dry_run: bool,
    json_file: Path | None,
    **constants: Any,
) -> None:
    """Compile the most promising schedules of layers, time them, and keep the fastest.

    What wins goes into a table, from which `convgen generate` takes it from then on, on this kind
    of GPU or processor. A schedule whose results are not those of float64 cannot win. Exit status
    1 if a contraction has no winner.

    \b
    Examples:
      convgen tune --suite kernelbench3d --layers 58,68 --seconds 120
      convgen tune --kernel 3 --stride 2 --padding 1 --shape 2,32,16,32,32 --out-channels 16
      convgen tune --suite models --layers nnunet-up1 --fixed-channels --no-tf32
    """
    from convgen.building import gpus
    from convgen.commands import report
    from convgen.engines import tuned
    from convgen.tuning import tables

    chosen = options.chosen_layers(suite, patterns, kernel, shape, out_channels, False, constants)
    path = table or tuned.user_table()
    if path is None and not dry_run:
        raise click.UsageError("CONVGEN_TUNED=0 switches tables off: give --table.")
    if path is not None:
        tuned.read(path)  # Rather now than after the work.
    if path is not None and not dry_run:
        tables.check_writable(path)
    # These import torch, which takes a second or two.
    from convgen.measuring import bench
    from convgen.tuning import choice, jobs, tune

    where = bench.device_for(device)
    if where is None and not dry_run:
        raise click.UsageError("--device cuda: there is no GPU that torch can use.")
    backend = device or (where.type if where else "cuda")
    work = jobs.jobs(
        options.on_device(chosen, backend, patterns),
        backend,
        dtype,
        tf32,
        tuple(dict.fromkeys(contractions)) or CONTRACTIONS,
        fixed_channels,
    )
    architectures = gpus.gpu_architectures()
    gpu = choice.gpu_of(architectures)
    outcomes = choice.all_candidates(work, gpu, candidates, architectures)
    if dry_run or where is None:
        report.candidates(outcomes)
        raise click.exceptions.Exit(0)
    with report.Progress() as progress:
        tune.compile_candidates(outcomes, backend, progress=progress)
    with report.Progress() as progress:

        def finished(outcome: jobs.Outcome, done: int) -> None:
            progress(done, len(outcomes), report.progress_of_tuning(outcome))

        winners = tune.tune(outcomes, where, seconds=seconds, seed=seed, on_job=finished)
    report.tuning(outcomes)
    if json_file:
        report.write_json(json_file, {"outcomes": [outcome.to_dict() for outcome in outcomes]})
    assert path is not None
    if winners:
        count = tables.store(winners, path)
        click.echo(f"{len(winners)} winners are in {path}, which holds {count}.")
    raise click.exceptions.Exit(0 if len(winners) == len(outcomes) else 1)
