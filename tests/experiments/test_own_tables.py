"""Runs on the user's own table: resuming, what is left out, tests, predictions and figures."""

import csv
import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.grid_cases import filled
from helpers.own_tables import csv_text, linear_tasks, periodic_csv, periodic_tasks
from helpers.shared import ignore
from helpers.trainer_cases import comparable

from mamlctl.core.errors import DataError, ExitCode, MamlctlError, SettingsError
from mamlctl.core.events import Notice
from mamlctl.data.tasks.table_tasks import table_stream
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.training import checkpoints
from mamlctl.experiments.evaluate import evaluate_run
from mamlctl.experiments.grid.ablate import check_data
from mamlctl.experiments.grid.compare import compare
from mamlctl.experiments.grid.grid import resolve_rows
from mamlctl.experiments.grid.grid_folder import open_grid
from mamlctl.experiments.grid.plans import grid_rows
from mamlctl.experiments.plot import draw
from mamlctl.experiments.settings import resolve_settings
from mamlctl.experiments.tables import stored
from mamlctl.experiments.tables.plots import table_figure
from mamlctl.experiments.tables.predict import PredictionFiles, predict_table
from mamlctl.experiments.tables.stored import store_facts, stored_facts
from mamlctl.experiments.train import resume, train
from mamlctl.experiments.trained_model import load_trained_model
from mamlctl.run_folder import open_run
from mamlctl.settings.evaluation import EvalConfig

SMALL = {"shots": 4, "queries": 6, "hidden": "8", "epochs": 2, "steps_per_epoch": 6, "report_every": 3}
SMALL |= {"val_tasks": 12, "meta_batch_size": 4, "device": "cpu"}
TESTED = EvalConfig(tasks=16, device="cpu")


def trained(path, table, on_event=ignore, time_limit_s=None, **settings):
    config = resolve_settings([("flag", SMALL | {"dataset": str(table)} | settings)]).config
    train(config, out=path, offline=True, time_limit_s=time_limit_s, command="test", on_event=on_event)
    return path


def resumed(path, **overrides):
    resume(path, overrides, offline=True, time_limit_s=None, command="test", on_event=ignore)


def evaluated(path, settings=TESTED):
    return evaluate_run(path, settings, offline=True, on_event=ignore)


def stored_weights(path, name):
    run = open_run(path)
    return checkpoints.load(run.checkpoints / name, owner=run.owner)["stored"]


def cells(path):
    return list(csv.reader(path.read_text().splitlines()))


def texts(events):
    return [event.text for event in events if isinstance(event, Notice)]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return periodic_csv(tmp_path_factory.mktemp("tables") / "tasks.csv")


@pytest.fixture(scope="module")
def kept_run(table, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("kept") / "run", table)


@pytest.fixture
def run(kept_run, tmp_path):
    return shutil.copytree(kept_run, tmp_path / "run")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A run on a table with two inputs and two targets."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "t.csv").write_text(csv_text(*linear_tasks(20, 12)))
    return trained(folder / "run", folder / "t.csv")


def test_a_run_stores_the_tasks_and_statistics_of_its_table(kept_run, table):
    facts = stored_facts(open_run(kept_run))
    assert [len(facts.tasks[split]) for split in ("train", "val", "test")] == [26, 6, 8]
    rows = np.concatenate([periodic_tasks()[task] for task in facts.tasks["train"]])
    assert facts.standardisation.mean == pytest.approx(rows.mean(0), rel=1e-14)
    assert facts.standardisation.deviation == pytest.approx(rows.std(0), rel=1e-13)
    assert open_run(kept_run).config.dataset == str(table)


def test_validation_scores_have_the_unit_of_the_table(kept_run, tmp_path):
    """With targets in another unit the run is the same, and errors change by the square of the factor."""
    lines = [(task, x, 64 * y) for task, rows in periodic_tasks().items() for x, y in rows.tolist()]
    (tmp_path / "t.csv").write_text(csv_text(lines))
    other = trained(tmp_path / "run", tmp_path / "t.csv")
    for one, scaled in zip(open_run(kept_run).metrics(), open_run(other).metrics(), strict=True):
        if one["kind"] == "validation":
            assert scaled["val_mse"] == pytest.approx(64**2 * one["val_mse"], rel=1e-12)
            assert one["val_tasks"] == 6
        else:
            assert scaled["query_losses"] == one["query_losses"]
    ours, theirs = evaluated(kept_run), evaluated(other)
    assert theirs.rows[0].score == pytest.approx(64**2 * ours.rows[0].score, rel=1e-12)
    assert theirs.table.tasks == ours.table.tasks == 8


