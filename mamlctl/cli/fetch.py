"""The `fetch` command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mamlctl.cli.common_options import OutputOptions, option, unused
from mamlctl.cli.options import with_options
from mamlctl.core.errors import ExitCode, SettingsError
from mamlctl.display.console import say
from mamlctl.display.datasets import fetched_line, show_data_sets, verified_line
from mamlctl.settings.fields import HARDWARE


@with_options(OutputOptions)
def fetch(
    options: OutputOptions,
    names: Annotated[
        list[str] | None, typer.Argument(help="Data sets (--list shows all), e.g. omniglot.")
    ] = None,
    list_: Annotated[
        bool, option(None, "List all data sets with their sources, and whether they are present.", "--list")
    ] = False,
    verify: Annotated[
        bool,
        option(None, "Check every byte of what is present; exit with code 3 if it is damaged.", "--verify"),
    ] = False,
    source: Annotated[
        list[Path] | None,
        option(None, "Use local archives, or a folder that contains them (repeatable).", "--from"),
    ] = None,
    mirror: Annotated[
        list[str] | None,
        option(None, "URL of a folder with the archives, tried first (repeatable)."),
    ] = None,
    force: Annotated[bool, option(None, "Prepare again even if the data set is present.", "--force")] = False,
    data_root: Annotated[
        str | None,
        option(HARDWARE, "Folder of prepared data sets (default: the platform's cache folder)."),
    ] = None,
) -> ExitCode:
    """Download data sets or read local archives, verify and pack them; interrupted downloads resume."""
    from mamlctl.experiments.fetch import fetch_all, list_all, refuse_damage, verify_all

    if list_ or verify:
        fetching = {"--from": source, "--mirror": mirror, "--force": force, "--offline": options.offline}
        fetching["--verify"] = list_ and verify
        if problems := unused(fetching, f"with {'--list' if list_ else '--verify'}"):
            raise SettingsError(problems)
    if list_:
        entries = list_all(names or [], data_root=data_root)
        options.write(entries, {"format": 1, "data_sets": entries}, show_data_sets)
        return ExitCode.OK
    with options.display() as display:
        if verify:
            entries = verify_all(names or [], data_root=data_root, on_event=display)
        else:
            entries = fetch_all(
                names or [],
                source=source,
                mirrors=mirror or [],
                data_root=data_root,
                force=force,
                offline=options.offline,
                on_event=display,
            )
    line_of = verified_line if verify else fetched_line

    def show(console: Console, entries: Sequence[Mapping[str, Any]]) -> None:
        for entry in entries:
            say(console, line_of(entry))

    options.write(entries, {"format": 1, "data_sets": entries}, show)
    if verify:
        refuse_damage(entries)
    return ExitCode.OK
