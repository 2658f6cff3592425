"""What a shell completes; the choices are those of the tables, and nothing slow is imported."""

import os
import subprocess
import sys

import pytest
from helpers.shared import ROOT

from mamlctl.cli.app import COMMANDS
from mamlctl.core.literals import LOSSES, TORCHVISION_NETS, BatchNorm
from mamlctl.data.sets.registry import NAMES
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.experiments.grid.plans import PLANS
from mamlctl.settings.presets import preset_names


@pytest.fixture
def completed(cli, monkeypatch):
    """A function that returns what bash completes at the end of a command line."""

    def call(line):
        words = line.split(" ")
        monkeypatch.setenv("_MAMLCTL_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        code, out, err = cli()
        assert (code, err) == (0, "")
        return out.split()

    return call


VALUES = {
    "train --algo ": [*ALGORITHMS],
    "train --algo ma": ["maml", "maml++", "maml-zero"],
    "ablate --algo al": ["alpha-maml"],
    "train --net ": ["conv4", "mlp", "resnet12", *TORCHVISION_NETS],
    "train --net res": ["resnet12", "resnet18", "resnet34", "resnet50"],
    "train --loss ": [*LOSSES],
    "train --loss m": ["mse", "mae"],
    "train --dataset ": NAMES,
    "compare --dataset mini": ["mini-imagenet"],
    "eval runs/a --dataset omni": ["omniglot"],
    "train --bn ": [*BatchNorm.__args__],
    "train --ink ": ["0", "1"],
    "train --preset ": preset_names(),
    "train --preset paper/sin": ["paper/sinusoid-10s-maml"],
    "train --list ": ["presets", "algorithms", "datasets", "nets", "losses"],
    "ablate --plan ": [*PLANS],
    "ablate --plan one": ["one-on", "one-off"],
    "ablate --executor ": ["local", "ray"],
    "eval omniglot-5": ["omniglot-5w1s"],
    "train --init omniglot-5": ["omniglot-5w1s"],
    "compare runs/a omniglot-20": ["omniglot-20w1s"],
    "eval runs/a --models ": ["best", "ensemble", "all"],
    "": [*COMMANDS],
    "ab": ["ablate"],
    "train --inner-b": ["--inner-batch"],
}


@pytest.mark.parametrize("line", VALUES)
def test_the_names_and_choices_of_an_option_complete(completed, line):
    assert completed(f"mamlctl {line}") == VALUES[line]


@pytest.mark.parametrize(
    "line",
    [
        "train --dataset ./",
        "train --dataset photos",
        "train --resume ",
        "train --init ",
        "eval ",
        "eval runs/",
        "train --ways ",
    ],
)
def test_folders_files_and_numbers_are_left_to_the_shell(completed, line):
    """Bash then completes the names of files (complete -o default)."""
    assert completed(f"mamlctl {line}") == []


def test_folders_that_also_match_are_completed_with_models(completed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "omniglot-20-mine").mkdir()
    assert completed("mamlctl eval omniglot-20") == ["omniglot-20w1s", "omniglot-20-mine"]


def test_every_option_with_a_choice_completes_its_choices(completed):
    everything = completed("mamlctl train --")
    assert {"--train-shots", "--no-msl", "--help-all", "--quiet", "--help"} <= set(everything)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_also_get_what_a_name_means(cli, monkeypatch, shell):
    monkeypatch.setenv("_MAMLCTL_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "mamlctl train --algo foma")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    code, out, _ = cli()
    assert code == 0
    assert "fomaml" in out and ALGORITHMS["fomaml"].summary in out


@pytest.mark.process
def test_completion_imports_neither_torch_nor_numpy_nor_pydantic():
    program = """if True:
    import atexit, sys
    slow = ("torch", "numpy", "pydantic", "omegaconf")
    atexit.register(lambda: print([name for name in slow if name in sys.modules]))
    sys.argv = ["mamlctl"]
    from mamlctl.cli.app import main
    main()
    """
    words = {
        "_MAMLCTL_COMPLETE": "complete_bash",
        "COMP_WORDS": "mamlctl train --algo rep",
        "COMP_CWORD": "3",
    }
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | words)
    assert done.stdout.split() == ["reptile", "[]"], done.stderr


def test_the_scripts_for_the_shells_can_be_shown_and_installed(cli):
    out = cli("--help")[1]
    assert "--install-completion" in out and "--show-completion" in out