@pytest.mark.parametrize("engine", ["compiled", "plain"])
def test_a_stopped_run_continues_with_the_same_bits(engine, table, tmp_path):
    whole = trained(tmp_path / "whole", table, engine=engine)
    part = trained(tmp_path / "part", table, engine=engine, time_limit_s=1e-9)
    assert open_run(part).state().status == "interrupted"
    while open_run(part).state().status != "finished":
        resume(part, {}, offline=True, time_limit_s=1e-9, command="test", on_event=ignore)
    assert comparable(open_run(part)) == comparable(open_run(whole))


def test_the_order_of_rows_in_the_file_makes_no_difference(kept_run, table, tmp_path):
    head, *lines = table.read_text().splitlines()
    random.Random(1).shuffle(lines)
    (tmp_path / "tasks.csv").write_text("\n".join([head, *lines]))
    other = trained(tmp_path / "run", tmp_path / "tasks.csv")
    weights = [stored_weights(path, "last.pt") for path in (kept_run, other)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_changed_table_is_refused_by_training_and_tests(table, tmp_path):
    own = shutil.copy(table, tmp_path / "tasks.csv")
    part = trained(tmp_path / "run", own, time_limit_s=1e-9)
    text = own.read_text()
    own.write_text(text.replace("curve05,", "curve05,1", 1))
    with pytest.raises(DataError, match="has digest"):
        resumed(part)
    with pytest.raises(DataError, match="has changed since"):
        evaluated(part)
    own.write_text(text.replace("curve05", "other"))
    with pytest.raises(DataError, match="no longer has task 'curve05'"):
        resumed(part)
    own.write_text(text)
    resumed(part)
    assert open_run(part).state().status == "finished"


def test_other_statistics_than_the_stored_ones_are_refused(run):
    facts, document = stored_facts(open_run(run)), json.loads((run / "table.json").read_text())
    document["mean"][0] += 1
    (run / "table.json").write_text(json.dumps(document))
    with pytest.raises(MamlctlError, match="is missing or damaged"):
        evaluated(run)
    (run / "table.json").unlink()
    values = facts.standardisation
    other = replace(facts, standardisation=replace(values, mean=(values.mean[0] + 1, values.mean[1])))
    store_facts(open_run(run), other)
    for action in (evaluated, resumed):
        with pytest.raises(DataError, match="has other tasks or statistics"):
            action(run)
    (run / "table.json").unlink()
    resumed(run)
    assert stored_facts(open_run(run)) == facts


FORGED = [
    {"inputs": 3},
    {"mean": None},
    {"mean": ["x", "y"]},
    {"mean": [0.0]},
    {"deviation": [0.0, 1.0]},
    {"tasks": 5},
    {"tasks": {"train": [1], "val": [], "test": []}},
    {"targets": [["y"]]},
    {"targets": []},
]


@pytest.mark.parametrize("changes", FORGED, ids=str)
def test_a_forged_file_of_statistics_is_refused(changes, kept_run, tmp_path):
    shutil.copytree(kept_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    document = json.loads((tmp_path / "run" / "table.json").read_text()) | changes
    document.pop("digest")
    document["digest"] = stored._digest(document)
    (tmp_path / "run" / "table.json").write_text(json.dumps(document))
    with pytest.raises(MamlctlError, match="is missing or damaged"):
        stored_facts(open_run(tmp_path / "run"))


def test_a_moved_table_is_found_by_its_content(table, tmp_path):
    path = trained(tmp_path / "run", own := shutil.copy(table, tmp_path / "tasks.csv"), time_limit_s=1e-9)
    moved = own.rename(tmp_path / "moved.csv")
    there = replace(TESTED, dataset=str(moved))
    for action in (resumed, evaluated):
        with pytest.raises(DataError, match="is not a file"):
            action(path)
    resumed(path, dataset=str(moved))
    whole = trained(tmp_path / "whole", moved)
    assert evaluated(path, there).rows[0].score == evaluated(whole).rows[0].score
    moved.write_text(moved.read_text().replace("curve05,", "curve05,1", 1))
    with pytest.raises(SettingsError, match="differs from the table"):
        evaluated(path, there)


def incomplete(folder):
    """A table in which two rows lack a number and two tasks have too few rows."""
    lines = [[task, *row] for task, rows in periodic_tasks().items() for row in rows.tolist()]
    lines[3][2] = ""
    lines[40][1] = "NA"
    lines = [line for line in lines if line[0] not in ("curve30", "curve31")]
    lines += (
        [["curve30", x, 1.0] for x in range(9)] + [["curve31", x, 1.0] for x in range(10)] + [["tiny", 1, 1]]
    )
    (folder / "t.csv").write_text(csv_text(lines))
    return folder / "t.csv"


def test_incomplete_rows_and_small_tasks_are_named_and_left_out(tmp_path):
    events = []
    path = trained(tmp_path / "run", incomplete(tmp_path), on_event=events.append)
    rows, tasks, counts = texts(events)
    assert rows.startswith("left out: 2 rows of ") and "line 5 (task curve00, no y)" in rows
    assert tasks == (
        "left out: 2 tasks with fewer than 10 complete rows (--shots plus --queries): curve30 (9), tiny (1)"
    )
    assert counts == "tasks: 25 train / 6 val / 8 test"
    assert "tiny" not in sum(stored_facts(open_run(path)).tasks.values(), ())
    # A test with larger tasks keeps the split, and leaves out what is too small for it.
    larger = EvalConfig(tasks=16, shots=20, split="train", device="cpu")
    split = stored_facts(open_run(path)).tasks["train"]
    model = load_trained_model(path, larger, offline=True, on_event=ignore)
    assert set(table_stream(model.stream).names) < set(split)


@pytest.mark.parametrize("what", ["rows", "tasks"])
def test_strict_refuses_what_would_be_left_out(what, tmp_path):
    table = incomplete(tmp_path)
    if what == "tasks":
        text = table.read_text().splitlines()
        table.write_text("\n".join(line for line in text if not line.endswith(",") and ",NA," not in line))
    fact = (
        "2 rows of .* with missing numbers" if what == "rows" else "2 tasks with fewer than 10 complete rows"
    )
    with pytest.raises(DataError, match=f"--strict refuses {fact}"):
        trained(tmp_path / "run", table, strict=True)
    assert not (tmp_path / "run").exists()


def test_tables_that_are_too_small_or_divided_twice_are_refused(table, tmp_path):
    with pytest.raises(SettingsError, match="no task in 'train' with 104 complete rows"):
        trained(tmp_path / "run", table, queries=100)
    with pytest.raises(SettingsError, match="no task in 'val'") as raised:
        trained(tmp_path / "run", periodic_csv(tmp_path / "few.csv", tasks=1))
    assert "other --split-fractions than 64-16-20" in raised.value.hint
    lines = [(f"t{n}", split, x, x) for n, split in enumerate(("train", "val", "test")) for x in range(12)]
    (tmp_path / "s.csv").write_text(csv_text(lines, ("task", "split", "x", "y")))
    with pytest.raises(SettingsError, match="has a column split"):
        trained(tmp_path / "run", tmp_path / "s.csv", split_fractions="50-25-25")
    (tmp_path / "v.csv").write_text(
        csv_text([line for line in lines if line[1] != "val"], ("task", "split", "x", "y"))
    )
    with pytest.raises(SettingsError, match="no task in 'val'") as raised:
        trained(tmp_path / "run", tmp_path / "v.csv")
    assert raised.value.hint.startswith("add tasks with val in the column split, or")
    path = trained(tmp_path / "run", tmp_path / "s.csv")
    assert stored_facts(open_run(path)).tasks == {"train": ("t0",), "val": ("t1",), "test": ("t2",)}


def test_a_table_without_tasks_for_tests_is_noticed_at_the_start(tmp_path):
    events = []
    trained(tmp_path / "run", periodic_csv(tmp_path / "few.csv", tasks=2), on_event=events.append)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert any("few.csv has no task in 'test'" in text for text in notices)


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"ways": 5}, "--ways has no meaning"),
        ({"net": "conv4"}, "--net conv4 needs images, but"),
        ({"algo": "protonet"}, "--algo protonet needs classes, but"),
        ({"split_fractions": "1-2"}, "--split-fractions"),
        (
            {"dataset": "omniglot", "inputs": "x", "queries": 1},
            "--inputs has no meaning: omniglot has no columns",
        ),
        ({"dataset": "sinusoid", "targets": "y"}, "--targets has no meaning: sinusoid has no columns"),
    ],
)
def test_settings_without_meaning_are_refused(settings, fact, table):
    with pytest.raises(SettingsError) as caught:
        resolve_settings([("flag", {"dataset": str(table), **settings})])
    assert fact in str(caught.value)


