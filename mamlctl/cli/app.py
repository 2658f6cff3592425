"""The entry point of the command line: registers commands, prints errors and sets exit codes."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import typer
from rich.console import Console
from typer.core import (  # type: ignore[attr-defined]
    CompletionItem,
    TyperCommand,
    TyperGroup,
)
from typer.exceptions import TyperException

import mamlctl
from mamlctl.cli.help import show_help
from mamlctl.core.errors import (
    ExitCode,
    MamlctlError,
    RankLostError,
    SettingsError,
    file_error,
    is_out_of_memory,
)
from mamlctl.core.problems import nearest
from mamlctl.core.process import HANG_UP, LAUNCHED, SIDE_BY_SIDE, check_single, exit_at_once_on
from mamlctl.display.console import NamedStream, discard, show_error, stderr_console, write_text
from mamlctl.settings.rules import NOUNS

Function = Callable[..., ExitCode]
HELP_OPTIONS = ["-h", "--help"]


@dataclass(frozen=True)
class CommandEntry:
    """A command: the module in cli/ with a function of the module's name, and the text of its help."""

    module: str
    summary: str  # one sentence
    more: str = ""  # a paragraph after it
    examples: tuple[str, ...] = ()
    shares: bool = False  # whether several processes can share its work

    @property
    def text(self) -> str:
        """What the help says before the options."""
        return f"{self.summary}\n\n{self.more}" if self.more else self.summary

    @property
    def epilog(self) -> str:
        """The examples."""
        return f"Example{'s' if len(self.examples) > 1 else ''}: " + "\n\n".join(self.examples)


SETTINGS_ARE_OPTIONS = (
    "All training settings are options too, e.g. --ways 20; mamlctl train --help-all describes them."
)

# A module is imported when its command is called or its own help is shown: no command waits for the imports
# of the others, and `mamlctl --version` and `mamlctl --help` wait for none.
COMMANDS = {
    "train": CommandEntry(
        "train",
        "Train with MAML++ or a relative; the improvements of MAML++ are flags, all on for maml++.",
        examples=("mamlctl train --algo maml++ --dataset omniglot --ways 20 --shots 1",),
        shares=True,
    ),
    "eval": CommandEntry(
        "evaluate",
        "Test a trained run, or classify or predict your own data with it (--support, --query).",
        "A test scores the best checkpoint and the ensemble of the five best on the same tasks: --models.",
        examples=(
            "mamlctl eval runs/demo --split test --tasks 600",
            "mamlctl eval omniglot-5w1s --support mine/learn --query mine/ask",
        ),
        shares=True,
    ),
    "fetch": CommandEntry(
        "fetch",
        "Download data sets or read local archives, verify and pack them; interrupted downloads resume.",
        examples=("mamlctl fetch samples", "mamlctl fetch omniglot --from downloads/"),
    ),
    "compare": CommandEntry(
        "compare",
        "Compare trained runs on the same test tasks, or train algorithms first and compare those.",
        SETTINGS_ARE_OPTIONS,
        examples=(
            "mamlctl compare runs/a runs/b",
            "mamlctl compare --dataset omniglot --algos maml,fomaml,maml++,reptile,protonet --seeds 3",
        ),
        shares=True,
    ),
    "ablate": CommandEntry(
        "ablate",
        "Train and test a grid of improvements or settings and print its table; rerun to resume.",
        SETTINGS_ARE_OPTIONS,
        examples=("mamlctl ablate --dataset omniglot --ways 20 --shots 1 --seeds 3",),
    ),
}


