"""The `train` command."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from mamlctl.cli.common_options import (
    Nproc,
    RankTimeout,
    SettingsOptions,
    TimeLimit,
    begin_work,
    option,
    process_count,
    share_of_process,
    together,
    unused,
)
from mamlctl.cli.options import LISTS, with_options
from mamlctl.core import formatting
from mamlctl.core.errors import STOP_EXIT_CODES, ExitCode, SettingsError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.problems import flag, nearest
from mamlctl.core.process import restarts, world
from mamlctl.core.results import named
from mamlctl.data.sets.registry import is_own_data, is_table
from mamlctl.display.console import write_text
from mamlctl.display.datasets import show_names
from mamlctl.display.logs.tensorboard import TensorBoardLog, check_log
from mamlctl.display.run_results import show_train_result
from mamlctl.engine.algorithms.rules import sharing_problems
from mamlctl.experiments.interrupts import parse_duration
from mamlctl.experiments.runs.search import latest_unfinished_run, means_latest
from mamlctl.experiments.settings import absolute_places, fill_defaults, resolve_settings
from mamlctl.run_folder import CONFIG
from mamlctl.settings.fields import OUTPUT
from mamlctl.settings.merge import Resolved, merge
from mamlctl.settings.presets import to_yaml
from mamlctl.settings.schema import TrainConfig
from mamlctl.settings.variables import RUNS, variable_layers
from mamlctl.shipped_models import refuse_model


@with_options(SettingsOptions, TrainConfig)
def train(
    settings: dict[str, Any],
    options: SettingsOptions,
    list_: Annotated[
        str | None,
        option(
            None,
            f"Print the names of a kind and what they mean, then exit: {', '.join(LISTS)}.",
            "--list",
            metavar="KIND",
            autocompletion=lambda: list(LISTS),
        ),
    ] = None,
    print_config: Annotated[
        bool, option(None, "Print every setting and its origin, then exit.", "--print-config")
    ] = False,
    out: Annotated[
        Path | None,
        option(OUTPUT, f"Run folder to create (default: a new one under runs/, or under {RUNS})."),
    ] = None,
    resume: Annotated[
        Path | None,
        option(
            OUTPUT,
            "Resume this run with its saved settings; latest: the newest unfinished one that is not in use.",
        ),
    ] = None,
    time_limit: TimeLimit = None,
    log: Annotated[
        str | None,
        option(OUTPUT, "Also write scalars, settings and pictures for this program: tensorboard."),
    ] = None,
    nproc: Nproc = None,
    rank_timeout: RankTimeout = None,
) -> ExitCode:
    """The command `mamlctl train`."""
    if list_ is not None:
        given: dict[str, object] = {flag(name): True for name in settings}
        given |= options.changed() | {"--out": out, "--resume": resume, "--time-limit": time_limit}
        given |= {"--print-config": print_config, "--log": log}
        given |= {"--nproc": nproc, "--rank-timeout": rank_timeout}
        return _print_list(list_, given, options)
    if not print_config:
        code = share_of_process(nproc, rank_timeout, trust_code=options.trust_code)
        if code is not None:
            return code
    latest = resume is not None and means_latest(resume)
    again = _restarted(out, resume)
    resume = latest_unfinished_run() if latest else again or resume
    if resume is None:
        resolved = _new_settings(options, settings)
        if print_config:
            return _print_config(resolved, process_count(nproc, rank_timeout)[0])
        config = resolved.config
        task = formatting.task(config.dataset, fill_defaults(config).ways, config.shots)
        work = f"training {config.algo} on {task}"
    else:
        unread = {} if again else options.by_flag("preset", "config") | {"--print-config": print_config}
        changes = _overrides(resume, _resume_settings(options, settings), out, unread)
        options.trust_code_of([resume])
        work = f"resuming {resume}"
    time_limit_s = None if time_limit is None else parse_duration(time_limit)
    if log is not None:
        check_log(log)
    command = shlex.join(["mamlctl", *sys.argv[1:]])
    with options.display(work) as display, _logged(log, display) as listener, together(rank_timeout):
        from mamlctl.experiments import train as training  # imports torch

        begin_work()
        if latest:
            display(Notice(f"resuming the latest unfinished run, {resume}"))
        if resume is None:
            run = partial(training.train, config, out=out)
        else:
            run = partial(training.resume, resume, changes)
        result = run(offline=options.offline, time_limit_s=time_limit_s, command=command, on_event=listener)
    options.write(result, {"format": 1, "result": named(result)}, show_train_result)
    return STOP_EXIT_CODES[result.reason]


def _restarted(out: Path | None, resume: Path | None) -> Path | None:
    """The run to resume after torchrun has restarted a command that began a new run.

    Raises SettingsError if torchrun may restart the command, and a restarted one would not find the run.
    """
    done, most = restarts()
    if most and out is None and resume is None:
        fact = f"torchrun may restart this command {most} times, but each start would begin a new run"
        raise SettingsError([(fact, "add --out, so that a restarted command finds its run")])
    return out if done and out is not None and (out / CONFIG).is_file() else None


def _new_settings(options: SettingsOptions, flags: Mapping[str, Any]) -> Resolved[TrainConfig]:
    """The settings of a new run. Raises SettingsError if they are wrong, or name code that is not trusted."""
    options.check_code_in_file({**flags, **options.set_values()})
    if options.trust_code and not options.code_in_file:
        fact = "--trust-code has no effect: no settings file names code, and that of options is trusted"
        raise SettingsError([(fact, "leave it out")])
    return resolve_settings([*options.base_layers, ("--set", options.set_values()), ("flag", flags)])


def _logged(log: str | None, display: OnEvent) -> AbstractContextManager[OnEvent]:
    """The display, with the log of --log if there is one."""
    return nullcontext(display) if log is None else TensorBoardLog(fill_defaults, display)


def _print_list(name: str, given: Mapping[str, object], options: SettingsOptions) -> ExitCode:
    """Print the names of a kind. Raises SettingsError for another kind, and for options without effect."""
    if name not in LISTS:
        hint = nearest(name, LISTS, otherwise=f"use one of {', '.join(LISTS)}")
        raise SettingsError([(f"--list is '{name}', which is not a list", hint)])
    if problems := unused(given, "with --list"):
        raise SettingsError(problems)
    summaries = LISTS[name]()
    entries = [{"name": entry, "summary": text} for entry, text in summaries.items()]
    options.write(summaries, {"format": 1, name: entries}, show_names)
    return ExitCode.OK


def _print_config(resolved: Resolved[TrainConfig], processes: int) -> ExitCode:
    """Print the settings as a file for --config, with the origin of each in a comment.

    Raises SettingsError if so many processes cannot share their tasks.
    """
    if problems := sharing_problems(resolved.config, processes):
        raise SettingsError(problems)
    if world()[0]:
        return ExitCode.OK
    lines = to_yaml(resolved.config, fill_defaults(resolved.config)).splitlines()
    width = max(len(line.partition("  #")[0]) for line in lines) + 2
    for line in lines:
        value, _, derived = line.partition("  # ")
        origin = derived or resolved.sources[line.partition(":")[0]]
        write_text(sys.stdout, f"{value:<{width}}# {origin}\n")
    return ExitCode.OK


def _resume_settings(options: SettingsOptions, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that replace the stored ones; flags override --set, which overrides variables.

    Raises SettingsError for an unknown name or a value of the wrong type.
    """
    layers = [*variable_layers(TrainConfig), ("--set", options.set_values()), ("flag", flags)]
    resolved, problems = merge(TrainConfig, layers)
    if problems:
        raise SettingsError(problems)
    return {
        name: getattr(resolved.config, name)
        for name, source in resolved.sources.items()
        if source != "default"
    }