def test_an_evaluation_says_how_many_different_tasks_it_had(run):
    result = evaluated(run)
    summary = json.loads((next((run / "eval").glob("test-*")) / "summary.json").read_text())
    assert summary["protocol"]["tasks"] == 16 and summary["protocol"]["table"]["tasks"] == 8
    scores = cells(next((run / "eval").glob("test-*")) / "tasks.csv")
    assert len(scores) == 1 + 8
    assert result.rows[0].score == pytest.approx(np.mean([float(row[1]) for row in scores[1:]]), rel=1e-4)
    assert "16 draws of rows from the 8 test tasks" in result.notes[0]
    assert result.table.errors["best"][0].mse == pytest.approx(result.rows[0].score)


def test_several_targets_are_scored_together_and_each_in_its_unit(several):
    result = evaluated(several)
    variances = stored_facts(open_run(several)).standardisation.variances
    errors = result.table.errors["best"]
    assert [error.target for error in errors] == ["y1", "y2"] and result.table.standardised
    parts = [error.mse / variance for error, variance in zip(errors, variances, strict=True)]
    assert result.rows[0].score == pytest.approx(np.mean(parts), rel=1e-12)
    assert errors[1].mse > 20 * errors[0].mse  # y2 has ten times the unit of y1


def test_runs_are_compared_over_different_tasks(kept_run, table, tmp_path):
    other = trained(tmp_path / "transfer", table, algo="transfer")
    result = compare([kept_run, other], TESTED, offline=True, command="test", on_event=ignore)
    assert [row.label for row in result.rows] == ["maml", "transfer"]
    assert result.rows[1].best.difference.tasks == result.tasks == 8
    assert any("8 test tasks of the table" in note for note in result.notes)


