"""The command line: options in, exit code out; the only file that knows either. Imports torch lazily."""

from __future__ import annotations

import functools
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from typer.exceptions import TyperException

import mamlctl
from mamlctl.config import HARDWARE, OUTPUT, EvalConfig, TrainConfig, flag
from mamlctl.display import open_display, show_error, show_eval_result, show_train_result, write_json
from mamlctl.errors import ExitCode, MamlctlError, SettingsError
from mamlctl.layers import Resolved, load_file, load_preset, parse_sets, preset_names, resolve, to_yaml

EPILOG = {
    "train": "Example: mamlctl train --algo maml++ --dataset omniglot --ways 20 --shots 1",
    "eval": "Example: mamlctl eval runs/demo --split test --tasks 600",
    "fetch": "Example: mamlctl fetch omniglot --from downloads/",
}
app = typer.Typer(
    help="Train, evaluate, compare and ablate MAML++ and its relatives.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.", rich_help_panel=OUTPUT)]
Offline = Annotated[
    bool,
    typer.Option(
        "--offline", help="Never download; a missing data set ends with exit 3.", rich_help_panel=HARDWARE
    ),
]
DataRoot = Annotated[
    str | None,
    typer.Option(
        help="Folder of prepared data sets. Default: the platform's cache folder.", rich_help_panel=HARDWARE
    ),
]


