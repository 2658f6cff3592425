"""The command line of `fetch`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mamlctl.cli.options import DataRoot, Json, Offline, Quiet
from mamlctl.core.errors import ExitCode, SettingsError
from mamlctl.display.console import write_json
from mamlctl.display.datasets import fetched_line, show_data_sets, verified_line
from mamlctl.display.displays import open_display


def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="Data sets, such as omniglot; --list shows all.")
    ] = None,
    list_: Annotated[
        bool,
        typer.Option("--list", help="Show what there is, where from, and whether it is here."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check again, to the last byte, what is here; 3 if damaged.")
    ] = False,
    source: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Local archives, or a folder that holds them; repeatable."),
    ] = None,
    mirror: Annotated[
        list[str] | None,
        typer.Option(help="Web address of a folder with the archives, asked first; repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Prepare it anew even if it is there.")] = False,
    data_root: DataRoot = None,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> ExitCode:
    """Download or take over data sets, verify them, and pack them once; a download that broke off goes on."""
    from mamlctl.experiments.fetch import fetch_all, list_all, refuse_damage, verify_all

    looking = "--list" if list_ else "--verify" if verify else None
    fetching = {"--from": source, "--mirror": mirror, "--force": force, "--offline": offline}
    if looking:
        _refuse_others(looking, fetching | {"--verify": verify and list_})
    if list_:
        entries = list_all(names or [], data_root=data_root)
        if json:
            write_json(sys.stdout, {"format": 1, "data_sets": entries})
        else:
            show_data_sets(Console(), entries)
        return ExitCode.OK
    with open_display(Console(stderr=True), quiet=quiet) as display:
        if verify:
            entries = verify_all(names or [], data_root=data_root, on_event=display)
        else:
            entries = fetch_all(
                names or [],
                source=source,
                mirrors=mirror or [],
                data_root=data_root,
                force=force,
                offline=offline,
                on_event=display,
            )
    if json:
        write_json(sys.stdout, {"format": 1, "data_sets": entries})
    else:
        for entry in entries:
            typer.echo(verified_line(entry) if verify else fetched_line(entry))
    if verify:
        refuse_damage(entries)
    return ExitCode.OK


def _refuse_others(switch: str, others: Mapping[str, object]) -> None:
    """An option that does nothing must say so."""
    without = [(f"{other} has no effect with {switch}", "leave it out") for other, on in others.items() if on]
    if without:
        raise SettingsError(without)
