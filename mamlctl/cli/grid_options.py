"""The options that `ablate` and `compare` share, and how both fill a grid and show its table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mamlctl.cli.options import Json, Offline, Quiet
from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import Problem, flag
from mamlctl.display.comparison_table import show_table
from mamlctl.display.console import write_json
from mamlctl.settings.merge import Layer
from mamlctl.settings.presets import load_file, load_preset, parse_sets, preset_names
from mamlctl.settings.schema import EPISODE, HARDWARE, OUTPUT

if TYPE_CHECKING:
    from mamlctl.report.table import Table

PLAN = "Plan"


def _option(panel: str | None, text: str, *names: str, least: int | None = None) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, min=least)


@dataclass(frozen=True)
class TableOptions:
    """What `ablate` and `compare` are asked beside the settings of training; None is: not said."""

    seeds: Annotated[int | None, _option(PLAN, "Runs of a row, from --seed on. Default: 3.", least=1)] = None
    preset: Annotated[
        str | None,
        typer.Option(help="Settings that ship with mamlctl, below the flags.", autocompletion=preset_names),
    ] = None
    config: Annotated[Path | None, _option(None, "YAML file of settings.")] = None
    set_: Annotated[list[str] | None, _option(None, "Any setting as key=value; repeatable.", "--set")] = None
    tasks: Annotated[int | None, _option(EPISODE, "Test tasks. Default: 600.", least=2)] = None
    split: Annotated[str | None, _option(EPISODE, "Classes of the test tasks: test, val or train.")] = None
    disjoint: Annotated[
        bool, _option(EPISODE, "Test tasks share no images, as far as the split allows.", "--disjoint")
    ] = False
    label_permutations: Annotated[
        int | None, _option(EPISODE, "Label orders that every test task is averaged over.", least=1)
    ] = None
    out: Annotated[
        Path | None, _option(OUTPUT, "Folder of the table and its runs. Default: one under runs/.")
    ] = None
    workers: Annotated[
        int | None, _option(HARDWARE, "Cells at a time. Default: one for each CUDA device, else 1.", least=1)
    ] = None
    executor: Annotated[str, _option(HARDWARE, "Where cells run: local or ray.")] = "local"
    address: Annotated[
        str | None, _option(HARDWARE, "With ray: HOST:PORT, auto or local. Default: auto.")
    ] = None
    cell_cpus: Annotated[float | None, _option(HARDWARE, "With ray: CPUs of a cell. Default: 1.")] = None
    cell_gpus: Annotated[
        float | None, _option(HARDWARE, "With ray: GPUs of a cell, or a share of one. Default: 0.")
    ] = None
    slice: Annotated[
        str | None, _option(HARDWARE, "With ray: what a lost node costs at most. Default: 10m.")
    ] = None
    time_limit: Annotated[str | None, _option(OUTPUT, "Save and stop after so long: 90s, 9m, 1h30m.")] = None
    dry_run: Annotated[
        bool, _option(PLAN, "Measure a few meta-steps, tell cells and time, and stop.", "--dry-run")
    ] = False
    print_commands: Annotated[
        bool, _option(PLAN, "Print a shell line for every cell, and stop.", "--print-commands")
    ] = False
    slurm: Annotated[
        bool, _option(PLAN, "Print a SLURM array script of those lines, and stop.", "--slurm")
    ] = False
    sort: Annotated[str | None, _option(OUTPUT, "Sort rows by this column.")] = None
    json: Json = False
    csv: Annotated[bool, _option(OUTPUT, "The table as CSV on stdout.", "--csv")] = False
    markdown: Annotated[bool, _option(OUTPUT, "The table as Markdown on stdout.", "--markdown")] = False
    latex: Annotated[bool, _option(OUTPUT, "The table as LaTeX (booktabs) on stdout.", "--latex")] = False
    offline: Offline = False
    quiet: Quiet = False

    def check(self) -> None:
        """Raises SettingsError for what does not go together, before anything is read."""
        from mamlctl.report.columns import check_sort

        problems: list[Problem] = []
        chosen = [name for name in ("json", "csv", "markdown", "latex") if getattr(self, name)]
        if len(chosen) > 1:
            given = " and ".join(f"--{name}" for name in chosen)
            problems.append((f"{given} are given together", "choose one; --out has them all"))
        problems += self._without_table(chosen)
        if self.executor not in ("local", "ray"):
            problems.append((f"--executor is '{self.executor}'", "use local or ray"))
        if self.executor == "local":
            of_ray = ("address", "cell_cpus", "cell_gpus", "slice")
            problems += [
                (f"{flag(name)} has no effect without --executor ray", "add --executor ray, or leave it out")
                for name in of_ray
                if getattr(self, name) is not None
            ]
        if problems:
            raise SettingsError(problems)
        check_sort(self.sort)

    def _without_table(self, formats: Sequence[str]) -> list[Problem]:
        """What has no effect where no table is made."""
        only = [name for name in ("dry_run", "print_commands", "slurm") if getattr(self, name)]
        if len(only) > 1:
            return [(f"{' and '.join(map(flag, only))} are given together", "choose one")]
        unused = [*formats, *(name for name in ("sort", "time_limit") if getattr(self, name) is not None)]
        if not only or (only, unused) == (["dry_run"], ["json"]):
            return []
        fact = f"has no effect with {flag(only[0])}, which makes no table"
        return [(f"{flag(name)} {fact}", "leave it out") for name in unused]

    def asked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the command line: flags over --set."""
        return {**parse_sets(self.set_ or []), **given}

    @property
    def here(self) -> bool:
        """Whether this machine is to do the work."""
        return self.executor == "local" and not (self.print_commands or self.slurm)

    def said(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as preset, file and command line have them, each over the one before."""
        return {key: value for _, values in self.layers() for key, value in values.items()} | dict(given)

    def layers(self) -> list[Layer]:
        """The layers of settings below the command line. Raises SettingsError."""
        layers: list[Layer] = []
        if self.preset is not None:
            layers.append((f"preset {self.preset}", load_preset(self.preset)))
        if self.config is not None:
            layers.append((str(self.config), load_file(self.config)))
        return layers

    def evaluation(self) -> dict[str, Any]:
        """What was said of the test, by the names of EvalConfig."""
        said = {name: getattr(self, name) for name in ("tasks", "split", "label_permutations")}
        said["disjoint"] = self.disjoint or None
        return {name: value for name, value in said.items() if value is not None}

    def write(self, table: Table) -> None:
        """The table on stdout, in the format that was asked for."""
        from mamlctl.report import export

        if self.json:
            write_json(sys.stdout, export.document(table, self.sort))
        elif self.csv or self.markdown or self.latex:
            text = export.to_csv if self.csv else export.to_markdown if self.markdown else export.to_latex
            sys.stdout.write(text(table, self.sort))
            sys.stdout.flush()
        else:
            show_table(Console(), table, self.sort)
