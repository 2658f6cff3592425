"""Options that several commands share."""

from __future__ import annotations

import gc
import glob
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from mamlctl.core.errors import ExitCode, SettingsError
from mamlctl.core.events import Waiting
from mamlctl.core.formatting import with_article
from mamlctl.core.literals import HIGHER_IS_BETTER, METRIC_NAMES
from mamlctl.core.problems import Problem, flag
from mamlctl.core.process import LAUNCHED, TORCHRUN, end_with_parent, raise_on_signals, world
from mamlctl.core.user_code.kinds import named_code, trust_runs
from mamlctl.data.rules import metric_of
from mamlctl.display.console import say, stderr_console, write_json
from mamlctl.experiments.interrupts import parse_duration
from mamlctl.settings.data_settings import DataSettings
from mamlctl.settings.fields import HARDWARE, NETWORK, OUTPUT
from mamlctl.settings.merge import Layer
from mamlctl.settings.presets import load_file, load_preset, parse_sets, preset_names
from mamlctl.settings.schema import TrainConfig
from mamlctl.settings.variables import variable_layers
from mamlctl.shipped_models import model_names

if TYPE_CHECKING:
    from mamlctl.display.displays import Display
    from mamlctl.report.guard import Limit

# The modules of the live view and of limits are imported on use: help and completion need neither.

Result = TypeVar("Result")
RANK_TIMEOUT = "10m"  # longer than the compilation of kernels


def option(panel: str | None, text: str, *names: str, **more: Any) -> Any:
    """A Typer option.

    Args:
        panel: the help panel; None for the general options.
        text: the help, one sentence.
        names: the flags, only if they differ from the field's name.
        more: further arguments of `typer.Option`.
    """
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


TimeLimit = Annotated[str | None, option(OUTPUT, "Save and stop after this long, e.g. 9m or 1h30m.")]
Nproc = Annotated[
    int | None,
    option(HARDWARE, "Processes that share the tasks, e.g. 4."),
]
RankTimeout = Annotated[str | None, option(HARDWARE, "Longest wait for another of them (default: 10m).")]


def share_of_process(nproc: int | None, rank_timeout: str | None, *, trust_code: bool) -> ExitCode | None:
    """Start the processes of --nproc, or do the share of one of them: the exit code afterwards.

    Args:
        nproc: the option --nproc.
        rank_timeout: the option --rank-timeout.
        trust_code: the option --trust-code.

    Returns:
        None if this process is to run the command: rank 0, or the only one.

    Raises:
        SettingsError: an option is wrong, or has no effect.
    """
    rank, count = world()
    asked, timeout_s = process_count(nproc, rank_timeout)
    if count > 1:
        from mamlctl.experiments.processes.launch import accept_requests

        accept_requests()
        if LAUNCHED in os.environ:
            end_with_parent(int(os.environ[LAUNCHED]))
        elif TORCHRUN in os.environ:
            end_with_parent()
        if rank == 0:
            return None
        from mamlctl.experiments.processes.shares import do_share
        from mamlctl.experiments.processes.together import follow

        begin_work()
        return follow(timeout_s, partial(do_share, trust_code=trust_code))
    if asked == 1:
        return None
    from mamlctl.experiments.processes.launch import launch

    return ExitCode(launch(asked, sys.argv[1:], rank_timeout or RANK_TIMEOUT))


def process_count(nproc: int | None, rank_timeout: str | None) -> tuple[int, float]:
    """The number of processes that share the tasks, and the seconds that each may wait for another one.

    Raises SettingsError if an option is wrong, or has no effect.
    """
    count = world()[1]
    timeout_s = parse_duration(rank_timeout or RANK_TIMEOUT, "--rank-timeout")
    if nproc is not None and count > 1 and LAUNCHED not in os.environ:
        fact = f"--nproc has no effect in one of {count} processes that another program has started"
        raise SettingsError([(fact, "leave it out")])
    if nproc is not None and nproc < 1:
        raise SettingsError([(f"--nproc is {nproc}, which is not a number of processes", "use 1 or more")])
    count = max(count, nproc or 1)
    if count == 1 and rank_timeout is not None:
        raise SettingsError([("--rank-timeout has no effect on one process", "add --nproc 2")])
    return count, timeout_s


