"""Lists of names and of runs, the latest run, and what an empty folder of runs says."""

import json
import os
import re
import shutil
from contextlib import ExitStack
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from mamlctl.cli.options import LISTS
from mamlctl.core.files import one_writer
from mamlctl.core.literals import BUILT_IN_NETS, LOSSES, TORCHVISION_NETS
from mamlctl.core.results import TrainResult
from mamlctl.data.sets.registry import NAMES
from mamlctl.display.datasets import show_names
from mamlctl.display.run_results import show_runs
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.nets import factory
from mamlctl.experiments.grid.grid import resolve_rows
from mamlctl.experiments.grid.grid_folder import open_grid, save_plan
from mamlctl.experiments.grid.plans import grid_rows
from mamlctl.experiments.runs.listing import list_runs
from mamlctl.run_folder import RunState, new_run
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.presets import preset_names
from mamlctl.settings.rules import NETS
from mamlctl.settings.schema import TrainConfig

GLYPHS = TrainConfig(dataset="glyphs", algo="maml", epochs=4, steps_per_epoch=10)
VALIDATION = {"bn": "running", "val_tasks": 9}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(path, status="finished", config=GLYPHS, *, age=0, step=40):
    """Make a run folder as if it had been trained, last changed `age` minutes ago."""
    with new_run(path, config, config, command="mamlctl train", environment={}) as run:
        for epoch, score in enumerate((0.5, 0.75, 0.7), start=1):
            row = {"step": 10 * epoch, "epoch": epoch, "val_accuracy": score, "val_ci95": 0.125, **VALIDATION}
            run.append_metrics("validation", row)
        if status:
            run.set_state(RunState(status, step))
    for file in path.iterdir():
        os.utime(file, times=(1.8e9 - 60 * age,) * 2)
    return path


@pytest.fixture
def in_use():
    """A function that locks a folder like a process that trains in it, until the end of the test."""
    with ExitStack() as stack:
        yield lambda path: stack.enter_context(one_writer(path))


@pytest.fixture
def resumed(monkeypatch):
    """The folders that `train --resume` gets, without any training."""
    folders = []

    def resume(path, changes, **others):
        folders.append(str(path))
        return TrainResult(str(path), "finished", "", 1, 1, "accuracy", *[None] * 3, 1, "running", 1.0)

    monkeypatch.setattr("mamlctl.experiments.train.resume", resume)
    return folders