class _Command(TyperCommand):
    """A command that refuses arguments which it does not have; Typer's own error has no field for them."""

    advanced: Collection[str] = ()  # the options that only --help-all shows

    def format_help(self, ctx: Any, formatter: object) -> None:
        show_help(Console(), ctx, self.advanced)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        ctx.args = []  # completion needs no values, and to read them Typer imports pydantic
        return []

    def invoke(self, ctx: Any) -> Any:
        if ctx.args:
            hint = f"leave it out, or see mamlctl {ctx.info_name} --help"
            raise SettingsError([(f"unexpected argument '{' '.join(ctx.args)}'", hint)])
        if not COMMANDS[str(ctx.info_name)].shares:
            check_single(f"mamlctl {ctx.info_name}")
        return super().invoke(ctx)


@cache
def _command(name: str) -> Any:
    entry = COMMANDS[name]
    function: Function = getattr(import_module(f"mamlctl.cli.{entry.module}"), entry.module)
    single = typer.Typer(add_completion=False)
    settings = {"allow_extra_args": True, "help_option_names": HELP_OPTIONS}
    single.command(name, cls=_Command, context_settings=settings, help=entry.text, epilog=entry.epilog)(
        function
    )
    command = cast(_Command, typer.main.get_command(single))
    command.advanced = getattr(function, "advanced", ())
    return command


