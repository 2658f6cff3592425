"""`eval`: its options, for test tasks and for the user's own images."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mamlctl.cli.options import Json, Offline, Quiet, with_settings
from mamlctl.core.errors import ExitCode, SettingsError
from mamlctl.core.problems import Problem, flag
from mamlctl.core.results import named
from mamlctl.display.console import write_json
from mamlctl.display.displays import open_display
from mamlctl.display.predictions import document, show_own_result
from mamlctl.display.run_results import show_eval_result
from mamlctl.settings.schema import OUTPUT, OWN_IMAGES, EvalConfig

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
        from mamlctl.experiments.classify import ClassifyRequest, predict_own

        wanted = ClassifyRequest(self.support, self.queries, self.plot, self.csv, self.save_adapted)
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


@with_settings(EvalConfig)
def evaluate(
    given: dict[str, Any],
    run: Annotated[Path, typer.Argument(help="Run folder of a training.")],
    files: Files = None,
    support: Support = None,
    query: Query = None,
    csv: Csv = None,
    save_adapted: SaveAdapted = None,
    plot: Annotated[
        bool,
        typer.Option("--plot", help="Also draw pictures into RUN/plots.", rich_help_panel=OUTPUT),
    ] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --plot and curves: another run to draw beside; repeatable.", rich_help_panel=OUTPUT
        ),
    ] = None,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> ExitCode:
    """Test a trained run, or let it learn your own classes and tell your images apart (--support, --query).

    The test: its best checkpoint, and the ensemble of its five best, on the same tasks.
    """
    if support is not None:
        asked = own_images(given, support, [*(query or []), *(files or [])], csv, save_adapted, plot, beside)
        return asked(run, EvalConfig(**given), json=json, quiet=quiet)
    without_support({"--query": query, "--csv": csv, "--save-adapted": save_adapted}, files)
    from mamlctl.experiments.evaluate import evaluate_run

    with open_display(Console(stderr=True), quiet=quiet) as display:
        if beside and not plot:
            raise SettingsError([("--beside has no effect without --plot", "add --plot or leave it out")])
        result = evaluate_run(run, EvalConfig(**given), offline=offline, on_event=display)
        if plot:
            from mamlctl.experiments.plot import draw

            files = draw(run, EvalConfig(**given), beside or [], offline=offline, on_event=display)
            result = replace(result, pictures=tuple(map(str, files)))
    if json:
        document = {
            "format": 1,
            "run": result.run,
            "folder": result.folder,
            "results": [*map(named, result.rows)],
            "pictures": result.pictures,
            "notes": result.notes,
        }
        write_json(sys.stdout, document)
    else:
        show_eval_result(Console(), result)
    return ExitCode.OK