def _overrides(
    run: Path, settings: Mapping[str, Any], out: Path | None, without_effect: Mapping[str, object]
) -> dict[str, Any]:
    """The settings that replace those of a resumed run.

    Args:
        run: the run folder.
        settings: the settings from the command line and from variables.
        out: the folder from --out; it can only be the run's own.
        without_effect: options that --resume ignores, by flag.

    Raises:
        SettingsError: a setting would change the run, `out` is another folder, an option has no effect, or
            the run is a model that ships.
    """
    from mamlctl.run_folder import RESUME_OVERRIDES, open_run

    refuse_model(run)
    stored = asdict(open_run(run).config)
    settings = {**settings, **absolute_places(settings)}  # as the run has them
    changeable = RESUME_OVERRIDES
    moved, before = settings.get("dataset", ""), stored["dataset"]
    if is_own_data(moved) and is_own_data(before) and is_table(moved) == is_table(before):
        # The data may have moved; `resume` compares their content.
        changeable += ("dataset",)
    problems = [
        (
            f"{flag(name)} is {value}, but the run to resume has {stored.get(name)}",
            "leave it out, or start a new run",
        )
        for name, value in settings.items()
        if name not in changeable and stored.get(name) != value
    ]
    if out is not None and out.resolve() != run.resolve():
        problems.append((f"--out is {out}, but --resume continues in {run}", "leave out --out"))
    problems += unused(without_effect, "with --resume, which keeps the run's settings")
    if problems:
        raise SettingsError(problems)
    return {name: value for name, value in settings.items() if name in changeable}
