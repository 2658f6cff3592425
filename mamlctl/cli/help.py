"""The help of a command: the options that people use most, or all of them."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from typing import Any

import typer
from rich.console import Console

from mamlctl.display.console import WIDEST, say, say_description

INDENT = 2
LEFT = 28  # columns before a description

Row = tuple[str, str]  # an option with its value, or the name of a command, and the description


def show_help(
    console: Console,
    ctx: Any,
    left_out: Collection[str] = (),
    commands: Mapping[str, str] | None = None,
) -> None:
    """Print the help of a command.

    Typer's own help gives half of 80 columns to the flags, and importing it takes 60 ms.

    Args:
        console: where to print.
        ctx: the context of the command, whose class is private in Typer.
        left_out: the names of options to leave out.
        commands: the summaries of subcommands, if there are any.
    """
    command, width = ctx.command, min(console.width, WIDEST)
    say(console, (command.get_usage(ctx), "bold"))
    _say_paragraphs(console, command.help, width)
    sections = _sections(ctx, left_out)
    if commands:
        sections["Commands"] = list(commands.items())
    for heading, rows in sections.items():
        say(console)
        say(console, (heading, "bold"))
        for name, text in rows:
            say_description(console, (" " * INDENT + name, "cyan"), text, LEFT, width)
    _say_paragraphs(console, command.epilog, width)


def show_everything(ctx: typer.Context, requested: bool) -> None:
    """The callback of --help-all."""
    if requested and not ctx.resilient_parsing:
        show_help(Console(), ctx)
        raise typer.Exit


def _sections(ctx: Any, left_out: Collection[str]) -> dict[str, list[Row]]:
    """The rows of each panel, in the order of the options; arguments and general options come first."""
    sections: dict[str, list[Row]] = {"Arguments": [], "Options": []}
    for param in ctx.command.get_params(ctx):
        if param.param_type_name == "argument":
            sections["Arguments"].append((" ".join(param.get_usage_pieces(ctx)), param.help))
        elif param.name not in left_out:
            rows = sections.setdefault(param.rich_help_panel or "Options", [])
            rows.append((_flags(param, ctx), _description(param)))
    return {heading: rows for heading, rows in sections.items() if rows}


def _flags(option: Any, ctx: Any) -> str:
    """'-V, --version', '--ways <int>' or '--msl / --no-msl'."""
    flags = ", ".join(sorted(option.opts, key=len))
    if option.secondary_opts:
        return f"{flags} / {', '.join(option.secondary_opts)}"
    if option.is_flag:
        return flags
    kind = option.metavar or option.display_type(ctx).lower()
    for word in ("list[", "]", " range"):
        kind = kind.replace(word, "")
    return f"{flags} {kind}"


def _description(option: Any) -> str:
    """The help of an option, and its default if the help does not say it."""
    has_default = option.show_default and option.default not in (None, False)
    return f"{option.help} Default: {option.default}." if has_default else str(option.help)


def _say_paragraphs(console: Console, text: str | None, width: int) -> None:
    """Print each paragraph after an empty line."""
    for paragraph in (text or "").split("\n\n"):
        say(console)
        # A path is not broken, so that it can be copied.
        for line in textwrap.wrap(paragraph, width, break_on_hyphens=False, break_long_words=False):
            say(console, line)
