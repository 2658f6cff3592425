"""The options of `eval` for people's own images, and what it does with them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mamlctl.checks import Problem, flag
from mamlctl.config import OWN_IMAGES, EvalConfig
from mamlctl.display import open_display, show_own_result, write_json
from mamlctl.errors import ExitCode, SettingsError
from mamlctl.predictions import document

Files = Annotated[
    list[Path] | None,
    typer.Argument(help="With --query: more of them, as a shell makes of *.", metavar="FILES"),
]
Support = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder with a folder of images for each of your classes.",
        rich_help_panel=OWN_IMAGES,
    ),
]
Query = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH",
        help="Image to tell apart, or a folder of them, flat or in folders named as the classes; repeatable.",
        rich_help_panel=OWN_IMAGES,
    ),
]
Csv = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the predictions as a table, too.", rich_help_panel=OWN_IMAGES),
]
SaveAdapted = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write the adapted weights, for torch's own layers.", rich_help_panel=OWN_IMAGES
    ),
]
# What decides the tasks that a test draws; own images are one task, and it is given.
OF_TASKS: tuple[str, ...] = ("split", "tasks", "queries", "eval_seed", "data_root", "dataset")
OF_TASKS += ("disjoint", "label_permutations")


@dataclass(frozen=True)
class OwnImages:
    """What was asked of a run about people's own images."""

    support: Path
    queries: Sequence[Path]
    csv: Path | None
    save_adapted: Path | None
    plot: bool

    def __call__(self, run: Path, settings: EvalConfig, *, json: bool, quiet: bool) -> ExitCode:
        """Answer it."""
        from mamlctl.commands.own_images import Wanted, predict_own

        wanted = Wanted(self.support, self.queries, self.plot, self.csv, self.save_adapted)
        with open_display(Console(stderr=True), quiet=quiet) as display:
            result = predict_own(run, settings, wanted, on_event=display)
        if json:
            write_json(sys.stdout, document(result))
        else:
            show_own_result(Console(), result)
        return ExitCode.OK


def own_images(
    given: Mapping[str, Any],
    support: Path,
    queries: Sequence[Path],
    csv: Path | None,
    save_adapted: Path | None,
    plot: bool,
    beside: Sequence[Path] | None,
) -> OwnImages:
    """The request, if it makes sense. Raises SettingsError."""
    problems: list[Problem] = [
        (f"{flag(name)} has no effect with --support, which is one task of your own", "leave it out")
        for name in OF_TASKS
        if name in given
    ]
    if beside:
        problems.append(("--beside is for curves, and --support holds images", "leave it out"))
    if not queries:
        for name, asked in (("--csv", csv is not None), ("--plot", plot)):
            if asked:
                problems.append((f"{name} has no effect without --query", "add --query or leave it out"))
        if save_adapted is None:
            problems.append(("--support alone asks for nothing", "add --query, or --save-adapted FILE"))
    if problems:
        raise SettingsError(problems)
    return OwnImages(support, queries, csv, save_adapted, plot)


def without_support(given: Mapping[str, object], files: Sequence[Path] | None) -> None:
    """Raise SettingsError for what means something with --support only."""
    problems = [
        (f"{name} has no effect without --support", "add --support DIR or leave it out")
        for name, value in given.items()
        if value
    ]
    if files and not problems:
        problems = [(f"eval takes one run, but {files[0]} was named too", "one run at a time")]
    if problems:
        raise SettingsError(problems)