@pytest.mark.process
def test_a_grid_on_a_table_is_trained_and_tested(table, tmp_path):
    own = shutil.copy(table, tmp_path / "tasks.csv")
    settings = SMALL | {"dataset": str(own)}
    rows = resolve_rows(grid_rows(["algo=maml,scratch"]), [], settings, 0)
    grid = open_grid(tmp_path / "grid", "grid", rows, (0, 1), EvalConfig(tasks=16), "mamlctl ablate")
    check_data(grid, offline=True, on_event=ignore)
    result = filled(grid)
    assert not result.failed and result.left == 0 and result.table.tasks == 8
    assert [row.label for row in result.table.rows] == ["maml", "scratch"]
    assert result.table.rows[1].best.difference.seeds == 2
    own.write_text(own.read_text().replace("curve05,", "curve05,1", 1))
    with pytest.raises(DataError, match="was trained on"):
        check_data(grid, offline=True, on_event=ignore)


@pytest.fixture
def new_task(tmp_path):
    rows = periodic_tasks(1, seed=99)["curve00"].tolist()
    (tmp_path / "a.csv").write_text(csv_text(rows[:5], ("x", "y")))
    (tmp_path / "b.csv").write_text(csv_text(rows[5:12], ("x", "y")))
    (tmp_path / "c.csv").write_text(csv_text([row[:1] for row in rows[5:12]], ("x",)))
    return tmp_path