def together(rank_timeout: str | None) -> AbstractContextManager[object]:
    """The block in which rank 0 of several processes works; `rank_timeout` is the option --rank-timeout."""
    if world()[1] == 1:
        return nullcontext()
    from mamlctl.experiments.processes.together import sharing  # imports torch

    return sharing(parse_duration(rank_timeout or RANK_TIMEOUT))


def started_models(incomplete: str) -> list[str]:
    """What a shell completes where a command takes runs or models: models for the start of a name.

    A shell completes the names of folders only if it gets nothing else, so those that also match are added.
    """
    models = [name for name in model_names() if incomplete and name.startswith(incomplete)]
    return models and [*models, *map(str, sorted(Path().glob(f"{glob.escape(incomplete)}*")))]


def begin_work() -> None:
    """Let signals end a command with cleanup, and collect garbage; to be called after its imports."""
    raise_on_signals()
    if not gc.isenabled():
        gc.freeze()  # later collections need not look at what was imported
        gc.enable()


@dataclass(frozen=True)
class OutputOptions:
    """The options of every command."""

    offline: Annotated[
        bool, option(HARDWARE, "Never download; exit with code 3 if a data set is missing.", "--offline")
    ] = False
    json: Annotated[bool, option(OUTPUT, "Print one JSON document on stdout.", "--json")] = False
    quiet: Annotated[bool, option(OUTPUT, "Print no progress on stderr.", "--quiet")] = False

    def by_flag(self, *names: str) -> dict[str, object]:
        """The values of the named options, by flag."""
        return {flag(name.rstrip("_")): getattr(self, name) for name in names}

    def changed(self) -> dict[str, object]:
        """The options that differ from their defaults, other than those of the output, by flag."""
        default = type(self)(json=self.json, quiet=self.quiet)
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return self.by_flag(*(name for name, value in values.items() if value != getattr(default, name)))

    @contextmanager
    def display(self, work: str = "") -> Iterator[Display]:
        """The display of events in a block that calls `begin_work` after its imports.

        It shows at once what the command does, `work`, since the import of torch takes seconds.
        """
        from mamlctl.display.displays import open_display

        with open_display(stderr_console(), quiet=self.quiet) as display:
            if work and not self.json:
                display(Waiting("loading torch", work))
            yield display

    def say(self, text: str) -> None:
        """Print a line on stderr, unless --quiet hides progress."""
        if not self.quiet:
            say(stderr_console(), text)

    def write(
        self, result: Result, document: Mapping[str, Any], show: Callable[[Console, Result], None]
    ) -> None:
        """Print the result of the command on stdout.

        Args:
            result: the result.
            document: the result as a JSON object, for --json.
            show: prints the result without --json.
        """
        if self.json:
            write_json(sys.stdout, document)
        else:
            show(Console(), result)


@dataclass(frozen=True)
class CodeOptions(OutputOptions):
    """The option with which the user trusts code that is not named on the command line."""

    trust_code: Annotated[
        bool,
        option(
            NETWORK,
            "Trust the code in the runs, grid or settings file that are named, which can do all you can.",
            "--trust-code",
        ),
    ] = False

    def trust_code_of(self, runs: Sequence[Path]) -> None:
        """With --trust-code, add the code of these runs to the user's list.

        Raises SettingsError if it is damaged, or if no run has code.
        """
        if self.trust_code and not trust_runs(runs):
            raise SettingsError([("--trust-code has no effect: no run contains code", "leave it out")])