def listed(cli):
    code, out, err = cli("compare", "--list", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["format"] == 1
    return document


@pytest.mark.parametrize("name", LISTS)
def test_each_list_has_every_name_and_a_meaning(cli, name):
    names = {
        "presets": preset_names(),
        "algorithms": ALGORITHMS,
        "datasets": NAMES,
        "nets": (*BUILT_IN_NETS, *TORCHVISION_NETS),
        "losses": LOSSES,
    }
    code, out, err = cli("train", "--list", name)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == list(names[name])
    document = json.loads(cli("train", "--list", name, "--json")[1])
    assert [entry["name"] for entry in document[name]] == list(names[name])
    assert all(len(entry["summary"].split()) > 1 for entry in document[name])


def test_the_list_of_networks_is_that_of_the_factory():
    assert list(factory.NETS) == list(BUILT_IN_NETS)
    assert list(NETS) == [*BUILT_IN_NETS, *TORCHVISION_NETS]


def test_runs_are_listed_with_their_status_the_newest_first(cli, work, in_use):
    train(work / "runs/old", age=9)
    train(work / "runs/stopped", "interrupted", step=13, age=3)
    train(work / "runs/killed", "running", step=13, age=4)
    train(work / "runs/unborn", None, age=5)
    train(work / "runs/deep/er/new", "diverged", age=1)
    train(work / "runs/busy", "running", step=13, age=2)
    in_use(work / "runs/busy")
    found = {run["run"]: run for run in listed(cli)["runs"]}
    assert {run: entry["status"] for run, entry in found.items()} == {
        "runs/deep/er/new": "diverged",
        "runs/busy": "running",
        "runs/stopped": "interrupted",
        "runs/killed": "interrupted",
        "runs/unborn": "interrupted",
        "runs/old": "finished",
    }
    assert list(found) == [
        "runs/deep/er/new",
        "runs/busy",
        "runs/stopped",
        "runs/killed",
        "runs/unborn",
        "runs/old",
    ]
    assert [found["runs/old"][key] for key in ("label", "dataset", "ways", "shots", "seed")] == [
        *("maml", "glyphs", 5, 1, 0)
    ]
    assert [found["runs/old"][key] for key in ("step", "total_steps", "best_val_score", "best_val_ci95")] == [
        *(40, 40, 0.75, 0.125)
    ]
    assert found["runs/killed"]["step"] == 30, "the last report is later than status.json"


def test_the_best_error_of_curves_is_the_lowest(cli, work):
    config = replace(GLYPHS, dataset="sinusoid", net="mlp")
    with new_run(work / "runs/a", config, config, command="mamlctl train", environment={}) as run:
        for epoch, score in enumerate((2.0, 1.0, None), start=1):
            row = {"step": epoch, "epoch": epoch, "val_mse": score, "val_ci95": 0.5, **VALIDATION}
            run.append_metrics("validation", row)
    (entry,) = listed(cli)["runs"]
    assert (entry["metric"], entry["best_val_score"], entry["ways"]) == ("mse", 1.0, None)
    assert "sinusoid 1-shot" in cli("compare", "--list")[1]


def test_the_list_names_runs_as_other_commands_take_them(cli, work, monkeypatch):
    train(work / "runs/mine")
    out = cli("compare", "--list")[1].splitlines()
    assert out[0].split() == ["run", "algorithm", "data", "status", "step", "best", "when"]
    assert out[1].startswith(
        "runs/mine  maml       glyphs 5-way 1-shot  finished  40/40  75.0 ± 12.5 %  2027-01-"
    )
    monkeypatch.setenv("MAMLCTL_RUNS", str(work / "runs"))
    monkeypatch.chdir("/")
    assert f"\n{work}/runs/mine  " in cli("compare", "--list")[1]


DAMAGE = {
    "config.yaml": ["", "a: 1", "{", "\0"],
    "status.json": ["", "{", "[]", '{"status": 7, "step": "x"}'],
    "metrics.jsonl": ["{", "\0\n{}", '{"kind": "validation"}\n'],
}


@pytest.mark.parametrize(
    ("file", "content"), [(file, text) for file, texts in DAMAGE.items() for text in texts]
)
def test_a_damaged_run_does_not_end_the_list(cli, work, file, content):
    train(work / "runs/whole", age=1)
    (train(work / "runs/broken") / file).write_text(content)
    os.utime(work / "runs/broken" / file, times=(1.8e9,) * 2)
    broken, whole = listed(cli)["runs"]
    assert (broken["run"], whole["status"]) == ("runs/broken", "finished")
    assert (broken["status"] == "damaged") == (file == "config.yaml")
    code, out, _ = cli("compare", "--list")
    assert code == 0
    assert "runs/whole" in out
    assert ("\nruns/broken/config.yaml is damaged: " in out) == (file == "config.yaml")


def test_a_folder_that_cannot_be_read_does_not_end_the_list(cli, work, monkeypatch):
    train(work / "runs/whole")
    (work / "runs/closed").mkdir()
    (work / "runs/loop").symlink_to(work / "runs", target_is_directory=True)
    iterdir = type(work).iterdir

    def refuse(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(type(work), "iterdir", refuse)
    assert [run["run"] for run in listed(cli)["runs"]] == ["runs/whole"]


def grid_in(folder):
    """Save the plan of a grid of two rows."""
    rows = resolve_rows(grid_rows(["inner_lr=0.1,0.2"]), [("preset", {"dataset": "glyphs"})], {}, 0)
    grid = open_grid(folder, "grid", rows, [0], EvalConfig(tasks=4), "mamlctl ablate")
    save_plan(grid)
    return grid


def test_tables_are_listed_with_their_runs(cli, work):
    grid = grid_in(work / "runs/table")
    train(grid.cells[0].folder, config=grid.cells[0].config)
    train(grid.cells[1].folder, "interrupted", config=grid.cells[1].config)
    document = listed(cli)
    assert document["runs"] == []
    (table,) = document["tables"]
    assert (table["folder"], table["runs"], table["finished"]) == ("runs/table", 2, 1)
    assert "runs/table  2     1 " in cli("compare", "--list")[1]


@pytest.mark.parametrize("makes", [False, True])
def test_an_empty_folder_of_runs_says_how_to_get_one(cli, work, makes):
    if makes:
        (work / "runs/notes").mkdir(parents=True)
    code, out, err = cli("compare", "--list")
    assert (code, err) == (0, "")
    assert out == "no runs in runs; train one with: mamlctl train --preset demo\n"
    assert listed(cli) == {"format": 1, "folder": "runs", "runs": [], "tables": []}
    code, _, err = cli("eval")
    assert code == 2
    hint = "hint:  use omniglot-20w1s or omniglot-5w1s, train one with mamlctl train --preset demo"
    assert err.splitlines()[1] == f"{hint}, or see mamlctl eval --help"


def test_eval_without_a_run_names_the_latest_ones(cli, work):
    for age in range(5):
        train(work / f"runs/run{age}", age=age)
    (work / "runs/run0/config.yaml").write_text("{")
    for name in ("runs/models/omniglot-5w1s", "runs/models/.omniglot-20w1s-x/omniglot-20w1s"):
        train(work / name)  # a copy of a model, and a remnant of one
    code, out, err = cli("eval", "--tasks", "5")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "error: the argument 'run' is missing",
        "hint:  name a run; the latest are runs/run1, runs/run2, runs/run3",
    ]
    for number in (2, 3, 4):
        shutil.rmtree(work / f"runs/run{number}")
    assert cli("eval")[2].splitlines()[1] == "hint:  name a run; the latest is runs/run1"


def test_resume_latest_takes_the_newest_unfinished_run_that_is_whole_and_not_in_use(
    cli, work, in_use, resumed
):
    train(work / "runs/finished", "finished", age=0)
    train(work / "runs/diverged", "diverged", age=1)
    (train(work / "runs/damaged", "interrupted", age=2) / "config.yaml").write_text("{")
    train(work / "runs/busy", "running", age=3)
    in_use(work / "runs/busy")
    cell = grid_in(work / "runs/table").cells[0]
    train(cell.folder, "interrupted", config=cell.config, age=0)
    train(work / "runs/older", "interrupted", age=9)
    train(work / "runs/killed", "running", age=5)
    code, _, err = cli("train", "--resume", "latest")
    assert code == 0
    assert resumed == ["runs/killed"]
    assert "resuming the latest unfinished run, runs/killed\n" in err
    assert cli("train", "--resume", "latest", "--quiet")[2] == ""


def test_resume_latest_keeps_the_rules_of_resume(cli, work, resumed):
    train(work / "runs/a", "interrupted")
    assert cli("train", "--resume", "latest", "--ways", "7")[0] == 2
    assert cli("train", "--resume", "latest", "--out", "runs/b")[0] == 2
    assert resumed == []
    train(work / "latest", "interrupted", age=9)
    assert cli("train", "--resume", "latest", "--quiet")[0] == 0
    assert resumed == ["latest"], "a folder of this name is that folder"


@pytest.mark.parametrize("command", ["train", "ablate"])
def test_resume_latest_without_such_a_folder_says_what_there_is(cli, work, in_use, command):
    kind = "run" if command == "train" else "table"
    train(work / "runs/finished")
    code, out, err = cli(command, "--resume", "latest")
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        f"error: runs has no unfinished {kind}",
        "hint:  list all with mamlctl compare --list, or name the folder",
    ]
    busy = train(work / "runs/busy", "running") if command == "train" else work / "runs/busy"
    if command == "ablate":
        grid_in(busy)
    in_use(busy)
    assert (
        f"runs has no unfinished {kind} that is not in use; runs/busy is in use by"
        in cli(command, "--resume", "latest")[2]
    )


