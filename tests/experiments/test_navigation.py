"""Runs on 2-D navigation: every algorithm, resuming, tests, tables, figures, and refused settings."""

import json
import math
import statistics
from dataclasses import replace

import pytest
import torch
from helpers.shared import ignore
from helpers.trainer_cases import comparable

from mamlctl.core.errors import DivergedError, SettingsError
from mamlctl.core.metrics_rows import rows_of
from mamlctl.core.statistics import mean_ci95
from mamlctl.engine.algorithms.algorithm import Algorithm
from mamlctl.engine.algorithms.policy_search import walk
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.experiments.evaluate import evaluate_run
from mamlctl.experiments.grid.compare import compare
from mamlctl.experiments.plot import draw
from mamlctl.experiments.settings import resolve_settings
from mamlctl.experiments.train import resume, train
from mamlctl.experiments.trained_model import load_trained_model
from mamlctl.report.column_texts import best_legend, unit
from mamlctl.report.verdict import _is_better, verdict
from mamlctl.run_folder import open_run
from mamlctl.settings.evaluation import EvalConfig

LEARNERS = [name for name, entry in ALGORITHMS.items() if isinstance(entry.on_rewards, Algorithm)]
OTHERS = sorted(ALGORITHMS.keys() - set(LEARNERS))
SMALL = {"dataset": "navigation", "shots": 3, "queries": 2, "hidden": "8", "meta_batch_size": 2}
SMALL |= {"val_tasks": 3, "device": "cpu"}
ITSELF = "which decides the size of a step itself"
ONE_WAY = "the derivatives of policies are computed in one way"
SHORT = {"epochs": 2, "steps_per_epoch": 2}
TESTED = EvalConfig(tasks=5, device="cpu")


def settings_of(**settings):
    length = {} if settings.get("algo") == "scratch" else SHORT
    return resolve_settings([("flag", SMALL | length | settings)]).config


def trained(path, time_limit_s=None, **settings):
    config = settings_of(**settings)
    return train(config, out=path, offline=True, time_limit_s=time_limit_s, command="test", on_event=ignore)


def evaluated(path, settings=TESTED):
    return evaluate_run(path, settings, offline=True, on_event=ignore)


