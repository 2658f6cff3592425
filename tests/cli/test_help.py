"""The help of every command: what it shows, how wide it is, and the list of all options."""

import re
from pathlib import Path

import pytest

from mamlctl.cli.app import COMMANDS
from mamlctl.settings.schema import FIELDS, IMPROVEMENTS

GOLDEN = Path(__file__).with_name("options.txt")
LEAST = 40  # columns of a description on a terminal of 80 columns
COMMON = """
dataset ways shots queries net algo inner_steps inner_lr meta_lr meta_batch_size epochs steps_per_epoch device
seed
"""
PAGES = [["--help"], *([command, page] for command in COMMANDS for page in ("--help", "--help-all"))]
PAGES.remove(["fetch", "--help-all"])  # it has few options, which are all in its help


@pytest.fixture
def page(cli, monkeypatch):
    """A function that returns the help for some words, on a terminal of some width."""

    def call(*words, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        code, out, err = cli(*words)
        assert (code, err) == (0, "")
        return out

    return call


def rows(out):
    """The options of a help page, each with the column of its description."""
    lines = out.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if found := re.match(r"  (-.*?)(?:  +|$)", line):
            yield (
                found[1],
                found.end() if found.end() < len(line) else len(following) - len(following.lstrip()),
            )


def flags(out):
    """The flags of a help page, without the values that they take."""
    return [flag for option, _ in rows(out) for flag in re.findall(r"(?<![\w<-])--?[a-zA-Z][\w-]*", option)]


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_descriptions_have_forty_columns_or_more_on_a_terminal_of_eighty(page, words):
    out = page(*words)
    assert all(len(line) <= 80 or line.startswith("Documentation: /") for line in out.splitlines())
    options = list(rows(out))
    assert len(options) > 2
    for option, column in options:
        assert 80 - column >= LEAST, option


@pytest.mark.parametrize("columns", [40, 60, 66, 100, 200])
def test_no_line_is_wider_than_the_terminal_or_than_a_hundred_columns(page, columns):
    lines = page("train", "--help-all", columns=columns).splitlines()
    wide = [line for line in lines if len(line) > min(columns, 100)]
    assert all(line.startswith(("Usage:", "Example:")) for line in wide)


def test_the_settings_that_people_change_most_are_fifteen_with_the_improvements_as_one():
    common = [name for name, item in FIELDS.items() if item.metadata["common"]]
    assert [name for name in common if name not in IMPROVEMENTS] == COMMON.split()
    assert set(IMPROVEMENTS) < set(common)
    assert len(set(common) - set(IMPROVEMENTS)) + 1 == 15


def test_short_help_of_train_has_the_common_settings_and_all_other_options(page):
    short, whole = flags(page("train", "--help")), flags(page("train", "--help-all"))
    left_out = {flag for flag in whole if flag not in short}
    rare = {name for name, item in FIELDS.items() if not item.metadata["common"]}
    assert {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in left_out} == rare
    assert len(page("train", "--help").splitlines()) < 90


@pytest.mark.parametrize("command", ["ablate", "compare"])
def test_short_help_of_a_table_has_no_training_settings_and_says_where_they_are(page, command):
    short, whole = page(command, "--help"), page(command, "--help-all")
    assert "mamlctl train --help-all describes them" in " ".join(short.split())
    left_out = {flag for flag in flags(whole) if flag not in flags(short)}
    assert {f"--{name.replace('_', '-')}" for name in FIELDS} <= left_out
    assert {"--seeds", "--tasks", "--out", "--json", "--help-all"} <= set(flags(short))
    assert len(short.splitlines()) < 100


def test_short_names_of_help_and_version(cli, page):
    for command in ([], *([name] for name in COMMANDS)):
        assert page(*command, "-h") == page(*command, "--help")
    assert cli("-V") == cli("--version")


def test_the_summary_of_each_command_is_in_its_own_help_and_in_that_of_the_group(page):
    overview = " ".join(page("--help").split())
    for name, entry in COMMANDS.items():
        assert f"{name} {entry.summary}" in overview
        own = " ".join(page(name, "--help").split())
        assert entry.summary in own
        assert all(example in own for example in entry.examples)


def test_help_has_no_colours_in_a_pipe_and_has_them_on_a_terminal(page, monkeypatch):
    assert "\x1b" not in page("train", "--help")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[36m  --ways" in page("train", "--help")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[36m" not in page("train", "--help")


def test_the_options_of_all_commands_are_those_of_the_golden_list(page):
    """A new or removed option is a decision: change options.txt in the same commit.

    The training settings of ablate and compare are those of train.
    """
    lines = []
    for command in COMMANDS:
        short = flags(page(command, "--help"))
        whole = flags(page(command, "--help-all")) if command in ("train", "eval") else ()
        lines += [f"{command} {flag}" for flag in short]
        lines += [f"{command} {flag} (only in --help-all)" for flag in whole if flag not in short]
    assert lines == GOLDEN.read_text().splitlines()
