"""The options that `ablate` and `compare` share."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from rich.console import Console

from mamlctl.cli.common_options import GuardOptions, SettingsOptions, TimeLimit, option, unused
from mamlctl.core.errors import SettingsError
from mamlctl.core.literals import ExecutorName
from mamlctl.core.problems import Problem, flag
from mamlctl.display.comparison_table import show_table
from mamlctl.display.console import write_json, write_text
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.fields import HARDWARE, OUTPUT
from mamlctl.settings.merge import evaluation_settings
from mamlctl.settings.variables import RUNS

if TYPE_CHECKING:
    from mamlctl.report.table import Table

PLAN = "Plan"  # a help panel
TEST_OPTIONS = (
    "tasks",
    "split",
    "disjoint",
    "label_permutations",
    "models",
    "per_step",
)  # of EvalConfig, next to those of TrainConfig
FORMATS = ("json", "csv", "markdown", "latex")  # of the table
DRY = ("dry_run", "print_commands", "slurm")  # instead of training and printing a table


def executors() -> list[str]:
    """The values of --executor, for completion in a shell."""
    return list(get_args(ExecutorName))


def table_settings(values: Mapping[str, Any]) -> EvalConfig:
    """The test settings for the runs of a table.

    Raises SettingsError for invalid values, and for a test without the best checkpoints.
    """
    evaluate = evaluation_settings(values, "flag")
    if evaluate.models == "ensemble":
        fact = "--models is ensemble, but a table compares the single best checkpoints"
        raise SettingsError([(fact, "use --models best or all")])
    return evaluate


@dataclass(frozen=True)
class GridOptions(GuardOptions, SettingsOptions):
    """The options of `ablate` and `compare` other than training settings; None: not on the command line."""

    seeds: Annotated[
        int | None, option(PLAN, "Runs per row, with seeds from --seed upwards (default: 3).", min=1)
    ] = None
    out: Annotated[
        Path | None,
        option(OUTPUT, f"Folder of the table and its runs (default: one under runs/, or under {RUNS})."),
    ] = None
    workers: Annotated[
        int | None, option(HARDWARE, "Cells to run at once (default: one per CUDA device, else 1).", min=1)
    ] = None
    executor: Annotated[
        str,
        option(HARDWARE, "Where cells run: local or ray.", autocompletion=executors),
    ] = "local"
    address: Annotated[
        str | None,
        option(HARDWARE, "With ray: cluster address, HOST:PORT, auto or local (default: auto)."),
    ] = None
    cell_cpus: Annotated[float | None, option(HARDWARE, "With ray: CPUs per cell (default: 1).")] = None
    cell_gpus: Annotated[
        float | None, option(HARDWARE, "With ray: GPUs per cell (default: 0), e.g. 0.5.")
    ] = None
    slice: Annotated[
        str | None,
        option(
            HARDWARE, "With ray: training time between syncs, the most a lost node can cost (default: 10m)."
        ),
    ] = None
    time_limit: TimeLimit = None
    dry_run: Annotated[
        bool, option(PLAN, "Time a few meta-steps, print the time for all cells, and exit.", "--dry-run")
    ] = False
    print_commands: Annotated[
        bool, option(PLAN, "Print one shell command per cell and exit.", "--print-commands")
    ] = False
    slurm: Annotated[
        bool, option(PLAN, "Print a SLURM array script of those commands and exit.", "--slurm")
    ] = False
    sort: Annotated[str | None, option(OUTPUT, "Sort rows by this column.")] = None
    csv: Annotated[bool, option(OUTPUT, "Print the table as CSV on stdout.", "--csv")] = False
    markdown: Annotated[bool, option(OUTPUT, "Print the table as Markdown on stdout.", "--markdown")] = False
    latex: Annotated[bool, option(OUTPUT, "Print the table as LaTeX booktabs on stdout.", "--latex")] = False

    def check(self) -> None:
        """Check the options before anything is read. Raises SettingsError if some do not fit together."""
        from mamlctl.report.columns import check_sort

        formats = [name for name in FORMATS if getattr(self, name)]
        problems: list[Problem] = []
        if len(formats) > 1:
            flags = " and ".join(map(flag, formats))
            problems.append((f"{flags} are given together", "choose one; the --out folder contains them all"))
        problems += self._problems_without_table(formats)
        if self.executor not in get_args(ExecutorName):
            names = " or ".join(get_args(ExecutorName))
            problems.append((f"--executor is '{self.executor}', which is not an executor", f"use {names}"))
        if self.executor == "local":
            ray_options = self.by_flag("address", "cell_cpus", "cell_gpus", "slice")
            problems += unused(ray_options, "without --executor ray", "add --executor ray, or leave it out")
        if problems:
            raise SettingsError(problems)
        check_sort(self.sort)

    def _problems_without_table(self, formats: Sequence[str]) -> list[Problem]:
        """Problems for options that have no effect if no table is printed."""
        dry = [name for name in DRY if getattr(self, name)]
        if len(dry) > 1:
            return [(f"{' and '.join(map(flag, dry))} are given together", "choose one")]
        if not dry:
            return []
        if dry == ["dry_run"] and formats == ["json"]:
            formats = []
        table_options = self.by_flag(*formats, "sort", "time_limit", "fail_under", "fail_over")
        return unused(table_options, f"with {flag(dry[0])}, which prints no table")

    def with_sets(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """The settings from the command line; flags override --set."""
        return {**self.set_values(), **flags}

    def all_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings below the command line and those on it (`settings`); later ones override."""
        merged: dict[str, Any] = {}
        for _, values in (*self.base_layers, ("command line", settings)):
            merged |= values
        return merged

    def write_table(self, table: Table) -> None:
        """Print the table on stdout in the chosen format."""
        from mamlctl.report import export

        if self.json:
            write_json(sys.stdout, export.document(table, self.sort))
        elif self.csv or self.markdown or self.latex:
            text = export.to_csv if self.csv else export.to_markdown if self.markdown else export.to_latex
            write_text(sys.stdout, text(table, self.sort))
        else:
            show_table(Console(), table, self.sort)
