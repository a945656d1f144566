"""Options that several commands take, and the parsers of their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from convgen.dtypes import DTYPES, parse_dtype
from convgen.spec import OPERATORS

Command = TypeVar("Command", bound=Callable[..., Any])

_PER_DIMENSION = "K|D,H,W"


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
                f"{text!r} is neither an int nor ints as in 3,5,7{allowed}."
            ) from None

    return parse


def split(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """``--dtype f32 --dtype f64`` and ``--dtype f32,f64`` mean the same."""
    words = (word.strip() for value in values for word in value.split(","))
    return tuple(dict.fromkeys(word for word in words if word))


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

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