def test_predictions_for_a_new_task_are_those_of_plain_gradient_steps(new_task, table, tmp_path):
    run = trained(tmp_path / "run", own := shutil.copy(table, tmp_path / "tasks.csv"))
    own.unlink()  # the training data are not needed
    files = PredictionFiles(new_task / "a.csv", new_task / "b.csv", new_task / "out.csv")
    result = predict_table(run, EvalConfig(device="cpu", inner_steps=3), files, on_event=ignore)
    values = stored_facts(open_run(run)).standardisation
    (mean_x, mean_y), (scale_x, scale_y) = values.mean, values.deviation
    (x, y), (query_x, query_y) = (
        np.array(cells(new_task / name)[1:], float).T for name in ("a.csv", "b.csv")
    )
    stored = stored_weights(run, "best.pt")
    names = ("hidden1.weight", "hidden1.bias", "linear.weight", "linear.bias")
    weights = [stored[name].double().requires_grad_() for name in names]

    def net(x, weights):
        hidden = torch.relu(x[:, None] @ weights[0].T + weights[1])
        return (hidden @ weights[2].T + weights[3])[:, 0]

    def scaled(values, mean, scale):
        return torch.from_numpy((values - mean) / scale)

    for _ in range(3):
        loss = (net(scaled(x, mean_x, scale_x), weights) - scaled(y, mean_y, scale_y)).square().mean()
        grads = torch.autograd.grad(loss, weights)
        weights = [weight - 0.01 * grad for weight, grad in zip(weights, grads, strict=True)]
    expected = net(scaled(query_x, mean_x, scale_x), weights).detach().numpy() * scale_y + mean_y
    predicted = np.array(result.predicted)[:, 0]
    assert np.allclose(predicted, expected, rtol=1e-5)
    assert result.mse[0] == pytest.approx(np.square(predicted - query_y).mean())
    written = cells(new_task / "out.csv")
    assert written[0] == ["x", "y", "predicted y"]
    assert np.array_equal(np.array(written[1:], float)[:, 2], predicted)


def test_predictions_without_known_targets_have_no_error(run, new_task, cli):
    support, query = new_task / "a.csv", new_task / "c.csv"
    words = ["eval", run, "--support", support, "--query", query, "--device", "cpu"]
    code, out, _ = cli(*words, "--json")
    document = json.loads(out)
    assert code == ExitCode.OK and document["mse"] is None and len(document["predictions"]) == 7
    with_truth = cli(*words[:-3], new_task / "b.csv", "--device", "cpu", "--json")[1]
    rows = json.loads(with_truth)["predictions"]
    assert [row["predicted"] for row in rows] == [row["predicted"] for row in document["predictions"]]
    code, out, _ = cli(*words, "--plot")
    assert code == ExitCode.OK and "predicted y" in out and "true" not in out
    assert (run / "plots" / "own-task.svg").is_file()


def test_several_targets_of_a_new_task_are_predicted(several, tmp_path):
    lines, heads = linear_tasks(1, 8, seed=50)
    (tmp_path / "a.csv").write_text(csv_text([row[1:] for row in lines], heads[1:]))
    files = PredictionFiles(tmp_path / "a.csv", tmp_path / "a.csv")
    result = predict_table(several, EvalConfig(device="cpu"), files, on_event=ignore)
    assert result.targets == ("y1", "y2") and len(result.mse) == 2
    errors = np.square(np.array(result.predicted) - np.array(result.truth)).mean(0)
    assert result.mse == pytest.approx(errors)


@pytest.mark.parametrize("algo", [name for name, entry in ALGORITHMS.items() if entry.on_curves is not None])
def test_every_algorithm_predicts_a_drawn_task_as_the_test_does(algo, several, tmp_path):
    """The rows of a test draw, written to files, get the predictions that the test scores."""
    settings = {"steps_per_epoch": 2, "epochs": 1, "report_every": 1}
    settings = {} if algo == "scratch" else settings
    settings |= {"reptile": {"train_shots": 4}, "maml++": {"inner_steps": 2}}.get(algo, {})
    table = open_run(several).config.dataset
    config = resolve_settings(
        [("preset", SMALL | {"dataset": table}), ("flag", settings | {"algo": algo})]
    ).config
    train(config, out=tmp_path / "run", offline=True, time_limit_s=None, command="test", on_event=ignore)
    model = load_trained_model(tmp_path / "run", TESTED, offline=True, on_event=ignore)
    stream = table_stream(model.stream)
    rows = stream.table.values_MC[stream.rows_of(5, 1)[0]].tolist()
    for name, part in (("a.csv", rows[: stream.shots]), ("b.csv", rows[stream.shots :])):
        (tmp_path / name).write_text(csv_text(part, ("x1", "x2", "y1", "y2")))
    files = PredictionFiles(tmp_path / "a.csv", tmp_path / "b.csv")
    result = predict_table(tmp_path / "run", EvalConfig(device="cpu"), files, on_event=ignore)
    outputs_MN = model.outputs(model.stream.episodes(5, 1), model.inner_steps)[-1, 0].double().numpy()
    if algo != "reptile":  # whose mini-batches are drawn for each task
        assert np.allclose(result.predicted, stream.standardisation.targets_of(outputs_MN), rtol=1e-5)
    assert np.isfinite(result.predicted).all() and len(result.predicted) == stream.queries