def refused(**settings):
    with pytest.raises(SettingsError) as caught:
        settings_of(**settings)
    assert all("use  or" not in hint for _, hint in caught.value.problems)
    return [fact for fact, _ in caught.value.problems]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of every algorithm that learns policies."""
    folder = tmp_path_factory.mktemp("navigation")
    for algo in LEARNERS:
        trained(folder / algo, algo=algo)
    return folder


def test_the_published_algorithms_learn_policies():
    assert {"maml", "fomaml", "maml++", "reptile", "transfer", "scratch", "oracle"} <= set(LEARNERS)


@pytest.mark.parametrize("algo", LEARNERS)
def test_every_algorithm_trains_and_reports_returns(runs, algo):
    run = open_run(runs / algo)
    assert run.state().status == "finished"
    reports, validations = (rows_of(run.metrics(), kind) for kind in ("report", "validation"))
    steps = run.config.inner_steps
    assert reports and all(len(row["query_losses"]) == steps + 1 for row in reports)
    assert all((row["meta_lr"] is None) == (run.config.outer == "trpo") for row in reports)
    assert len(validations) == run.config.epochs
    assert all(row["val_return"] < 0 for row in validations)
    # The loss of a report is minus the mean return; without MSL the meta-loss is the last one.
    if not run.config.msl:
        assert all(row["meta_loss"] == pytest.approx(row["query_losses"][-1]) for row in reports)
    (row,) = evaluated(runs / algo).rows
    assert (row.metric, row.kind, row.bn) == ("return", "best", "none")
    assert len(row.per_step) == (1 if algo == "oracle" else 4)
    assert row.score == pytest.approx(row.per_step[-1])


def test_a_test_reports_the_mean_and_interval_over_goals(runs):
    result = evaluated(runs / "maml")
    model = load_trained_model(runs / "maml", TESTED, offline=True, on_event=ignore)
    episodes = model.stream.episodes(0, 5)
    points = walk(
        model.predict.keywords["sampling"], model.derivatives.net, model.states[0].frozen(), episodes, 3
    )
    for step, point in enumerate(points):
        returns_T = point.experience.measured.return_TE.mean(1).double().tolist()
        mean, half = mean_ci95(torch.tensor(returns_T).numpy())
        assert result.rows[0].per_step[step] == pytest.approx(mean, rel=1e-5)
        assert result.rows[0].per_step_ci95[step] == pytest.approx(half, rel=1e-4)
        assert mean == pytest.approx(statistics.fmean(returns_T), rel=1e-5)


@pytest.mark.parametrize("algo", ["maml", "maml++", "reptile"])
@pytest.mark.parametrize("outer", ["trpo", "pg"])
def test_a_run_that_is_stopped_after_every_step_equals_an_uninterrupted_one(tmp_path, algo, outer):
    settings = {"algo": algo} | ({} if algo == "reptile" else {"outer": outer})
    if algo == "reptile" and outer == "pg":
        settings["inner_optimizer"] = "adam"
    trained(tmp_path / "whole", **settings)
    trained(tmp_path / "parts", time_limit_s=1e-9, **settings)
    parts = 1
    while open_run(tmp_path / "parts").state().status != "finished":
        resume(tmp_path / "parts", {}, offline=True, time_limit_s=1e-9, command="test", on_event=ignore)
        parts += 1
    assert parts > 3
    assert all(
        len(rows_of(open_run(tmp_path / name).metrics(), "validation")) == 2 for name in ("whole", "parts")
    )
    whole, stopped = (comparable(open_run(tmp_path / name)) for name in ("whole", "parts"))
    assert whole == stopped


def test_returns_do_not_depend_on_other_tasks_of_a_test(runs):
    few, many = (evaluated(runs / "maml", replace(TESTED, tasks=tasks)) for tasks in (3, 7))
    tables = [
        (open_run(runs / "maml").path / result.folder / "tasks.csv").read_text() for result in (few, many)
    ]
    first, second = ([float(line.split(",")[1]) for line in table.splitlines()[1:4]] for table in tables)
    assert first == pytest.approx(second, rel=1e-5)


def test_a_table_says_that_higher_returns_are_better(runs, tmp_path):
    both = [runs / "transfer", runs / "maml"]
    table = compare(both, TESTED, offline=True, command="x", on_event=ignore, folder=tmp_path / "table")
    assert table.metric == "return"
    ours = {row.label: row.best for row in table.rows}["maml"]
    assert _is_better(table, table.rows[1]) == (ours.difference.mean > 0)
    words = " ".join(verdict(table)) + best_legend(table) + unit(table)
    assert "lower is better" not in words and " return" in words


def test_a_figure_shows_the_paths_before_and_after_adaptation(runs):
    files, _ = draw(
        runs / "maml", replace(TESTED, tasks=2), [runs / "transfer"], offline=True, on_event=ignore
    )
    assert {file.name for file in files} >= {"navigation.png", "navigation.svg", "training.png"}
    assert not math.isnan(files[0].stat().st_size)


@pytest.mark.parametrize("algo", OTHERS)
def test_other_algorithms_are_refused_with_their_reason(algo):
    (fact,) = refused(algo=algo)
    assert fact == f"--algo {algo} learns no policies: it {ALGORITHMS[algo].on_rewards[0]}"


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"dataset": "omniglot", "algo": "oracle"}, "--algo oracle needs rewards, but omniglot has images"),
        ({"dataset": "sinusoid", "algo": "oracle"}, "--algo oracle needs rewards, but sinusoid has curves"),
        ({"dataset": "sinusoid", "outer": "pg"}, "--outer has no meaning: sinusoid has no rewards"),
        ({"outer": "pg", "max_kl": 0.1}, "--max-kl has no effect with --outer pg"),
        ({"meta_lr": 0.1}, f"--meta-lr has no effect with --outer trpo, {ITSELF}"),
        ({"clip_norm": 1.0}, f"--clip-norm has no effect with --outer trpo, {ITSELF}"),
        (
            {"algo": "reptile", "outer": "pg"},
            "--outer has no effect with --algo reptile: its outer step is an interpolation",
        ),
        (
            {"algo": "transfer", "lslr": True},
            "--lslr has no effect with --algo transfer: there is no inner loop in training",
        ),
        ({"ways": 3}, "--ways has no meaning: navigation has no classes"),
        ({"loss": "mae"}, "--loss has no meaning: navigation has rewards instead of a loss"),
        ({"bn": "running"}, "--bn has no meaning: navigation is learnt without batch norm"),
        ({"net": "conv4"}, "--net conv4 is not a policy, but navigation has rewards"),
        ({"discount": 2.0}, "--discount is 2, but the maximum is 1"),
        ({"engine": "plain"}, f"--engine has no effect with --algo maml: {ONE_WAY}"),
        (
            {"task_chunk": "2"},
            "--task-chunk has no effect with --algo maml: trajectories of a meta-batch are not divided",
        ),
        (
            {"algo": "oracle", "train_shots": 30},
            "--train-shots has no effect with --algo oracle: there is no inner loop in training",
        ),
        ({"augment": "flips"}, "--augment has no meaning: navigation has no images"),
        ({"strict": True}, "--strict has no meaning: navigation has no images"),
        (
            {"algo": "scratch", "clip_norm": 1.0},
            "--clip-norm has no effect with --algo scratch: nothing is trained",
        ),
        ({"algo": "oracle", "eval_inner_steps": 2}, "--eval-inner-steps is 2, but --algo oracle requires 0"),
    ],
)
def test_settings_without_effect_are_refused(settings, fact):
    assert fact in refused(**settings)


def test_every_refused_setting_has_one_reason_and_a_hint_that_works():
    assert refused(engine="compiled") == [f"--engine has no effect with --algo maml: {ONE_WAY}"]
    for settings in ({"algo": "reptile", "inner_batch": 2}, {"proximal": 0.5}, {"hyper_lr": 0.5}):
        with pytest.raises(SettingsError) as caught:
            settings_of(**settings)
        assert [hint for _, hint in caught.value.problems] == ["leave it out"]
    with pytest.raises(SettingsError) as caught:
        settings_of(inner_optimizer="adam")
    assert [hint for _, hint in caught.value.problems] == ["leave it out, or use --algo reptile"]


def test_options_for_examples_of_your_own_are_refused(cli, runs):
    for words in (
        ("--support", "mine", "--query", "mine/x.png"),
        ("--support", "mine", "--export", "policy.onnx"),
        ("--export", "policy.onnx"),
        ("--csv", "predicted.csv"),
        ("--save-adapted", "policy.pt"),
    ):
        code, out, err = cli("eval", runs / "maml", *words)
        assert (code, out) == (2, "")
        flags = [word for word in words if word.startswith("--")]
        why = "has no effect with a run on navigation: a policy learns from rewards, not from examples"
        assert all(f"{flag} {why}" in err for flag in flags), err
        assert "leave it out; eval tests the policy on new goals" in err


def test_a_policy_that_diverges_in_a_test_is_told_as_returns(cli, runs):
    code, _, err = cli("eval", runs / "maml", "--tasks", 3, "--device", "cpu", "--inner-lr", 1e30)
    assert code == 4
    assert "returns in tasks 0 to 2 are not finite" in err
    assert "lower --inner-lr, --meta-lr or --max-kl" in err


def test_a_test_without_batch_norm_prints_no_mode_of_it(cli, runs):
    words = (runs / "maml", "--tasks", 3, "--device", "cpu")
    for command in (("eval",), ("compare", runs / "transfer")):
        code, out, err = cli(*command, *words)
        assert code == 0
        assert not {"bn", "none"} & set((out + err).split())


def test_all_goals_are_scored_after_every_step(cli, runs):
    code, _, err = cli("eval", runs / "maml", "--tasks", 5, "--per-step-tasks", 2)
    assert code == 2
    assert "--per-step-tasks has no effect with navigation, which is always scored after every step" in err


def test_a_run_of_policies_is_tested_on_policies_only(runs):
    fact = "omniglot has images, but the run was trained on navigation tasks"
    with pytest.raises(SettingsError, match=fact):
        evaluated(runs / "maml", replace(TESTED, dataset="omniglot"))


@pytest.mark.parametrize(
    ("outer", "lower"),
    [("trpo", "--inner-lr or --max-kl;"), ("pg", "--inner-lr or --meta-lr, or with --clip-value 10;")],
)
def test_divergence_is_told_as_a_return_with_settings_that_have_an_effect(tmp_path, outer, lower):
    with pytest.raises(DivergedError, match="the return after 1 inner step is nan") as caught:
        trained(tmp_path / "run", outer=outer, inner_lr=1e30)
    assert caught.value.hint.startswith(f"start a new run with a lower {lower}")


@pytest.mark.parametrize("outer", ["trpo", "pg"])
def test_a_meta_gradient_that_is_not_finite_stops_a_run_whose_returns_are_finite(tmp_path, outer):
    with pytest.raises(DivergedError, match="the meta-gradient of hidden1"):
        trained(tmp_path / "run", outer=outer, hidden="8-8", inner_lr=1e5)


def test_an_ensemble_of_policies_is_refused(runs):
    with pytest.raises(SettingsError, match="the mean of the returns of policies is not that of a policy"):
        evaluated(runs / "maml", replace(TESTED, models="ensemble"))


def test_a_run_can_be_tested_with_the_other_reward(runs):
    """Minus the distance instead of minus its square: the same paths before adaptation, other returns."""
    squared, plain = (
        evaluated(runs / "transfer", replace(TESTED, dataset=name)).rows[0]
        for name in (None, "navigation-distance")
    )
    assert squared.per_step[0] != plain.per_step[0]


def test_eval_fails_under_a_return_and_prints_it_as_json(cli, runs):
    words = ("eval", runs / "maml", "--tasks", 5, "--device", "cpu", "--json")
    code, out, err = cli(*words, "--fail-under", -0.001)
    (row,) = json.loads(out)["results"]
    assert code == 1
    assert f"has {row['return']:.3f}, but the limit is --fail-under -0.001" in err
    assert cli(*words, "--fail-under", -1e6)[0] == 0
    code, _, err = cli(*words, "--fail-over", 5)
    assert code == 2
    assert "--fail-over has no effect on navigation, whose score is a mean return" in err