def with_settings(config_type: type) -> Callable[[Callable[..., ExitCode]], Callable[..., ExitCode]]:
    """Give a command one option per field of a settings class; those given reach it as the dict `given`."""
    hints = get_type_hints(config_type)
    options = []
    for item in fields(config_type):
        option = typer.Option(
            help=_words_of(item), rich_help_panel=item.metadata["panel"], show_default=False
        )
        kind = hints[item.name]
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        options.append(
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    names = [item.name for item in fields(config_type)]

    def decorate(function: Callable[..., ExitCode]) -> Callable[..., ExitCode]:
        own = get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
        others = [
            parameter.replace(annotation=own[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in signature.parameters.values()
            if parameter.name != "given"
        ]
        # Help shows panels in the order of their first option, and those of the settings come first.
        others.sort(key=lambda parameter: _panel_of(parameter) is not None)
        without_panel = sum(_panel_of(parameter) is None for parameter in others)

        @functools.wraps(function)
        def command(**values: Any) -> ExitCode:
            given = {name: value for name in names if (value := values.pop(name)) is not None}
            return function(given=given, **values)

        parameters = [*others[:without_panel], *options, *others[without_panel:]]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _words_of(item: Field[Any]) -> str:
    """Help of a setting: its words, what it can be, and its default unless that is "off" or told in words."""
    parts = [item.metadata["help"]]
    if item.metadata["choices"]:
        parts.append(f"One of {', '.join(map(str, item.metadata['choices']))}.")
    if item.default is not None and item.default is not False:
        parts.append(f"Default: {item.default}.")
    return " ".join(parts)


def _panel_of(parameter: inspect.Parameter) -> str | None:
    """The help panel that a command's own option asks for; none for an argument or a general option."""
    return next((getattr(note, "rich_help_panel", None) for note in parameter.annotation.__metadata__), None)


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
    """Meta-train. The improvements of MAML++ are flags on any unrolled algorithm; maml++ has all six on."""
    if resume is None:
        resolved = _resolve(given, preset, config, set_ or [])
        if print_config:
            return _print_config(resolved)
    from mamlctl.commands import train as command
    from mamlctl.commands.stopping import parse_duration

    time_limit_s = None if time_limit is None else parse_duration(time_limit)
    with open_display(Console(stderr=True), quiet=quiet) as display:
        if resume is not None:
            _check_resume(resume, given | parse_sets(set_ or []), out, preset, config)
            result = command.resume(
                resume,
                device=given.get("device"),
                data_root=given.get("data_root"),
                offline=offline,
                time_limit_s=time_limit_s,
                on_event=display,
            )
        else:
            result = command.train(
                resolved.config,
                out=out,
                offline=offline,
                time_limit_s=time_limit_s,
                command=shlex.join(["mamlctl", *sys.argv[1:]]),
                on_event=display,
            )
    if json:
        write_json(sys.stdout, {"format": 1, "result": asdict(result)})
    else:
        show_train_result(Console(), result)
    return {"SIGINT": ExitCode.INTERRUPTED, "SIGTERM": ExitCode.TERMINATED}.get(result.reason, ExitCode.OK)


def _resolve(given: Mapping[str, Any], preset: str | None, config: Path | None, sets: list[str]) -> Resolved:
    from mamlctl.engine.algorithms import algorithm_defaults

    layers: list[tuple[str, Mapping[str, Any]]] = []
    if preset is not None:
        layers.append((f"preset {preset}", load_preset(preset)))
    if config is not None:
        layers.append((str(config), load_file(config)))
    return resolve([*layers, ("--set", parse_sets(sets)), ("flag", given)], algorithm_defaults)


def _print_config(resolved: Resolved) -> ExitCode:
    """The settings as a file that --config takes, the origin of each as its comment."""
    lines = to_yaml(resolved.config).splitlines()
    width = max(map(len, lines)) + 2
    for line in lines:
        source = resolved.sources[line.split(":", 1)[0]]
        typer.echo(f"{line:<{width}}# {source}")
    return ExitCode.OK


def _check_resume(
    run: Path, given: Mapping[str, Any], out: Path | None, preset: str | None, config: Path | None
) -> None:
    """A resumed run keeps its settings: refuse what would change them. Raises SettingsError."""
    from mamlctl.runs import open_run

    stored = asdict(open_run(run).config)
    problems = [
        (
            f"{flag(name)} is {value}, but the run to resume has {stored.get(name)}",
            "leave it out, or start a new run",
        )
        for name, value in given.items()
        if name not in {"device", "data_root"} and stored.get(name) != value
    ]
    if out is not None and out.resolve() != run.resolve():
        problems.append((f"--out is {out}, but --resume goes on in {run}", "leave --out out"))
    for name, value in (("--preset", preset), ("--config", config)):
        if value is not None:
            problems.append(
                (f"{name} has no effect with --resume, which keeps the run's settings", "leave it out")
            )
    if problems:
        raise SettingsError(problems)


@app.command("eval", epilog=EPILOG["eval"])
@with_settings(EvalConfig)
def evaluate(
    given: dict[str, Any],
    run: Annotated[Path, typer.Argument(help="Run folder of a training.")],
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> ExitCode:
    """Test a trained run: its best checkpoint, and the ensemble of its five best, on the same tasks."""
    from mamlctl.commands.evaluate import evaluate_run

    with open_display(Console(stderr=True), quiet=quiet) as display:
        result = evaluate_run(run, EvalConfig(**given), offline=offline, on_event=display)
    if json:
        document = {
            "format": 1,
            "run": result.run,
            "folder": result.folder,
            "results": [*map(asdict, result.rows)],
        }
        write_json(sys.stdout, document)
    else:
        show_eval_result(Console(), result)
    return ExitCode.OK


@app.command(epilog=EPILOG["fetch"])
def fetch(
    names: Annotated[list[str], typer.Argument(help="Data sets: omniglot, glyphs.")],
    source: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Local archives, or a folder that holds them; repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Prepare it anew even if it is there.")] = False,
    data_root: DataRoot = None,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> ExitCode:
    """Download or take over a data set, verify it, and pack it once."""
    from mamlctl.commands.fetch import fetch_all

    with open_display(Console(stderr=True), quiet=quiet) as display:
        fetched = fetch_all(
            names, source=source, data_root=data_root, force=force, offline=offline, on_event=display
        )
    if json:
        write_json(sys.stdout, {"format": 1, "data_sets": fetched})
    else:
        for entry in fetched:
            typer.echo(
                "{name}: {classes} classes, {images} images, digest {digest:.12}, in {folder}".format(**entry)
            )
    return ExitCode.OK


LATER = {"ignore_unknown_options": True, "allow_extra_args": True}


@app.command(context_settings=LATER, help="Compare runs on the same test tasks. Comes with release 0.2.")
def compare() -> ExitCode:
    """Nothing yet, and says so."""
    raise _comes_later("compare")


@app.command(context_settings=LATER, help="Train and test a grid of improvements. Comes with release 0.2.")
def ablate() -> ExitCode:
    """Nothing yet, and says so."""
    raise _comes_later("ablate")


def _comes_later(name: str) -> SettingsError:
    hint = "until then: one 'mamlctl train' and one 'mamlctl eval' per row"
    return SettingsError([(f"'{name}' is not in mamlctl {mamlctl.__version__}; release 0.2 brings it", hint)])


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        code = app(standalone_mode=False)
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
    sys.exit(code or 0)


def _help_command() -> str:
    command = next((word for word in sys.argv[1:2] if not word.startswith("-")), "")
    return " ".join(filter(None, ["mamlctl", command, "--help"]))
