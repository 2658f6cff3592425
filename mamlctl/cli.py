"""The command line: options in, exit code out. Imports torch lazily."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.exceptions import TyperException

import mamlctl
from mamlctl.checks import flag
from mamlctl.cli_ablate import ablate
from mamlctl.cli_compare import compare
from mamlctl.cli_fetch import fetch
from mamlctl.cli_own import Csv, Files, Query, SaveAdapted, Support, own_images, without_support
from mamlctl.config import OUTPUT, EvalConfig, TrainConfig
from mamlctl.display import open_display, show_error, show_eval_result, show_train_result, write_json
from mamlctl.errors import ExitCode, MamlctlError, SettingsError
from mamlctl.layers import Resolved, load_file, load_preset, parse_sets, preset_names, to_yaml
from mamlctl.options import Json, Offline, Quiet, with_settings
from mamlctl.records import named

EPILOG = {
    "train": "Example: mamlctl train --algo maml++ --dataset omniglot --ways 20 --shots 1",
    "eval": "Examples: mamlctl eval runs/demo --split test --tasks 600\n\n"
    "mamlctl eval runs/demo --support mine/learn --query mine/ask",
    "fetch": "Example: mamlctl fetch omniglot --from downloads/",
    "compare": "Examples: mamlctl compare runs/a runs/b\n\n"
    "mamlctl compare --dataset omniglot --algos maml,fomaml,maml++,reptile,protonet --seeds 3",
    "ablate": "Example: mamlctl ablate --dataset omniglot --ways 20 --shots 1 --seeds 3",
}
app = typer.Typer(
    help="Train, evaluate, compare and ablate MAML++ and its relatives.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mamlctl {mamlctl.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Train, evaluate, compare and ablate MAML++ and its relatives."""


@app.command(epilog=EPILOG["train"])
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
    from mamlctl.commands import train as command
    from mamlctl.commands.stopping import parse_duration

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
    return {"SIGINT": ExitCode.INTERRUPTED, "SIGTERM": ExitCode.TERMINATED}.get(result.reason, ExitCode.OK)


def _resolve(
    given: Mapping[str, Any], preset: str | None, config: Path | None, sets: list[str], *, here: bool
) -> Resolved:
    """`here`: the run is to start on this machine, so that its devices count too."""
    from mamlctl.commands.data import resolve_settings

    layers: list[tuple[str, Mapping[str, Any]]] = []
    if preset is not None:
        layers.append((f"preset {preset}", load_preset(preset)))
    if config is not None:
        layers.append((str(config), load_file(config)))
    layers += [("--set", parse_sets(sets)), ("flag", given)]
    return resolve_settings(layers, here=here)


def _print_config(resolved: Resolved) -> ExitCode:
    """The settings as a file that --config takes, the origin of each as its comment."""
    from mamlctl.commands.data import complete

    lines = to_yaml(resolved.config, complete(resolved.config)).splitlines()
    width = max(len(line.partition("  #")[0]) for line in lines) + 2
    for line in lines:
        value, _, derived = line.partition("  # ")
        typer.echo(f"{value:<{width}}# {derived or resolved.sources[line.partition(':')[0]]}")
    return ExitCode.OK


def _moved(
    run: Path, given: Mapping[str, Any], out: Path | None, without_effect: Mapping[str, object]
) -> dict[str, Any]:
    """What a resumed run may change of its settings. Raises SettingsError for whatever else is given."""
    from mamlctl.runs import MOVABLE, open_run

    stored = asdict(open_run(run).config)
    problems = [
        (
            f"{flag(name)} is {value}, but the run to resume has {stored.get(name)}",
            "leave it out, or start a new run",
        )
        for name, value in given.items()
        if name not in MOVABLE and stored.get(name) != value
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
    return {name: value for name, value in given.items() if name in MOVABLE}


@app.command("eval", epilog=EPILOG["eval"])
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
    from mamlctl.commands.evaluate import evaluate_run

    with open_display(Console(stderr=True), quiet=quiet) as display:
        if beside and not plot:
            raise SettingsError([("--beside has no effect without --plot", "add --plot or leave it out")])
        result = evaluate_run(run, EvalConfig(**given), offline=offline, on_event=display)
        if plot:
            from mamlctl.commands.pictures import draw

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


app.command(epilog=EPILOG["fetch"])(fetch)

app.command(epilog=EPILOG["compare"])(compare)
app.command(epilog=EPILOG["ablate"])(ablate)


def share_the_processor() -> None:
    """Let threads that wait sleep soon, so that another program on the machine does not stop training.

    By default GNU's OpenMP, which torch uses on Linux, spins at every barrier. With one of two cores taken by
    another program a meta-step took 5.7 s so, and 0.48 s like this (5-way, 8 tasks, bf16; alone: 0.21 s).
    Read when torch is first imported; whoever has set a policy keeps it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main() -> None:
    """Run the command line and leave with its exit code."""
    # Training handles SIGTERM itself; elsewhere it should clean up as any exception does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(ExitCode.TERMINATED))
    share_the_processor()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except MamlctlError as error:
        show_error(Console(stderr=True), error)
        code = error.exit_code
    except TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if message:  # empty after a bare `mamlctl`, which has printed its help
            show_error(
                Console(stderr=True), MamlctlError(message, hint=f"{_help_command()} shows what there is")
            )
        code = ExitCode.USAGE
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader left; point stdout elsewhere, so that Python's last flush does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.FAILED
    except OSError as error:
        # Files that cannot be read or written are the machine's state, which the user can mend.
        where = f"{error.filename}: " if error.filename else ""
        hint = "make room, or choose a place that can be written"
        show_error(Console(stderr=True), MamlctlError(f"{where}{error.strerror or error}", hint=hint))
        code = ExitCode.FAILED
    sys.exit(code or 0)


def _help_command() -> str:
    known = {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    return " ".join(["mamlctl", *(word for word in sys.argv[1:2] if word in known), "--help"])