class _Commands(Mapping[str, Any]):
    """The commands, each of which is imported when it is first used."""

    def __getitem__(self, name: str) -> Any:
        return _command(name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Group(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = cast(dict[str, Any], _Commands())  # Typer only reads it

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        for param in params:
            # Typer's options for completion have None, for which it imports pydantic, which takes 80 ms.
            param.default = False if param.default is None else param.default
        return params

    def format_help(self, ctx: Any, formatter: object) -> None:
        show_help(Console(), ctx, commands={name: entry.summary for name, entry in COMMANDS.items()})

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        names = [name for name in COMMANDS if name.startswith(incomplete)]
        commands = [CompletionItem(name, help=COMMANDS[name].summary) for name in names]
        return [*commands, *TyperCommand.shell_complete(self, ctx, incomplete)]


app = typer.Typer(
    cls=_Group,
    epilog=f"Documentation: {Path(mamlctl.__file__).with_name('docs')}",
    context_settings={"help_option_names": HELP_OPTIONS},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        write_text(sys.stdout, f"mamlctl {mamlctl.__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Print the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Train, evaluate, compare and ablate MAML++ and its relatives."""


def share_the_processor() -> None:
    """Shorten OpenMP's spin-wait, so that training shares the processor with other programs."""
    # GNU OpenMP, which torch uses on Linux, spins at every barrier. With one of two cores taken by another
    # program, a meta-step took 5.7 s by default and 0.48 s with this count (5-way, 8 tasks, bf16; 0.21 s on
    # an idle machine). The variable is read when torch is first imported; a policy that is set stays.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main(on_error: Callable[[MamlctlError], None] | None = None) -> None:
    """Run the command line and exit with its code; `on_error` gets the error after it is printed."""
    # Until the work starts, there is nothing to clean up, and exceptions during imports may be dropped.
    exit_at_once_on(signal.SIGTERM, *HANG_UP)
    share_the_processor()
    code, error = _run()
    if error is not None:
        if not (isinstance(error, RankLostError) and LAUNCHED in os.environ):  # the parent reports it
            show_error(stderr_console(), error)
        if on_error is not None:
            on_error(error)
    sys.exit(code)


def run_program(on_error: Callable[[MamlctlError], None] | None = None) -> None:
    """Run `main` in a process that has nothing else to do, and end it without dismantling torch."""
    gc.disable()  # until `begin_work`: imports leave no garbage, and took a tenth longer with it
    try:
        main(on_error)
    except SystemExit as end:
        # What Python runs from here on prints exceptions and drops them.
        exit_at_once_on(signal.SIGINT, signal.SIGTERM, *HANG_UP)
        if isinstance(end.code, int):
            _leave_quickly(end.code)
        raise


def _leave_quickly(code: int) -> None:
    """Have the interpreter end after its exit functions, before it frees the modules one by one."""
    # Freeing torch's modules one by one takes a quarter of the processor time of a short command: `eval` of
    # 12 tasks took 3.4 s with it and 2.6 s without (mean of 10 alternating runs, 2 cores of an AMD EPYC).

    def leave() -> None:
        # Registered last, so it runs first: after the threads are joined and any profiler has reported.
        atexit.unregister(leave)
        atexit._run_exitfuncs()
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        except (OSError, ValueError):
            return  # the interpreter flushes again, and reports the failure
        os._exit(code)

    atexit.register(leave)


def _run() -> tuple[int, MamlctlError | None]:
    """Run the command line; return its exit code and the error to print."""
    on_terminal = sys.stdout.isatty()
    try:
        with redirect_stdout(cast(TextIO, NamedStream(sys.stdout))):
            code = app(standalone_mode=False, prog_name="mamlctl")
            sys.stdout.flush()
    except MamlctlError as error:
        return error.exit_code, error
    except TyperException as error:
        return ExitCode.USAGE, _usage_error(error)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED, None
    except BrokenPipeError:
        discard(sys.stdout)  # the reader closed the pipe
        return ExitCode.FAILED, None
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        if is_out_of_memory(error):
            hint = "end other programs, or use a machine with more memory"
            if sys.argv[1:2] == ["train"]:
                hint = "use a smaller --meta-batch-size, --image-size or network, or end other programs"
            return ExitCode.FAILED, MamlctlError("the machine does not have enough memory", hint=hint)
        if not isinstance(error, OSError):
            raise
        if on_terminal and not sys.stdout.isatty():  # the terminal closed, after which training has saved
            discard(sys.stdout)
            return ExitCode.HUNG_UP, None
        if error.filename == NamedStream.NAME:
            discard(sys.stdout)
            fact = f"cannot write to {error.filename}: {error.strerror or error}"
            return ExitCode.FAILED, MamlctlError(fact, hint="free disk space, or write to another place")
        return ExitCode.FAILED, file_error(error)
    return code or ExitCode.OK, None


def _usage_error(error: TyperException) -> MamlctlError | None:
    """The fact and the hint of an error of Typer; None after a bare `mamlctl`, which prints its help."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    help_command = " ".join(["mamlctl", *(word for word in words[:1] if word in COMMANDS), "--help"])
    options = _command(words[0]).params if words and words[0] in COMMANDS else ()
    # Typer's classes of errors are private, so their fields distinguish them.
    match vars(error):
        case {"option_name": "--nproc"} if any("--workers" in option.opts for option in options):
            return MamlctlError("unknown option '--nproc'", hint=SIDE_BY_SIDE)
        case {"option_name": name, "possibilities": known}:
            hint = nearest(name, known or (), otherwise=f"see {help_command}")
            return MamlctlError(f"unknown option '{name}'", hint=hint)
        case {"option_name": name} if any(name in option.opts and not option.is_flag for option in options):
            return MamlctlError(f"{name} has no value", hint=f"write a value after it, or see {help_command}")
        case {"option_name": name}:
            return MamlctlError(f"{name} does not take a value", hint="leave out '=' and the value")
        case {"param": param, "param_type": _}:
            fact = f"the argument '{param.opts[0]}' is missing"
            return MamlctlError(fact, hint=f"add it, or see {help_command}")
        case {"param": param}:
            for problem in getattr(error.__cause__, "errors", list)():  # of pydantic, which reads the values
                if noun := {"int_parsing": NOUNS[int], "float_parsing": NOUNS[float]}.get(problem["type"]):
                    fact = f"{param.opts[0]} is {problem['input']!r}, which is not {noun}"
                    return MamlctlError(fact, hint=f"use {noun}")
        case {"ctx": _} if words and words[0] not in COMMANDS:
            hint = nearest(words[0], COMMANDS, otherwise=f"use one of {', '.join(COMMANDS)}")
            return MamlctlError(f"unknown command '{words[0]}'", hint=hint)
    message = error.format_message()
    return MamlctlError(message, hint=f"see {help_command}") if message else None
