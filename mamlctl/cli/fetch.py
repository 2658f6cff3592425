"""The `fetch` command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mamlctl.cli.common_options import OutputOptions, begin_work, option, unused
from mamlctl.cli.options import with_options
from mamlctl.core.errors import ExitCode, SettingsError
from mamlctl.core.problems import variable
from mamlctl.core.results import FetchedSet, ListedSet, VerifiedSet
from mamlctl.display.datasets import show_data_sets, show_fetched, show_verified
from mamlctl.settings.fields import HARDWARE
from mamlctl.settings.schema import TrainConfig
from mamlctl.settings.variables import variable_values


@with_options(OutputOptions)
def fetch(
    options: OutputOptions,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Data sets (--list shows all), or samples: images to try eval with.", metavar="NAMES"
        ),
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
        option(
            HARDWARE,
            "Folder of prepared data sets (default: the platform's cache folder). "
            f"Variable: {variable('data_root')}.",
        ),
    ] = None,
) -> ExitCode:
    """The command `mamlctl fetch`."""
    from mamlctl.data import samples
    from mamlctl.experiments.fetch import fetch_all, list_all, refuse_damage, verify_all

    begin_work()
    if data_root and set(names or []) == {samples.NAME}:
        raise SettingsError([("--data-root has no effect with samples alone", "leave it out")])
    data_root = data_root or variable_values(TrainConfig).get("data_root")
    if list_ or verify:
        fetching = {"--from": source, "--mirror": mirror, "--force": force, "--offline": options.offline}
        fetching["--verify"] = list_ and verify
        if problems := unused(fetching, f"with {'--list' if list_ else '--verify'}"):
            raise SettingsError(problems)
    if list_:
        listed = list_all(names or [], data_root=data_root)
        options.write(listed, _document(listed), show_data_sets)
        return ExitCode.OK
    if verify:
        with options.display() as display:
            verified = verify_all(names or [], data_root=data_root, on_event=display)
        options.write(verified, _document(verified), show_verified)
        refuse_damage(verified)
        return ExitCode.OK
    with options.display() as display:
        fetched = fetch_all(
            names or [],
            source=source,
            mirrors=mirror or [],
            data_root=data_root,
            force=force,
            offline=options.offline,
            on_event=display,
        )
    options.write(fetched, _document(fetched), show_fetched)
    if samples.NAME in (names or []):
        options.say(samples.NEXT)
    return ExitCode.OK


def _document(entries: Sequence[ListedSet | VerifiedSet | FetchedSet]) -> dict[str, Any]:
    return {"format": 1, "data_sets": [asdict(entry) for entry in entries]}
