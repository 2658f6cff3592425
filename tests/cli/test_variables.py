"""Environment variables are defaults: what overrides them, and what the errors about them say."""

import itertools
from dataclasses import replace

import pytest

from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import flag, variable
from mamlctl.core.results import TrainResult
from mamlctl.data.reading.packs import data_root
from mamlctl.experiments.executors.jobs import ChildProcess
from mamlctl.experiments.grid.grid import resolve_rows
from mamlctl.experiments.grid.grid_folder import open_grid, save_plan
from mamlctl.experiments.grid.plans import grid_rows
from mamlctl.experiments.train import _default_path
from mamlctl.run_folder import new_run
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import FIELDS, TrainConfig
from mamlctl.settings.variables import origin, runs_folder, variable_values

LAYERS = ("default", "variable", "preset", "config", "--set", "flag")  # each overrides those before it
SETTINGS = ("device", "data_root")


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A function that puts values into layers, and returns the words of a command line with them."""
    presets = tmp_path / "presets"
    presets.mkdir()
    monkeypatch.setattr("mamlctl.settings.presets.presets_folder", lambda: presets)

    def put(values, name):
        line = ["--dataset", "glyphs"]
        if "variable" in values:
            monkeypatch.setenv(variable(name), values["variable"])
        for layer, path in (("preset", presets / "mine.yaml"), ("config", tmp_path / "mine.yaml")):
            if layer in values:
                path.write_text(f"{name}: {values[layer]}\n")
                line += [f"--{layer}", "mine" if layer == "preset" else str(path)]
        if "--set" in values:
            line += ["--set", f"{name}={values['--set']}"]
        if "flag" in values:
            line += [flag(name), values["flag"]]
        return line

    return put


def test_device_and_data_root_have_variables():
    assert [name for name, item in FIELDS.items() if item.metadata["variable"]] == list(SETTINGS)
    assert [variable(name) for name in SETTINGS] == ["MAMLCTL_DEVICE", "MAMLCTL_DATA_ROOT"]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("weaker", "stronger"), list(itertools.combinations(LAYERS, 2)))
def test_each_layer_overrides_every_weaker_one(cli, words, tmp_path, name, weaker, stronger):
    values = {layer: f"from{place}" for place, layer in enumerate(LAYERS) if layer in (weaker, stronger)}
    values.pop("default", None)
    code, out, _ = cli("train", *words(values, name), "--print-config")
    assert code == 0
    (line,) = (line for line in out.splitlines() if line.startswith(f"{name}:"))
    value, _, source = line.partition("#")
    assert value.split() == [f"{name}:", values[stronger]]
    sources = {"variable": variable(name), "preset": "preset mine", "config": str(tmp_path / "mine.yaml")}
    assert source.strip() == sources.get(stronger, stronger)


@pytest.mark.parametrize("blank", ["", " "])
def test_a_blank_variable_counts_as_not_set(cli, monkeypatch, blank):
    monkeypatch.setenv("MAMLCTL_DEVICE", blank)
    monkeypatch.setenv("MAMLCTL_RUNS", blank)
    assert variable_values(TrainConfig) == {}
    assert str(runs_folder()) == "runs"
    out = cli("train", "--dataset", "glyphs", "--print-config")[1]
    assert [line.split() for line in out.splitlines() if line.startswith("device:")] == [
        ["device:", "auto", "#", "default"]
    ]


@pytest.fixture
def run(tmp_path):
    """A run that was trained on the device cuda."""
    config = TrainConfig(dataset="glyphs", device="cuda")
    with new_run(tmp_path / "run", config, config, command="mamlctl train", environment={}) as run:
        return run.path


@pytest.mark.parametrize(
    ("line", "device"),
    [
        ("", None),
        ("--set device=cpu", "cpu"),
        ("--device cpu", "cpu"),
        ("--device cpu --set device=cuda:1", "cpu"),
    ],
)
@pytest.mark.parametrize("exported", [None, "cuda:9"])
def test_a_resumed_run_prefers_flags_then_variables_then_its_own_settings(
    cli, monkeypatch, run, line, device, exported
):
    given = {}

    def resume(path, changes, **others):
        given.update(changes)
        return TrainResult(str(path), "finished", "", 1, 1, "accuracy", *[None] * 3, 1, "running", 1.0)

    monkeypatch.setattr("mamlctl.experiments.train.resume", resume)
    if exported:
        monkeypatch.setenv("MAMLCTL_DEVICE", exported)
    assert cli("train", "--resume", run, *line.split(), "--quiet")[0] == 0
    assert given == ({"device": device or exported} if device or exported else {})


@pytest.mark.parametrize("command", ["eval", "compare"])
@pytest.mark.parametrize(("line", "root"), [("", "exported"), ("--data-root given", "given")])
def test_a_test_prefers_flags_to_variables(cli, monkeypatch, run, command, line, root):
    monkeypatch.setenv("MAMLCTL_DATA_ROOT", "exported")
    seen = []

    def stop(path, settings, **others):
        seen.append(settings)
        raise SettingsError([("stopped", "")])

    place = "evaluate.evaluate_run" if command == "eval" else "grid.compare.compare"
    monkeypatch.setattr(f"mamlctl.experiments.{place}", stop)
    assert cli(command, run, *line.split())[0] == 2
    assert [settings.data_root for settings in seen] == [root]
    assert variable_values(EvalConfig) == {"data_root": "exported"}


def test_a_grid_takes_variables_as_defaults_and_passes_them_on_as_flags(cli, monkeypatch):
    monkeypatch.setenv("MAMLCTL_DATA_ROOT", "/exported")
    line = ["ablate", "--dataset", "glyphs", "--print-commands"]
    assert "--data-root /exported" in cli(*line)[1]
    assert "--data-root /given" in cli(*line, "--data-root", "/given")[1]


def test_a_resumed_grid_prefers_flags_then_variables_then_its_plan(cli, monkeypatch, tmp_path):
    layers = [("preset", {"dataset": "glyphs", "data_root": "/planned"})]
    rows = resolve_rows(grid_rows(["inner_lr=0.1,0.2"]), layers, {}, 0)
    grid = open_grid(tmp_path / "grid", "grid", rows, [0], replace(EvalConfig(), tasks=4), "mamlctl ablate")
    save_plan(grid)
    line = ["ablate", "--resume", grid.folder, "--print-commands"]
    assert "--data-root /planned" in cli(*line)[1]
    monkeypatch.setenv("MAMLCTL_DATA_ROOT", "/exported")
    assert "--data-root /exported" in cli(*line)[1]
    assert "--data-root /given" in cli(*line, "--data-root", "/given")[1]


def test_the_cells_of_a_grid_do_not_see_the_variables(monkeypatch):
    started = {}

    def popen(command, *, env, **others):
        started.update(env)

    monkeypatch.setattr("subprocess.Popen", popen)
    ChildProcess(("train",), {"MAMLCTL_DEVICE": "cuda", "MAMLCTL_DATA_ROOT": "x", "PATH": "y"}, 1)
    assert started == {"PATH": "y"}


def test_fetch_uses_the_data_root_of_the_variable(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("MAMLCTL_DATA_ROOT", str(tmp_path / "exported"))
    assert f"prepared data sets are in {tmp_path}/exported\n" in cli("fetch", "--list")[1]
    given = tmp_path / "given"
    assert f"prepared data sets are in {given}\n" in cli("fetch", "--list", "--data-root", given)[1]


def test_default_folders_are_made_in_the_folder_of_runs(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("MAMLCTL_RUNS", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _default_path(TrainConfig(dataset="glyphs")).parent == tmp_path / "mine"
    monkeypatch.chdir(tmp_path)
    assert " mine/glyphs-5w1s-one-on-" in cli("ablate", "--dataset", "glyphs", "--print-commands")[1]


WRONG = [
    ("MAMLCTL_DEVICE", "gpu", "unknown device 'gpu' in MAMLCTL_DEVICE"),
    ("MAMLCTL_DEVICE", "cuda:9", "MAMLCTL_DEVICE is cuda:9, but the number of CUDA devices"),
    ("MAMLCTL_DATA_ROOT", "file", "MAMLCTL_DATA_ROOT is file, which is a file, not a folder"),
    ("MAMLCTL_DATA_ROOT", "${HOME}", "data_root is '${HOME}' in MAMLCTL_DATA_ROOT, but"),
    ("MAMLCTL_RUNS", "file", "MAMLCTL_RUNS is file, which is a file, not a folder"),
]


@pytest.mark.parametrize(("name", "value", "fact"), WRONG, ids=[case[2] for case in WRONG])
@pytest.mark.parametrize(
    "line", ["train --dataset glyphs --time-limit 1s", "ablate --dataset glyphs --dry-run"]
)
def test_the_error_for_a_wrong_value_names_its_variable(cli, monkeypatch, tmp_path, line, name, value, fact):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv(name, value)
    code, out, err = cli(*line.split())
    assert (code, out) == (2, "")
    assert fact in err and err.count("\n") == 2
    if name == "MAMLCTL_DEVICE":
        _, _, err = cli(*line.split(), "--device", "gpus")
        assert "unknown device 'gpus'\n" in err


def test_the_error_for_a_wrong_flag_does_not_name_the_variable(monkeypatch):
    monkeypatch.setenv("MAMLCTL_DEVICE", "cpu")
    assert origin("device", "gpu") == "--device"
    with pytest.raises(SettingsError, match=r"^--data-root is .*test_variables\.py, which is a file"):
        data_root(__file__)


@pytest.mark.parametrize("command", ["train", "eval", "compare", "ablate", "fetch"])
def test_help_names_the_variables(cli, command):
    everything = () if command == "fetch" else ("--help-all",)
    out = " ".join(cli(command, *(everything or ("--help",)))[1].split())
    assert "MAMLCTL_DATA_ROOT" in out
    assert ("MAMLCTL_DEVICE" in out) == (command != "fetch")
    assert ("MAMLCTL_RUNS" in out) == (command not in ("fetch", "eval"))
