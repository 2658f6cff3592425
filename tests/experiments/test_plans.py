"""A plan has the right rows with the right settings, and their printed commands give the same settings."""

import functools
from dataclasses import asdict, replace

import pytest
from typer.main import get_command

from mamlctl.cli.app import app
from mamlctl.core.errors import SettingsError
from mamlctl.experiments.grid.command_lines import train_arguments
from mamlctl.experiments.grid.grid import resolve_rows
from mamlctl.experiments.grid.plans import PLANS, algorithm_rows, grid_rows, improvement_rows
from mamlctl.experiments.grid.scheduler import changes
from mamlctl.experiments.settings import resolve_settings
from mamlctl.run_folder import stored_config
from mamlctl.settings.presets import load_preset, parse_sets, preset_names
from mamlctl.settings.schema import IMPROVEMENTS, TrainConfig

FULL = frozenset(IMPROVEMENTS)


def on(row):
    return frozenset(name for name, value in row.values.items() if value)


@functools.cache
def train_command():
    return get_command(app).commands["train"]


def settings_from(arguments):
    """The settings that `mamlctl train` resolves from these arguments."""
    values = train_command().make_context("train", list(arguments)).params
    given = {
        name: value for name, value in values.items() if name in asdict(TrainConfig()) and value is not None
    }
    return resolve_settings([("--set", parse_sets(values["set_"] or [])), ("flag", given)]).config


def test_one_on_is_the_papers_table_with_batch_norm_improvements_together_and_separately():
    rows = improvement_rows("one-on", "maml++")
    assert [row.label for row in rows] == [
        "maml", "maml + msl", "maml + da", "maml + bnrs + bnwb", "maml + bnrs", "maml + bnwb", "maml + lslr",
        "maml + ca", "maml++",
    ]  # fmt: skip
    for row in rows[:-1]:
        assert on(row) == set(row.label.split(" + ")[1:])
    assert on(rows[-1]) == FULL


def test_one_off_removes_improvements_from_maml_plus_plus():
    rows = improvement_rows("one-off", "maml")
    assert rows[0].label == "maml++"
    for row in rows:
        assert on(row) == FULL - set(row.label.split(" - ")[1:])


def test_full_has_every_subset_once():
    rows = improvement_rows("full", "maml++")
    assert len(rows) == 64
    assert len({on(row) for row in rows}) == 64
    assert len({row.slug for row in rows}) == 64
    assert (rows[0].label, rows[-1].label) == ("maml", "maml++")


def test_cumulative_adds_improvements_in_the_given_order():
    rows = improvement_rows("cumulative", "maml", "lslr-bnrs+bnwb-msl")
    assert [sorted(on(row)) for row in rows] == [
        [], ["lslr"], ["bnrs", "bnwb", "lslr"], ["bnrs", "bnwb", "lslr", "msl"],
    ]  # fmt: skip
    for wrong in ("lslr-lslr", "lslr-foo", ""):
        with pytest.raises(SettingsError):
            improvement_rows("cumulative", "maml", wrong)


def test_a_grid_has_every_combination_in_order():
    rows = grid_rows(["inner_lr=0.1,0.4", "algo=maml,fomaml"])
    assert [row.label for row in rows] == [
        "inner_lr=0.1, maml", "inner_lr=0.1, fomaml", "inner_lr=0.4, maml", "inner_lr=0.4, fomaml",
    ]  # fmt: skip
    assert rows[3].values == {"inner_lr": 0.4}
    assert rows[3].algo == "fomaml"


@pytest.mark.parametrize("pair", ["inner_lr", "inner_lr=", "inner_rl=1", "seed=1,2", "ways=5,20", "=1"])
def test_a_grid_refuses_invalid_pairs(pair):
    with pytest.raises(SettingsError):
        grid_rows([pair])


def test_a_setting_given_twice_is_refused():
    with pytest.raises(SettingsError, match="twice"):
        grid_rows(["inner_lr=0.1", "inner_lr=0.2"])
    with pytest.raises(SettingsError):
        algorithm_rows("maml,maml")


