"""The parts of the documentation that are made from the code: `make docs` writes them into their pages.

A part begins with the line `<!-- generated: NAME -->` and ends with the line `<!-- end -->`.
"""

import ast
import inspect
import re
import textwrap

import typer.main
from records import pictures, tables
from test_architecture import FLOORS

from helpers.pages import PAGES
from helpers.shared import ROOT
from mamlctl.cli.app import app
from mamlctl.core.errors import ExitCode
from mamlctl.settings.presets import preset_summaries
from mamlctl.settings.schema import FIELDS

PACKAGE = ROOT / "mamlctl"
PART = re.compile(r"(?<=<!-- generated: )(\w+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
COMMANDS = typer.main.get_command(app).commands
# "(default: X)", "(more; default: X)" and "Default: X."
DEFAULT = re.compile(r" \(default: ([^()]+)\)|; default: ([^()]+)(?=\))| Default: (.+?)\.(?= |$)")
WIDTH = 100  # characters of a line
NAMES_WIDTH = 34  # characters of the tree and of the names in it


def options_of(command):
    """A command's options, without its arguments."""
    return [parameter for parameter in COMMANDS[command].params if parameter.opts[0].startswith("-")]


def table(heads, rows):
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |\n" for line in lines)


def _flags(option):
    """`--msl`, `--no-msl`."""
    return ", ".join(f"`{flag}`" for flag in [*option.opts, *option.secondary_opts])


def _help_and_default(option):
    """The help without the default, and the default."""
    if found := DEFAULT.search(option.help):
        (default,) = filter(None, found.groups())
        return option.help.replace(found[0], ""), default
    if option.default is False or option.secondary_opts:
        return option.help, "off"
    return option.help, option.default or ""


def settings():
    """A table for each panel of `train --help`, of the settings that a run has."""
    text = ""
    panels = dict.fromkeys(item.metadata["panel"] for item in FIELDS.values())
    for panel in panels:
        rows = []
        for option in options_of("train"):
            if option.name in FIELDS and option.rich_help_panel == panel:
                meaning, default = _help_and_default(option)
                rows.append([_flags(option), default, meaning])
        text += f"\n### {panel}\n\n{table(['setting', 'default', 'meaning'], rows)}"
    return f"{text}\n"


def options():
    """The options that are not settings of a run, with the commands that have them."""
    owners = {}
    for command in COMMANDS:
        for option in options_of(command):
            if option.name not in FIELDS or command in ("eval", "fetch"):
                owners.setdefault((_flags(option), *_help_and_default(option)), []).append(command)
    rows = [[flags, ", ".join(names), default, text] for (flags, text, default), names in owners.items()]
    return table(["option", "commands", "default", "meaning"], sorted(rows))


def exit_codes():
    """Every exit code, with the comment behind it in `mamlctl/core/errors.py`."""
    comments = re.findall(r"^    \w+ = (\d+)  # (.+)$", inspect.getsource(ExitCode), re.MULTILINE)
    assert len(comments) == len(ExitCode), "every exit code needs a comment that says when it is used"
    return table(["code", "meaning"], comments)


def presets():
    """Every preset, with the first sentence of the comment at its head; those that share it are one row."""
    names = {}
    for name, text in preset_summaries().items():
        names.setdefault(text, []).append(f"`{name}`")
    return table(["presets", "content"], [[", ".join(same), text] for text, same in names.items()])


def _summary(path):
    """The first line of a module's docstring."""
    return ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]


def _tree(folder, depth):
    """A line for each module of a folder, packages first."""
    lines = []
    entries = [*sorted(path.parent for path in folder.glob("*/__init__.py")), *sorted(folder.glob("*.py"))]
    if folder == PACKAGE:
        names = [name for floor in reversed(FLOORS) for name in floor]
        entries = [path for name in names for path in entries if path.stem == name]
    for path in entries:
        if path.name == "__init__.py":
            continue
        name = "  " * depth + path.name + ("/" if path.is_dir() else "")
        text = _summary(path / "__init__.py" if path.is_dir() else path)
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=name.ljust(NAMES_WIDTH), subsequent_indent=" " * NAMES_WIDTH
        )
        if path.is_dir():
            lines += _tree(path, depth + 1)
    return lines


def tree():
    """Every package and module with the first line of its docstring, the highest floor first."""
    return "\n".join(["```text", "mamlctl/", *_tree(PACKAGE, 1), "```", ""])


def _from_receipts(part):
    """A function that makes a table of the record."""
    return lambda: part(table, tables.lines())


PARTS = {part.__name__: part for part in (settings, options, exit_codes, presets, tree)}
PARTS |= {
    part.__name__: _from_receipts(part)
    for part in (tables.headline, tables.results, tables.returns, tables.modes, tables.curves, tables.runs)
}


def with_parts(text):
    """The text of a page with every generated part made again."""
    return PART.sub(lambda found: found[1] + found[2] + PARTS[found[1]](), text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_parts(page.read_text()))
    pictures.save(tables.lines())
