"""Options that several commands take, and the parsers of their values.

Nothing heavier than click is imported at the top of this file, or of a command's:
``convgen --help`` must answer at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from convgen.engines.backends import BACKENDS
from convgen.spec import OPERATORS, ConvSpec, documents
from convgen.spec.dtypes import DTYPES, parse_dtype

if TYPE_CHECKING:
    from convgen.measuring.layers import Layer

Command = TypeVar("Command", bound=Callable[..., Any])

_PER_DIMENSION = "K|D,H,W"

FOLDER = "generated"
"""Where ``generate`` writes and the other commands look, unless ``--out`` says otherwise."""

modules_folder = click.option(
    "--in",
    "folder",
    default=FOLDER,
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the generated modules lie.",
)
seed = click.option(
    "--seed",
    type=click.IntRange(0, (1 << 63) - 1),
    default=0,
    show_default=True,
    metavar="N",
    help="Of the inputs.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def extents(*words: str) -> Callable[[str | int], tuple[int, ...] | str]:
    """Parses an int, ints per spatial dimension (``3,5,7`` or ``3x5x7``), or one of ``words``."""

    def parse(value: str | int) -> tuple[int, ...] | str:
        text = str(value)
        if text in words:
            return text
        try:
            return tuple(int(part) for part in text.replace("x", ",").split(","))
        except ValueError:
            allowed = "".join(f", nor {word!r}" for word in words)
            raise click.BadParameter(
                f"{documents.shown(text)} is neither an int nor ints as in 3,5,7{allowed}."
            ) from None

    return parse


def seconds(help_text: str) -> Callable[[Command], Command]:
    """The option that limits the time of a measurement."""
    return click.option(
        "--seconds",
        type=click.FloatRange(min=0, min_open=True),
        callback=finite,
        metavar="S",
        help=help_text,
    )


def output(
    *names: str, metavar: str = "FILE", help_text: str, required: bool = False
) -> Callable[[Command], Command]:
    """An option that names a file to write, which is tried before any work is done."""

    def check(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
        from convgen.building import disk

        if value is not None:
            try:
                disk.check_writable(value)
            except OSError as error:
                shown = documents.plain(str(value))
                raise click.BadParameter(f"cannot write {shown}: {error.strerror}.") from error
        return value

    return click.option(
        *names,
        type=click.Path(dir_okay=False, path_type=Path),
        callback=check,
        required=required,
        metavar=metavar,
        help=help_text,
    )


def split(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """``--dtype f32 --dtype f64`` and ``--dtype f32,f64`` mean the same."""
    words = (word.strip() for value in values for word in value.split(","))
    return tuple(dict.fromkeys(word for word in words if word))


def finite(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    """Refuses infinities and what is no number, which click takes for numbers."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not finite.")
    return value


def dtypes(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...] | None:
    """Canonical names of element types; None where none is given."""
    if not values:
        return None
    try:
        names = tuple(dict.fromkeys(map(parse_dtype, split(ctx, param, values))))
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    if not names:
        raise click.BadParameter(f"choose from {', '.join(DTYPES)}", ctx, param)
    return names


def specification(required: bool) -> Callable[[Command], Command]:
    """The options that make a specification; ``required`` says whether ``--kernel`` is."""
    options = (
        click.option(
            "--op",
            type=click.Choice(OPERATORS),
            default=OPERATORS[0],
            show_default=True,
            help="Operator, under torch.nn.functional's name.",
        ),
        click.option(
            "--kernel",
            type=extents(),
            required=required,
            metavar=_PER_DIMENSION,
            help="Kernel size: an int, or one per spatial dimension.",
        ),
        click.option(
            "--stride",
            type=extents(),
            default=1,
            show_default=True,
            metavar=_PER_DIMENSION,
            help="Stride.",
        ),
        click.option(
            "--padding",
            type=extents("same", "valid"),
            default=0,
            show_default=True,
            metavar=f"{_PER_DIMENSION}|same|valid",
            help="Padding; 'same' and 'valid' are for convolutions.",
        ),
        click.option(
            "--output-padding",
            type=extents(),
            default=0,
            show_default=True,
            metavar=_PER_DIMENSION,
            help="Extra output at the end; for transposed convolutions.",
        ),
        click.option(
            "--dilation",
            type=extents(),
            default=1,
            show_default=True,
            metavar=_PER_DIMENSION,
            help="Distance between the taps.",
        ),
        click.option(
            "--groups", type=int, default=1, show_default=True, metavar="N", help="Groups."
        ),
    )

    return lambda command: decorated(command, *options)


def layers(command: Command) -> Command:
    """The options that choose layers: a suite's, or one by its specification and shape."""
    return decorated(
        command,
        click.option(
            "--suite",
            metavar="NAME|FILE.json",
            help="Layers: kernelbench3d, kernelbench, models, networks, or a file of layers.",
        ),
        click.option(
            "--layers",
            "patterns",
            multiple=True,
            callback=split,
            metavar="NAMES",
            help="Only these of the suite, as in 61,hifigan*; repeat it or separate by commas.",
        ),
        specification(required=False),
        click.option(
            "--shape", type=extents(), metavar="N,C,D,H,W", help="Input of the one layer."
        ),
        click.option(
            "--out-channels", type=int, metavar="N", help="Output channels of the one layer."
        ),
    )


def setting(command: Command) -> Command:
    """The options that say in which dtype, where and for which channels layers are run."""
    return decorated(
        command,
        click.option(
            "--dtype",
            type=click.Choice(tuple(DTYPES)),
            default="f32",
            show_default=True,
            help="Element type.",
        ),
        click.option(
            "--device",
            type=click.Choice(BACKENDS),
            help="Where to run.  [default: a GPU if there is one, else cpu]",
        ),
        click.option(
            "--tf32/--no-tf32",
            default=True,
            show_default=True,
            help="Torch's switch for rounding fp32 to TF32 on a GPU.",
        ),
        click.option(
            "--fixed-channels",
            is_flag=True,
            help="Generate modules for the layers' channels alone.",
        ),
    )


def chosen_layers(
    suite: str | None,
    patterns: tuple[str, ...],
    kernel: tuple[int, ...] | None,
    shape: tuple[int, ...] | None,
    out_channels: int | None,
    bias: bool,
    constants: dict[str, Any],
) -> list[Layer]:
    """The layers that the options of :func:`layers` name."""
    from convgen.measuring.layers import Layer, read_suite, select

    if (suite is None) == (kernel is None):
        raise click.UsageError("Give --suite, or one layer by --kernel, --shape, --out-channels.")
    if kernel is None:
        assert suite is not None
        return select(read_suite(suite), patterns or ("*",))
    if shape is None or out_channels is None:
        raise click.UsageError("One layer needs --shape and --out-channels.")
    spec = ConvSpec.make(kernel_size=kernel, **constants)
    return [Layer(spec.name, spec, shape, out_channels, bias)]


def on_device(layers: list[Layer], backend: str, patterns: tuple[str, ...]) -> list[Layer]:
    """The chosen layers as a backend runs them: a CPU those of a suite that are marked for it."""
    from convgen.measuring.layers import for_cpu

    if backend != "cpu":
        return layers
    fitting = for_cpu(layers, named=patterns)
    if others := len(layers) - len(fitting):
        click.echo(f"{others} layers are left to GPUs, unless --layers names them.", err=True)
    return fitting


def decorated(command: Command, *decorators: Callable[[Any], Any]) -> Command:
    """Options in the order in which the help shows them."""
    for decorator in reversed(decorators):
        command = decorator(command)
    return command