def test_ablate_resumes_the_latest_unfinished_table(cli, work):
    grid_in(work / "runs/table")
    (work / "runs/broken").mkdir()
    (work / "runs/broken/plan.yaml").write_text("{")
    code, out, err = cli("ablate", "--resume", "latest", "--print-commands")
    assert code == 0
    assert "resuming the latest unfinished table, runs/table\n" in err
    assert out.count("runs/table/cells/") >= 2


@pytest.fixture
def terminal():
    """A terminal of 80 columns without colours."""
    return Console(file=StringIO(), force_terminal=True, width=80, color_system=None)


@pytest.mark.parametrize("name", LISTS)
def test_the_names_fit_a_terminal_and_their_meanings_are_aligned(terminal, name):
    summaries = LISTS[name]()
    show_names(terminal, summaries)
    lines = terminal.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()) == " ".join(f"{key} {text}" for key, text in summaries.items())
    starts = {re.match(r"\S* +", line).end() for line in lines}
    assert len(starts) == 1 and 80 - starts.pop() >= 40


def test_a_run_takes_two_lines_of_a_narrow_terminal(terminal, work):
    long = "omniglot-20w1s-maml++-s0-20261121-031500"
    train(work / "runs" / long)
    train(work / "runs/short", None, age=1)
    show_runs(terminal, list_runs())
    lines = terminal.file.getvalue().splitlines()
    assert lines[0] == f"runs/{long}"
    assert lines[1].startswith("  maml  glyphs 5-way 1-shot  finished  40/40  75.0 ± 12.5 %  2027-01-")
    assert lines[2] == "runs/short"
    assert len(lines) == 4 and max(map(len, lines)) <= 80


WRONG = [
    ("train --list algos", "--list is 'algos', which is not a list", "did you mean 'algorithms'?"),
    ("train --list xyzzy", "which is not a list", "use one of presets, algorithms, datasets, nets"),
    ("train --list nets --ways 5", "--ways has no effect with --list", "leave it out"),
    ("train --list nets --resume latest", "--resume has no effect with --list", "leave it out"),
    ("train --list nets --trust-code", "--trust-code has no effect with --list", "leave it out"),
    ("compare --list --set ways=5", "error: --set has no effect with --list", "leave it out"),
    ("compare --list --algos maml", "--algos has no effect with --list", "leave it out"),
    ("compare --list --tasks 5", "--tasks has no effect with --list", "leave it out"),
    ("compare --list --csv", "--csv has no effect with --list", "leave it out"),
    ("compare --list runs/a", "runs/a has no effect with --list", "leave it out"),
]


@pytest.mark.parametrize(("line", "fact", "hint"), WRONG, ids=[case[0] for case in WRONG])
def test_options_without_effect_on_a_list_are_refused(cli, work, line, fact, hint):
    code, out, err = cli(*line.split())
    assert (code, out) == (2, "")
    assert fact in err.splitlines()[0] and hint in err.splitlines()[1]