@pytest.mark.parametrize(
    ("more", "fact", "code"),
    [
        (["--support", "c.csv", "--query", "b.csv"], "c.csv has no column 'y'", ExitCode.DATA),
        (["--support", "a.csv"], "--support has no effect alone", ExitCode.USAGE),
        (["--support", "a.csv", "--query", "b.csv", "b.csv"], "--query names 2 tables", ExitCode.USAGE),
        (["--support", "a.csv", "--query", "gone.csv"], "there is no gone.csv", ExitCode.DATA),
        (
            ["--support", "a.csv", "--query", "b.csv", "--save-adapted", "w.pt"],
            "--save-adapted has no",
            ExitCode.USAGE,
        ),
        (["--support", "a.csv", "--query", "b.csv", "--tasks", "5"], "--tasks has no effect", ExitCode.USAGE),
        (["--disjoint"], "--disjoint is for images", ExitCode.USAGE),
        (
            ["--dataset", "sinusoid"],
            "sinusoid has curves, but the run was trained on a table",
            ExitCode.USAGE,
        ),
    ],
)
def test_wrong_requests_are_refused_in_two_lines(more, fact, code, run, new_task, cli, monkeypatch):
    monkeypatch.chdir(new_task)
    ended, _, err = cli("eval", run, "--device", "cpu", *more)
    assert ended == code and fact in err and "Traceback" not in err


def test_figures_show_the_rows_of_the_table_and_the_predictions(run, table, tmp_path):
    other = trained(tmp_path / "transfer", table, algo="transfer")
    pictures, reason = draw(run, TESTED, [other], offline=True, on_event=ignore)
    assert reason == "" and {path.name for path in pictures} >= {
        "regression.png",
        "regression.svg",
        "training.png",
    }
    models = [load_trained_model(path, TESTED, offline=True, on_event=ignore) for path in (run, other)]
    figure = table_figure(models, "title")
    axes = figure.axes
    assert len(axes) == 6  # three tasks and two runs
    stream = table_stream(models[0].stream)
    rows = stream.table.values_MC[stream.rows_of(1, 1)[0]]
    lines = {line.get_label(): line for line in axes[2].lines}
    assert np.allclose(lines["support set"].get_xydata(), rows[:4], rtol=1e-5)
    assert np.allclose(lines["query set"].get_xydata(), rows[4:], rtol=1e-5)
    x, y = lines["after adaptation"].get_data()
    assert x.min() < rows[:, 0].min() and x.max() > rows[:, 0].max() and np.isfinite(y).all()


def test_figures_of_several_inputs_compare_predictions_with_true_values(several):
    pictures, _ = draw(several, TESTED, [], offline=True, on_event=ignore)
    assert "regression.png" in {path.name for path in pictures}
    model = load_trained_model(several, TESTED, offline=True, on_event=ignore)
    figure = table_figure([model], "title")
    assert len(figure.axes) == 2
    stream = table_stream(model.stream)
    rows = stream.table.values_MC[stream.rows_of(0, len(stream.names))[:, 4:]].reshape(-1, 4)
    for target, ax in enumerate(figure.axes):
        points = {line.get_label(): line for line in ax.lines}["after adaptation"]
        assert np.allclose(points.get_xdata(), rows[:, 2 + target], rtol=1e-5)
        assert ax.get_xlabel() == f"true y{target + 1}"