@dataclass(frozen=True)
class GuardOptions(CodeOptions):
    """The options that make a result which is too bad a failure."""

    fail_under: Annotated[
        float | None,
        option(
            OUTPUT,
            "Exit with code 1 if the accuracy (in percent, e.g. 95) or return of a best model is below this.",
        ),
    ] = None
    fail_over: Annotated[
        float | None,
        option(OUTPUT, "For curves: exit with code 1 if the error of a best model is above this, e.g. 0.5."),
    ] = None

    def limit(self, config: DataSettings) -> Limit | None:
        """The limit for results on a data set; None without one.

        Raises SettingsError for a value out of range, and for the option of the other kind of data.
        """
        from mamlctl.report.guard import Limit

        metric = metric_of(config)
        higher = metric in HIGHER_IS_BETTER
        used, other = ("fail_under", "fail_over") if higher else ("fail_over", "fail_under")
        why = f"on {config.dataset}, whose score is {with_article(METRIC_NAMES[metric])}"
        problems = unused(self.by_flag(other), why, f"use {flag(used)}")
        if metric != "return" and self.fail_under is not None and not 1 <= self.fail_under <= 100:
            fact = f"--fail-under is {self.fail_under:g}, which is not a percentage from 1 to 100"
            problems.append((fact, "use a percentage, e.g. 95"))
        if self.fail_over is not None and not 0 < self.fail_over < math.inf:
            fact = f"--fail-over is {self.fail_over:g}, which is not a positive number"
            problems.append((fact, "use a mean squared error, e.g. 0.5"))
        if problems:
            raise SettingsError(problems)
        value = self.fail_under if higher else self.fail_over
        return None if value is None else Limit(metric, value)


@dataclass(frozen=True)
class SettingsOptions(CodeOptions):
    """Where training settings come from, other than their own flags."""

    preset: Annotated[
        str | None,
        option(
            None,
            "Settings shipped with mamlctl (also in paper/ and official/), e.g. omniglot-20w1s-maml++.",
            autocompletion=preset_names,
        ),
    ] = None
    config: Annotated[Path | None, option(None, "YAML file of settings, e.g. a run's config.yaml.")] = None
    set_: Annotated[
        list[str] | None, option(None, "Any setting as key=value (repeatable), e.g. ways=20.", "--set")
    ] = None

    @cached_property
    def base_layers(self) -> list[Layer]:
        """The settings of the variables, the preset and the file, which may be a pipe and is read once.

        Raises SettingsError if one cannot be read.
        """
        layers = variable_layers(TrainConfig)
        if self.preset is not None:
            layers.append((f"preset {self.preset}", load_preset(self.preset)))
        if self.config is not None:
            layers.append((str(self.config), load_file(self.config)))
        return layers

    @property
    def code_in_file(self) -> dict[str, str]:
        """The settings for which the settings file names code -> the references."""
        return {} if self.config is None else named_code(self.base_layers[-1][1])

    def check_code_in_file(self, settings: Mapping[str, Any]) -> None:
        """Raise SettingsError if the settings file names code that the user has not asked for.

        `settings` are those from the command line.
        """
        for name, reference in self.code_in_file.items():
            if name not in settings and not self.trust_code:
                fact = f"{self.config} names code ({reference}), which was not run"
                raise SettingsError([(fact, f"add --trust-code, or name it with {flag(name)}")])

    def set_values(self) -> dict[str, Any]:
        """The settings from --set. Raises SettingsError if one cannot be parsed."""
        return parse_sets(self.set_ or [])


def unused(options: Mapping[str, object], why: str, hint: str = "leave it out") -> list[Problem]:
    """Problems for options that are set but have no effect.

    Args:
        options: values by flag; None and False count as not set.
        why: the end of the sentence "--flag has no effect ...".
        hint: what to do about it.
    """
    return [
        (f"{name} has no effect {why}", hint)
        for name, value in options.items()
        if value is not None and value is not False
    ]