PUBLISHED = [name for name in preset_names() if name.endswith("maml++")]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("preset", PUBLISHED)
def test_every_plan_works_with_every_preset_and_its_commands_give_the_same_settings(preset, plan):
    """A preset's settings that have no effect in a row, such as msl_epochs without MSL, are dropped."""
    planned = improvement_rows(plan, "maml++")
    rows = resolve_rows(planned, [(f"preset {preset}", load_preset(preset))], {}, 0)
    for row, plan_row in zip(rows, planned, strict=True):
        assert set(row.config.improvements) == on(plan_row)
        assert (row.config.msl_epochs is None) or row.config.msl
    for row in rows[:: max(len(rows) // 9, 1)]:
        assert settings_from(train_arguments(row.config)) == row.config


def test_a_row_has_the_settings_that_train_resolves_from_the_same_flags():
    given = {"dataset": "omniglot", "ways": 20, "shots": 1, "inner_lr": 0.2, "epochs": 30}
    rows = {row.label: row.config for row in resolve_rows(improvement_rows("one-on", "maml++"), [], given, 4)}
    for label, flags in {
        "maml": {"algo": "maml"},
        "maml + lslr": {"algo": "maml", "lslr": True},
        "maml++": {"algo": "maml++"},
    }.items():
        assert rows[label] == resolve_settings([("flag", given | flags | {"seed": 4})]).config


def test_algorithms_get_their_own_defaults_unless_a_flag_overrides_them():
    given = {"dataset": "omniglot", "shots": 1, "meta_lr": 0.01}
    for row in resolve_rows(algorithm_rows("maml++,reptile,protonet,anil"), [], given, 0):
        assert row.config == resolve_settings([("flag", given | {"algo": row.label, "seed": 0})]).config
        assert settings_from(train_arguments(row.config)) == row.config


def test_a_flag_is_dropped_in_rows_where_it_has_no_effect_unless_that_is_all_rows():
    given = {"msl_epochs": 7}
    rows = {row.label: row.config for row in resolve_rows(improvement_rows("one-on", "maml"), [], given, 0)}
    assert rows["maml"].msl_epochs is None
    assert rows["maml + msl"].msl_epochs == rows["maml++"].msl_epochs == 7
    with pytest.raises(SettingsError, match="no effect in any row"):
        resolve_rows(algorithm_rows("maml,fomaml"), [], given, 0)


def test_problems_name_their_rows():
    with pytest.raises(SettingsError, match="row 'maml \\+ msl'"):
        resolve_rows(improvement_rows("one-on", "maml"), [], {"inner_steps": 1}, 0)


@pytest.mark.parametrize("plan", PLANS)
def test_regression_plans_leave_out_batch_norm_rows(plan):
    """A regression net has no batch norm, so those rows would be duplicates."""
    given = {"dataset": "sinusoid", "shots": 5, "inner_lr": 0.01, "inner_steps": 3}
    rows = resolve_rows(improvement_rows(plan, "maml++"), [], given, 0)
    labels = [row.label for row in rows]
    assert not any("bn" in label for label in labels)
    assert len({repr(row.config) for row in rows}) == len(labels) == len(set(labels))
    assert len(labels) == {"one-on": 6, "one-off": 5, "cumulative": 5, "full": 16}[plan]
    for row in rows:
        assert settings_from(train_arguments(row.config)) == row.config


def test_another_algorithm_gets_only_the_improvements_that_affect_it():
    rows = resolve_rows(improvement_rows("one-on", "anil"), [], {"algo": "anil", "dataset": "omniglot"}, 0)
    for row in rows:
        assert row.config.algo == "anil"
        assert set(row.config.improvements) == set(row.label.split(" + ")[1:])


@pytest.mark.parametrize(
    ("pairs", "given"),
    [
        (["msl_epochs=1,5"], {"algo": "maml"}),
        (["filters=32,64"], {"net": "mlp"}),
        (["algo=maml,protonet", "inner_lr=0.1,0.4"], {}),
        (["inner_lr=0.1,0.10"], {}),
        (["inner_lr=0.1,"], {}),
        (["inner_lr=0.1,abc"], {}),
    ],
)
def test_a_grid_with_ineffective_or_duplicate_or_invalid_values_is_refused(pairs, given):
    with pytest.raises(SettingsError):
        resolve_rows(grid_rows(pairs), [], {"dataset": "omniglot"} | given, 0)


def test_a_problem_that_all_rows_share_is_reported_once():
    with pytest.raises(SettingsError) as refused:
        resolve_rows(improvement_rows("full", "maml"), [], {"ways": 1}, 0)
    assert len(refused.value.problems) == 1


def test_a_resumed_cell_keeps_the_convolutions_of_an_older_version():
    planned = TrainConfig()
    values = {name: value for name, value in asdict(planned).items() if name != "conv"}
    older = stored_config(values, "a file")
    assert (older.conv, planned.conv) == ("direct", "auto")
    assert changes(older, planned) == {}
    assert changes(older, replace(planned, conv="winograd")) == {"conv": "winograd"}
    assert changes(planned, replace(planned, conv="direct", report_every=7)) == {
        "conv": "direct",
        "report_every": 7,
    }
