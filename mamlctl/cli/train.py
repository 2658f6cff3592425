"""`train`: its options, and what it does with them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mamlctl.cli.options import Json, Offline, Quiet, with_settings
from mamlctl.core.errors import STOP_EXIT_CODES, ExitCode, SettingsError
from mamlctl.core.problems import flag
from mamlctl.core.results import named
from mamlctl.display.console import write_json
from mamlctl.display.displays import open_display
from mamlctl.display.run_results import show_train_result
from mamlctl.settings.merge import Resolved
from mamlctl.settings.presets import load_file, load_preset, parse_sets, preset_names, to_yaml
from mamlctl.settings.schema import OUTPUT, TrainConfig


@with_settings(TrainConfig)
def train(
    given: dict[str, Any],
    preset: Annotated[
        str | None,
        typer.Option(
            help="Settings that ship with mamlctl, such as omniglot-20w1s-maml++, paper/... or official/...",
            autocompletion=preset_names,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings, such as a run's config.yaml.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting as key=value; repeatable.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show every setting and where it comes from, and stop.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="The run folder. Default: a new one under runs/.", rich_help_panel=OUTPUT),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Run folder to go on with, with its own settings.", rich_help_panel=OUTPUT),
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option(help="Save and stop after so long: 90s, 9m, 1h30m.", rich_help_panel=OUTPUT)
    ] = None,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> ExitCode:
    """Train a learner: MAML++ or a relative. The improvements of MAML++ are flags; maml++ has all six on."""
    sets = set_ or []
    if resume is None:
        resolved = _resolve(given, preset, config, sets, here=not print_config)
        if print_config:
            return _print_config(resolved)
    from mamlctl.experiments import train as command
    from mamlctl.experiments.interrupts import parse_duration

    time_limit_s = None if time_limit is None else parse_duration(time_limit)
    line = shlex.join(["mamlctl", *sys.argv[1:]])
    with open_display(Console(stderr=True), quiet=quiet) as display:
        if resume is not None:
            without_effect = {"--preset": preset, "--config": config, "--print-config": print_config or None}
            moved = _moved(resume, given | parse_sets(sets), out, without_effect)
            result = command.resume(
                resume, moved, offline=offline, time_limit_s=time_limit_s, command=line, on_event=display
            )
        else:
            result = command.train(
                resolved.config,
                out=out and out.expanduser(),
                offline=offline,
                time_limit_s=time_limit_s,
                command=line,
                on_event=display,
            )
    if json:
        write_json(sys.stdout, {"format": 1, "result": named(result)})
    else:
        show_train_result(Console(), result)
    return STOP_EXIT_CODES[result.reason]


def _resolve(
    given: Mapping[str, Any], preset: str | None, config: Path | None, sets: list[str], *, here: bool
) -> Resolved[TrainConfig]:
    """`here`: the run is to start on this machine, so that its devices count too."""
    from mamlctl.experiments.settings import resolve_settings

    layers: list[tuple[str, Mapping[str, Any]]] = []
    if preset is not None:
        layers.append((f"preset {preset}", load_preset(preset)))
    if config is not None:
        layers.append((str(config), load_file(config)))
    layers += [("--set", parse_sets(sets)), ("flag", given)]
    return resolve_settings(layers, here=here)


def _print_config(resolved: Resolved[TrainConfig]) -> ExitCode:
    """The settings as a file that --config takes, the origin of each as its comment."""
    from mamlctl.experiments.settings import fill_defaults

    lines = to_yaml(resolved.config, fill_defaults(resolved.config)).splitlines()
    width = max(len(line.partition("  #")[0]) for line in lines) + 2
    for line in lines:
        value, _, derived = line.partition("  # ")
        typer.echo(f"{value:<{width}}# {derived or resolved.sources[line.partition(':')[0]]}")
    return ExitCode.OK


def _moved(
    run: Path, given: Mapping[str, Any], out: Path | None, without_effect: Mapping[str, object]
) -> dict[str, Any]:
    """What a resumed run may change of its settings. Raises SettingsError for whatever else is given."""
    from mamlctl.run_folder import RESUME_OVERRIDES, open_run

    stored = asdict(open_run(run).config)
    problems = [
        (
            f"{flag(name)} is {value}, but the run to resume has {stored.get(name)}",
            "leave it out, or start a new run",
        )
        for name, value in given.items()
        if name not in RESUME_OVERRIDES and stored.get(name) != value
    ]
    if out is not None and out.expanduser().resolve() != run.resolve():
        problems.append((f"--out is {out}, but --resume goes on in {run}", "leave out --out"))
    for name, value in without_effect.items():
        if value is not None:
            problems.append(
                (f"{name} has no effect with --resume, which keeps the run's settings", "leave it out")
            )
    if problems:
        raise SettingsError(problems)
    return {name: value for name, value in given.items() if name in RESUME_OVERRIDES}
