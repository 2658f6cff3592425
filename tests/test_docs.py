"""README and the pages of mamlctl/docs name every command, flag, preset and exit code, and only real ones."""

import re
import shlex
import sys
from dataclasses import fields

import pytest
import typer.main
from helpers.generated_docs import COMMANDS, options_of, with_parts
from helpers.pages import DOCS, PAGES, code_blocks
from helpers.shared import ROOT
from typer.exceptions import TyperException

from mamlctl.cli.app import app, main
from mamlctl.core.errors import ExitCode
from mamlctl.core.events import TrainReport, ValidationDone
from mamlctl.core.metrics_rows import METRICS_VERSION
from mamlctl.core.results import named
from mamlctl.settings.presets import preset_names

TEXTS = {page: page.read_text() for page in PAGES}
EVERYTHING = "\n".join(TEXTS.values())
WIDTH = 100  # characters of a line of prose
# Of Ray, pip, the benchmark, a published command line, and the improvement that contributing.md adds.
FOREIGN = {"--address", "--generate", "--head", "--num-cpus", "--port", "--force-reinstall"}
FOREIGN |= {"--engines", "--growth", "--official", "--quick", "--transductive", "--wu", "--no-wu"}
FOREIGN |= {"--only", "--trials"}  # of the attack
FOREIGN |= {"--logdir"}  # of TensorBoard
FOREIGN |= {"--help"}
FOREIGN |= {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}  # of torchrun
FOREIGN |= {"--max-restarts", "--local-addr"}
FOREIGN |= {
    "--ntasks-per-node",
    "--gpus-per-node",
    "--cpus-per-task",
    "--nodes",
    "--time",
    "--signal",
}  # of SLURM
FLAGS = {
    flag
    for options in (typer.main.get_command(app).params, *map(options_of, COMMANDS))
    for option in options
    for flag in (*option.opts, *option.secondary_opts)
    if flag.startswith("--")
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def flags_in(text):
    """The flags that a text names, without `--no-...`, which stands for several."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?!\w)", text)) - {"--no"}


def outside_code(text):
    """The text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """The anchors that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", outside_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands_in(text):
    """The words of every `mamlctl` command line in the code blocks of a page."""
    for block in code_blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.match(r"(?:[\w ]*\$ +)?mamlctl ((?!COMMAND).+)", line):
                words = shlex.split(found[1].partition(" > ")[0], comments=True)
                yield [word for word in words if word not in ("...", "&")]


@each_page
def test_generated_parts_are_those_of_the_code(page):
    assert TEXTS[page] == with_parts(TEXTS[page]), "run `make docs`"


def test_every_generated_part_has_its_page():
    assert set(re.findall(r"<!-- generated: (\w+) -->", EVERYTHING)) >= {
        "settings",
        "options",
        "exit_codes",
        "presets",
    }


def test_every_flag_preset_and_exit_code_is_documented():
    assert flags_in(EVERYTHING) >= FLAGS
    assert all(f"mamlctl {command}" in EVERYTHING for command in COMMANDS)
    assert all(f"`{name}`" in EVERYTHING for name in preset_names())
    assert all(re.search(rf"^\| {code.value} \|", EVERYTHING, re.MULTILINE) for code in ExitCode)


@each_page
def test_pages_name_only_real_flags_commands_exit_codes_and_presets(page):
    text = TEXTS[page]
    assert flags_in(text) <= FLAGS | FOREIGN
    for command in re.findall(r"(?:`|\$ +|^)mamlctl ([a-z]+)", text, re.MULTILINE):
        assert command in COMMANDS
    codes = re.findall(r"exit code (\d+)", text)
    assert {*map(int, codes)} <= {*ExitCode}
    for name in re.findall(r"--preset ([a-z][\w/+.-]*\w\+*)", text):
        assert name in preset_names()


@each_page
def test_command_lines_are_accepted(page):
    for name, *words in commands_in(TEXTS[page]):
        try:
            COMMANDS[name].make_context(name, words)
        except TyperException as error:
            pytest.fail(f"mamlctl {name} {shlex.join(words)}: {error}")


@each_page
def test_links_point_at_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", outside_code(TEXTS[page])):
        path, _, anchor = (target[0] or target[1]).partition("#")
        if path.startswith(("http:", "https:")):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), f"{page.name} links to {path}"
        if anchor:
            assert anchor in anchors(linked.read_text()), f"{page.name} links to {path}#{anchor}"


@each_page
def test_every_row_is_in_a_table_with_a_head(page):
    """A blank line inside a table would turn its other rows into text."""
    for table in re.findall(r"(?<=\n\n)\|.*(?:\n.*\S.*)*", outside_code(TEXTS[page])):
        assert re.fullmatch(r"[|: -]+", table.splitlines()[1]), table


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_pages_begin_with_their_use_and_wrap_their_lines(page):
    text = TEXTS[page]
    assert re.match(r"# .+\n\nAfter reading this page you (can|know) ", text)
    for number, line in enumerate(outside_code(text).splitlines(), 1):
        assert len(line) <= WIDTH or line.startswith("|") or "](" in line, f"{page.name}: {number}: {line}"


ERRORS = [
    block
    for text in TEXTS.values()
    for block in code_blocks(text)
    if re.match(r"\$ mamlctl .+\nerror: ", block)
]


@pytest.mark.parametrize("block", ERRORS)
def test_documented_errors_are_those_that_the_commands_print(block, monkeypatch, capsys):
    command, _, printed = block.partition("\n")
    monkeypatch.setattr(sys, "argv", shlex.split(command.removeprefix("$ ")))
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == printed


def test_help_names_the_folder_of_the_pages():
    assert str(DOCS) in typer.main.get_command(app).epilog


def test_readme_is_short_and_links_every_page():
    readme = TEXTS[ROOT / "README.md"]
    assert readme.count("\n") <= 200
    for page in DOCS.glob("*.md"):
        assert f"](mamlctl/docs/{page.name})" in readme


def test_contributing_lists_every_marker():
    markers = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(markers) > 5
    assert all(f"\n| `{marker}` |" in TEXTS[DOCS / "contributing.md"] for marker in markers)


def test_logging_describes_every_field_of_metrics():
    """The fields of a report and of a validation, as a run with learnt rates writes them."""
    text = TEXTS[DOCS / "logging.md"].partition("## metrics.jsonl")[2]
    described = [
        re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) for part in text.split("of kind `validation`")
    ]
    validation = ValidationDone(1, 1, "accuracy", 0.5, 0.1, 60, "none", 0.5, 0.1, 1)
    assert described == [
        ["kind", *(item.name for item in fields(TrainReport))],
        ["kind", *named(validation)],
    ]
    assert f"This is version {METRICS_VERSION}," in text


@each_page
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)|`make (\w+)", TEXTS[page], re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target
