"""Tests of evaluations: label orders, disjoint tasks, and the files that are written."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.shared import ignore

from mamlctl.core.errors import SettingsError
from mamlctl.data.rules import FIGURE_TASKS, with_figure
from mamlctl.data.tasks.label_permutations import LabelPermutations
from mamlctl.engine.evaluation.evaluator import EvaluationPlan, evaluate
from mamlctl.engine.evaluation.measured_loop import TaskSets
from mamlctl.engine.evaluation.prediction import PredictRequest
from mamlctl.experiments.evaluate import evaluate_run
from mamlctl.experiments.grid.command_lines import cell_test
from mamlctl.experiments.grid.compare import compare
from mamlctl.experiments.grid.grid import GridCell, GridRow
from mamlctl.experiments.grid.stored_evaluations import find_evaluation
from mamlctl.experiments.settings import resolve_settings
from mamlctl.experiments.train import train
from mamlctl.experiments.trained_model import load_trained_model
from mamlctl.run_folder import open_run
from mamlctl.settings.evaluation import EvalConfig

WAYS, TASKS = 3, 7
SMALL_REPTILE = {"eval_inner_batch": 2, "train_shots": 2, "eval_inner_steps": 4, "inner_lr": 0.05}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, glyphs_root):
    """A function that trains a run on glyphs or curves once and returns its folder."""
    runs = {}

    def run(algo, **settings):
        key = (algo, *settings.items())
        if key not in runs:
            values = {"dataset": "glyphs", "ways": WAYS, "queries": 3, "filters": 4, "epochs": 2}
            values |= {"steps_per_epoch": 4, "val_tasks": 4, "data_root": str(glyphs_root)}
            if "dataset" in settings:
                values = {name: values[name] for name in ("epochs", "steps_per_epoch", "val_tasks")}
            config = resolve_settings([("flag", {"algo": algo} | values | settings)]).config
            runs[key] = tmp_path_factory.mktemp(algo) / "run"
            train(config, out=runs[key], offline=True, time_limit_s=None, command="test", on_event=ignore)
        return runs[key]

    return run


def loaded(path, **settings):
    return load_trained_model(path, EvalConfig(tasks=TASKS, **settings), offline=True, on_event=ignore)


def scores_of(path, **settings):
    """The result, the scores in tasks.csv (_T2) and the summary."""
    result = evaluate_run(path, EvalConfig(tasks=TASKS, **settings), offline=True, on_event=ignore)
    folder = path / "eval" / result.folder.rsplit("/", 1)[-1]
    with (folder / "tasks.csv").open() as file:
        rows = [[float(row["best"]), float(row["ensemble-2"])] for row in csv.DictReader(file)]
    return result, np.array(rows), json.loads((folder / "summary.json").read_text())


def test_each_class_gets_each_label_once_in_as_many_orders_as_ways(trained):
    stream = loaded(trained("maml")).stream
    for task in range(3):
        labels = [
            LabelPermutations(stream, WAYS).labels(WAYS * task + order).tolist() for order in range(WAYS)
        ]
        assert labels == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


def test_further_orders_are_shifts_of_random_ones(trained):
    stream = loaded(trained("maml")).stream
    labels = np.array([LabelPermutations(stream, 9).labels(number) for number in range(9 * 200)])
    assert (np.sort(labels, axis=1) == np.arange(WAYS)).all()
    labels_TON = labels.reshape(200, 3, WAYS, WAYS)
    assert (labels_TON == (labels_TON[:, :, :1] + np.arange(WAYS)[:, None]) % WAYS).all()
    # With more orders, the first ones stay the same.
    fewer = np.array([LabelPermutations(stream, 5).labels(number) for number in range(5 * 200)]).reshape(
        200, 5, WAYS
    )
    assert (labels.reshape(200, 9, WAYS)[:, :5] == fewer).all()
    # Six equally likely orders of three classes: 99.9 % quantile of chi-square with five degrees of freedom.
    drawn = labels_TON[:, 1:, 0].reshape(-1, WAYS) @ [9, 3, 1]
    counts = np.unique(drawn, return_counts=True)[1]
    assert len(counts) == 6 and ((counts - 400 / 6) ** 2 / (400 / 6)).sum() < 20.5


def test_a_reordered_task_has_the_same_images_and_consistent_labels(trained):
    stream = loaded(trained("maml")).stream
    plain, reordered = stream.episodes(2, 4), LabelPermutations(stream, 5)
    for first, tasks in ((10, 20), (13, 1), (14, 3)):
        found = reordered.episodes(first, tasks)
        for place, number in enumerate(range(first, first + tasks)):
            task, labels = number // 5 - 2, reordered.labels(number)
            for part in ("support", "query"):
                x, y = getattr(found, f"{part}_x_TECHW")[place], getattr(found, f"{part}_y_TE")[place]
                own = getattr(plain, f"{part}_y_TE")[task]
                assert torch.equal(x, getattr(plain, f"{part}_x_TECHW")[task])
                assert y.tolist() == [labels[label] for label in own.tolist()]
                assert torch.equal(found.class_TN[place][y], plain.class_TN[task][own])


@pytest.mark.parametrize("algo", ["protonet", "nearest"])
def test_algorithms_without_a_head_do_not_depend_on_the_label_order(trained, algo):
    (_, once, _), (_, shifted, _), (_, more, _) = (
        scores_of(trained(algo), label_permutations=orders) for orders in (1, WAYS, 2 * WAYS + 1)
    )
    assert (once == shifted).all() and (once == more).all()
    assert 1 / WAYS < once.mean() < 1


@pytest.mark.parametrize(("algo", "settings"), [("maml", {}), ("reptile", SMALL_REPTILE)])
def test_scores_over_label_orders_are_those_of_a_slow_loop(trained, algo, settings):
    orders, path = WAYS + 2, trained(algo, **settings)
    opened = loaded(path)
    want = np.zeros((TASKS, 2))
    for task in range(TASKS):
        for order in range(orders):
            episodes = opened.stream.episodes(task, 1)
            labels = LabelPermutations(opened.stream, orders).labels(task * orders + order)
            for y_TE in (episodes.support_y_TE, episodes.query_y_TE):
                y_TE[0] = torch.tensor([labels[label] for label in y_TE[0].tolist()])
            plan = opened.inner_steps, opened.statistics
            with torch.no_grad():
                both = [
                    opened.predict(
                        PredictRequest(TaskSets(opened.derivatives, episodes), state.frozen(), *plan)
                    )[-1, 0]
                    for state in opened.states
                ]
            for column, logits_EN in enumerate((both[0], torch.stack(both).mean(0))):
                right = logits_EN.argmax(1) == episodes.query_y_TE[0]
                want[task, column] += right.double().mean().item() / orders
    result, scores, _ = scores_of(path, label_permutations=orders)
    np.testing.assert_allclose(scores, want, atol=1e-6)  # tasks.csv has six digits
    assert [row.score for row in result.rows] == pytest.approx(want.mean(0))
    assert (scores != scores_of(path)[1]).any()


def test_one_order_is_a_plain_evaluation(trained):
    opened = loaded(trained("maml"))
    scores = evaluate(
        opened.derivatives,
        opened.states,
        opened.stream,
        EvaluationPlan(TASKS, opened.inner_steps, opened.statistics, opened.predict, curve_tasks=TASKS),
    )
    result, _, summary = scores_of(trained("maml"), per_step=True)
    assert result.rows[0].per_step == pytest.approx(scores.single[0].curve_TI.mean(0), abs=0)
    assert {"disjoint", "label_permutations"}.isdisjoint(summary["protocol"])
    assert result.notes == () and summary["notes"] == [] and summary["step"] == 8


def test_notes_mention_disjoint_tasks_and_label_orders(trained):
    plain = scores_of(trained("maml"))[0]
    result, _, summary = scores_of(trained("maml"), disjoint=True, label_permutations=2)
    assert result.folder != plain.folder
    assert summary["protocol"]["disjoint"] is True and summary["protocol"]["label_permutations"] == 2
    once, orders = result.notes
    assert once.endswith(f"tasks without reusing an image; {TASKS} requested")
    assert orders == "the score of each task is its mean over 2 orders of its labels"
    assert summary["notes"] == [once, orders]


def test_disjoint_tasks_share_no_image_and_support_mini_batches(trained):
    opened = loaded(trained("reptile", **SMALL_REPTILE), disjoint=True)
    images = opened.stream.episodes(0, TASKS)
    assert images.batches_TIB is not None and "without reusing an image" in opened.notes[0]
    x = torch.cat([images.support_x_TECHW.flatten(0, 1), images.query_x_TECHW.flatten(0, 1)])
    assert len(torch.unique(x.flatten(1), dim=0)) == len(x)


def test_curves_refuse_options_for_images_and_labels(trained):
    with pytest.raises(SettingsError) as raised:
        loaded(trained("maml", dataset="sinusoid"), disjoint=True, label_permutations=2)
    assert list(raised.value.problems) == [
        ("--disjoint is for images, but sinusoid has curves", "leave it out"),
        ("--label-permutations reorders classes, but sinusoid has curves", "leave it out"),
    ]


def test_zero_label_orders_are_refused(trained):
    with pytest.raises(SettingsError, match="--label-permutations is 0, but the minimum is 1"):
        loaded(trained("maml"), label_permutations=0)


@pytest.mark.parametrize("algo", ["maml", "maml++", "anil", "meta-sgd", "reptile", "transfer", "protonet"])
def test_a_run_is_tested_on_tasks_with_more_or_fewer_classes(trained, algo):
    path = trained(algo)
    for ways, rows in ((4, [0, 1, 2, 0]), (2, [0, 1])):
        model = loaded(path, ways=ways, shots=2)
        episodes = model.stream.episodes(0, 2)
        assert episodes.support_y_TE.tolist() == [np.repeat(np.arange(ways), 2).tolist()] * 2
        learnt = loaded(path).states[0].slow
        if algo not in ("transfer", "protonet"):  # which have no head of their own
            head = model.states[0].slow["linear.weight"]
            assert torch.equal(head, learnt["linear.weight"][rows])
        state = model.states[0].frozen()
        request = PredictRequest(
            TaskSets(model.derivatives, episodes), state, model.inner_steps, model.statistics
        )
        logits_TEN = model.predict(request)[-1]
        right_TE = logits_TEN.argmax(-1) == episodes.query_y_TE
        result, scores, summary = scores_of(path, ways=ways, shots=2)
        assert scores[:2, 0] == pytest.approx(right_TE.double().mean(1).numpy(), abs=1e-6)
        assert (result.rows[0].ways, result.rows[0].shots) == (ways, 2)
        assert (summary["protocol"]["ways"], summary["protocol"]["shots"]) == (ways, 2)
        assert result.notes[0].startswith(f"trained with {WAYS} classes per task, tested with {ways}: ")


def test_the_size_of_the_training_tasks_is_the_default(trained):
    path = trained("maml", train_shots=3)
    (default, scores, _), (same, again, _) = scores_of(path), scores_of(path, ways=WAYS, shots=1)
    assert default.folder == same.folder and default.notes == same.notes == () and (scores == again).all()
    assert loaded(path, split="train").stream.shots == 3
    assert loaded(path, split="train", shots=2).stream.shots == 2


def test_stored_evaluations_are_told_apart_by_the_size_of_their_tasks(trained):
    path = trained("maml", meta_lr=0.01)
    run, test = open_run(path), EvalConfig(tasks=TASKS)
    scores_of(path, ways=2)
    assert find_evaluation(run, test) is None
    assert find_evaluation(run, replace(test, ways=2)).protocol["ways"] == 2
    assert find_evaluation(run, replace(test, ways=2, shots=2)) is None
    scores_of(path)
    assert find_evaluation(run, test).protocol["ways"] == WAYS


def test_a_head_that_is_not_adapted_has_no_more_classes(trained):
    assert loaded(trained("boil"), ways=2).stream.ways == 2
    with pytest.raises(SettingsError, match="there are 4 classes, but the run has a head for 3"):
        loaded(trained("boil"), ways=4)


def test_tasks_larger_than_the_split_are_refused(trained):
    with pytest.raises(SettingsError, match="'test' has 60 classes, but --ways is 61"):
        loaded(trained("maml"), ways=61)


def test_curves_have_shots_but_no_ways(trained):
    path = trained("maml", dataset="sinusoid")
    assert loaded(path, shots=5).stream.shots == 5
    with pytest.raises(SettingsError, match="--ways has no effect with sinusoid"):
        loaded(path, ways=2)


EVERY = ["maml", "maml++", "anil", "meta-sgd", "reptile", "transfer", "protonet", "nearest"]


@pytest.mark.parametrize("bn", ["transductive", "support"])
@pytest.mark.parametrize("algo", EVERY)
def test_the_last_step_alone_has_the_scores_of_the_whole_curve(trained, algo, bn):
    """To the bit, for tasks in other chunks too."""
    model = loaded(trained(algo), bn=bn)
    plan = EvaluationPlan(TASKS, model.inner_steps, model.statistics, model.predict)
    last, part, whole = (
        evaluate(model.derivatives, model.states, model.stream, replace(plan, curve_tasks=tasks))
        for tasks in (0, 3, TASKS)
    )
    for one, some, every in zip(
        (*last.single, last.ensemble),
        (*part.single, part.ensemble),
        (*whole.single, whole.ensemble),
        strict=True,
    ):
        assert len(one.curve_TI) == 0 and every.curve_TI.shape == (TASKS, model.inner_steps + 1)
        assert np.array_equal(every.curve_TI[:, -1], every.last_T)
        assert np.array_equal(one.last_T, every.last_T) and np.array_equal(some.last_T, every.last_T)
        assert np.array_equal(some.curve_TI, every.curve_TI[:3])


def test_scores_per_step_are_of_the_first_tasks(trained):
    path = trained("maml")
    every, _, _ = scores_of(path, per_step=True)
    some, _, summary = scores_of(path, per_step=True, per_step_tasks=3)
    none, _, _ = scores_of(path)
    model = loaded(path)
    plan = EvaluationPlan(3, model.inner_steps, model.statistics, model.predict, curve_tasks=3)
    first = evaluate(model.derivatives, model.states, model.stream, plan)
    for row, want in zip(some.rows, (first.single[0], first.ensemble), strict=True):
        assert row.per_step == pytest.approx(want.curve_TI.mean(0), abs=0)
        assert row.per_step_tasks == 3 and len(row.per_step_ci95) == len(row.per_step)
    assert summary["protocol"]["per_step_tasks"] == 3
    assert [row.per_step for row in none.rows] == [(), ()] and none.rows[0].per_step_tasks == 0
    assert every.rows[0].per_step_tasks == TASKS and every.rows[0].per_step[-1] == every.rows[0].score
    assert [row.score for row in every.rows] == [row.score for row in some.rows]
    assert [row.score for row in every.rows] == [row.score for row in none.rows]
    with pytest.raises(SettingsError, match="--per-step-tasks has no effect without --per-step"):
        loaded(path, per_step_tasks=3)


def test_curves_are_always_scored_after_every_step(trained):
    path = trained("maml", dataset="sinusoid")
    plain, asked = (
        evaluate_run(path, EvalConfig(tasks=TASKS, per_step=per_step), offline=True, on_event=ignore)
        for per_step in (False, True)
    )
    assert plain.folder == asked.folder and plain.rows[0].per_step_tasks == TASKS
    for per_step in (False, True):
        with pytest.raises(SettingsError) as raised:
            loaded(path, per_step=per_step, per_step_tasks=3)
        why = "sinusoid, which is always scored after every step, on all tasks"
        assert list(raised.value.problems) == [(f"--per-step-tasks has no effect with {why}", "leave it out")]


def test_tables_of_curves_ask_for_no_number_of_tasks_to_score_per_step(trained):
    path = trained("maml", dataset="sinusoid")
    test = with_figure(EvalConfig(tasks=2 * FIGURE_TASKS))
    table = compare([path], test, offline=True, command="mamlctl compare", on_event=ignore)
    assert table.rows[0].best.per_step_tasks == 2 * FIGURE_TASKS
    cell = GridCell(GridRow("maml", "maml", open_run(path).config), 0, path)
    words = cell_test(cell, test)
    assert "--per-step" in words and "--per-step-tasks" not in words


def test_one_model_can_be_tested_without_the_others(trained):
    path = trained("maml++")
    both, scores, _ = scores_of(path)
    for place, models in enumerate(("best", "ensemble")):
        settings = EvalConfig(tasks=TASKS, models=models)
        result = evaluate_run(path, settings, offline=True, on_event=ignore)
        assert result.rows == (both.rows[place],) and result.folder != both.folder
        assert find_evaluation(open_run(path), settings).scores.keys() == {models}
    assert len(loaded(path, models="best").states) == 1
    assert scores.shape == (TASKS, 2)


def test_a_stored_evaluation_answers_requests_for_a_part_of_it(trained):
    run, test = open_run(trained("boil")), EvalConfig(tasks=TASKS)
    some = replace(test, per_step=True, per_step_tasks=3)
    best = replace(test, models="best")

    def found(settings):
        evaluation = find_evaluation(run, settings)
        return None if evaluation is None else (evaluation.per_step_tasks, len(evaluation.scores))

    evaluate_run(run.path, best, offline=True, on_event=ignore)
    assert (found(best), found(test), found(some)) == ((0, 1), None, None)
    evaluate_run(run.path, some, offline=True, on_event=ignore)
    assert (found(test), found(some)) == ((3, 2), (3, 2))
    assert found(replace(some, per_step_tasks=4)) is None
    evaluate_run(run.path, replace(test, per_step=True), offline=True, on_event=ignore)
    assert found(some) == (3, 2) and found(replace(some, per_step_tasks=4)) == (TASKS, 2)
    evaluate_run(run.path, test, offline=True, on_event=ignore)
    assert found(test) == (0, 2)
