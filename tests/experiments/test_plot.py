"""Tests of the figures of `eval --plot`, which must show the predictions of the run."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.shared import ignore
from PIL import Image

from mamlctl.core.errors import ExitCode, SettingsError
from mamlctl.data.sets.curves import FAMILIES
from mamlctl.experiments.evaluate import evaluate_run
from mamlctl.experiments.plot import POINTS, STEPS, _panels, _task_pictures, draw
from mamlctl.experiments.settings import fill_defaults, resolve_settings
from mamlctl.experiments.train import train
from mamlctl.experiments.trained_model import load_trained_model
from mamlctl.run_folder import open_run
from mamlctl.settings.evaluation import EvalConfig

SHORT = {"epochs": 1, "steps_per_epoch": 30, "val_tasks": 20}


def trained(path, **settings):
    config = resolve_settings([("flag", SHORT | settings)]).config
    train(config, out=path, offline=True, time_limit_s=None, command="test", on_event=ignore)
    return path


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("curves") / "run", dataset="sinusoid", shots=5, report_every=10)


def test_drawn_curves_are_predictions_of_the_adapted_weights(curves):
    """Compare the drawn curve after one step with an explicit gradient step on the stored weights."""
    model = load_trained_model(curves, EvalConfig(), offline=True, on_event=ignore)
    row = _panels([model])[0]
    assert [panel.title for panel in row] == ["meta-learnt (maml)", "random start"]
    panel, state = row[0], model.states[0]
    episodes = model.stream.episodes(0, 1)
    assert np.allclose(panel.support_x, episodes.support_x_TECHW.flatten())
    assert panel.x.shape == (POINTS,) and [curve.steps for curve in panel.curves] == list(STEPS)
    uniform = FAMILIES["sinusoid"]
    assert np.ptp(panel.truth) > 0 and (panel.x[0], panel.x[-1]) == uniform.window

    def net(weights, x):
        f = x.unsqueeze(1)
        for layer in (1, 2):
            f = torch.relu(f @ weights[f"hidden{layer}.weight"].T + weights[f"hidden{layer}.bias"])
        return (f @ weights["linear.weight"].T + weights["linear.bias"])[:, 0]

    weights = {name: tensor.clone().requires_grad_() for name, tensor in state.slow.items()}
    x = torch.from_numpy(panel.x).float()
    assert np.allclose(panel.curves[0].y, net(weights, x).detach(), atol=1e-5)
    loss = (net(weights, episodes.support_x_TECHW[0, :, 0]) - episodes.support_y_TE[0]).square().mean()
    grads = torch.autograd.grad(loss, list(weights.values()))
    moved = {name: weights[name] - 0.01 * grad for name, grad in zip(weights, grads, strict=True)}
    assert np.allclose(panel.curves[1].y, net(moved, x).detach(), atol=1e-5)
    for curve in panel.curves:
        assert curve.mse == pytest.approx(((curve.y - panel.truth) ** 2).mean())


@pytest.mark.render
def test_a_run_on_curves_gets_figures_and_a_start_that_is_pre_trained_once(curves):
    files, _ = draw(curves, EvalConfig(), [], offline=True, on_event=ignore)
    assert {file.name for file in files} == {
        f"{stem}.{kind}" for stem in ("regression", "training") for kind in ("png", "svg")
    }
    for file in files:
        if file.suffix == ".png":
            with Image.open(file) as picture:
                assert picture.width > 800
    start = open_run(curves / "plots" / "pretrained")
    assert start.config.algo == "transfer" and start.config.total_steps == 30
    assert start.state().status == "finished"
    before = (start.path / "status.json").stat().st_mtime_ns
    draw(curves, EvalConfig(), [], offline=True, on_event=ignore)
    assert (start.path / "status.json").stat().st_mtime_ns == before


def test_a_stopped_pre_training_still_prints_the_evaluation(curves, tmp_path, monkeypatch, cli):
    run = shutil.copytree(curves, tmp_path / "run", ignore=shutil.ignore_patterns("plots"))
    monkeypatch.setattr("mamlctl.experiments.plot.train", lambda *_, **__: SimpleNamespace(reason="SIGTERM"))
    code, out, _ = cli("eval", run, "--tasks", 4, "--plot", "--json", "--quiet")
    document = json.loads(out)
    assert code == ExitCode.TERMINATED
    assert document["results"] and document["pictures"] == []


def test_an_evaluation_of_curves_has_mean_squared_errors(curves):
    found = evaluate_run(curves, EvalConfig(tasks=30, queries=50), offline=True, on_event=ignore)
    row = found.rows[0]
    assert (row.metric, row.ways, row.inner_steps, row.bn) == ("mse", 1, 10, "none")
    document = json.loads((curves / "eval").glob("*/summary.json").__next__().read_text())
    assert document["results"][0]["mse"] == pytest.approx(row.score)
    assert "accuracy" not in document["results"][0]
    config = fill_defaults(open_run(curves).config)
    assert config.algo == "maml"  # the default for curves
    validations = [entry for entry in open_run(curves).metrics() if entry["kind"] == "validation"]
    assert validations[0]["val_mse"] > 0


@pytest.mark.render
def test_drawn_images_have_the_predictions_of_the_evaluation(tmp_path, glyphs_root):
    path = trained(
        tmp_path / "run",
        dataset="glyphs",
        algo="meta-sgd",
        filters=8,
        queries=3,
        steps_per_epoch=4,
        data_root=str(glyphs_root),
    )
    model = load_trained_model(path, EvalConfig(), offline=True, on_event=ignore)
    pictures = _task_pictures(model)
    found = evaluate_run(path, EvalConfig(tasks=3), offline=True, on_event=ignore)
    right = np.mean([(picture.query_y_M == picture.predicted_M).mean() for picture in pictures])
    assert right == pytest.approx(found.rows[0].score)
    support = pictures[0].support_NKCHW
    assert support.shape == (5, 1, 1, 28, 28)
    assert (support == 1).mean() > 0.5  # white paper, dark ink
    files, _ = draw(path, EvalConfig(), [], offline=True, on_event=ignore)
    assert {"tasks.png", "training.svg", "rates.png"} <= {file.name for file in files}


@pytest.mark.render
def test_other_runs_are_drawn_on_the_first_runs_tasks(curves, tmp_path):
    """Reptile with its own mini-batches and a pre-trained run have the same true curves and examples."""
    small = {"dataset": "sinusoid", "shots": 5}
    reptile = trained(tmp_path / "reptile", algo="reptile", queries=10, steps_per_epoch=4, **small)
    transfer = trained(tmp_path / "transfer", algo="transfer", seed=3, steps_per_epoch=4, **small)
    opened = [
        load_trained_model(path, EvalConfig(), offline=True, on_event=ignore)
        for path in (curves, reptile, transfer)
    ]
    for row in _panels(opened):
        titles = [panel.title for panel in row]
        assert titles == [
            "meta-learnt (maml)",
            "meta-learnt (reptile)",
            "pre-trained (transfer)",
            "random start",
        ]
        for panel in row[1:]:
            assert np.array_equal(panel.truth, row[0].truth)
            assert np.array_equal(panel.support_x, row[0].support_x)
            assert np.isfinite([curve.mse for curve in panel.curves]).all()
    files, reason = draw(curves, EvalConfig(), [transfer], offline=True, on_event=ignore)
    assert files and reason == ""


def test_runs_on_other_data_are_refused(curves, tmp_path):
    other = trained(tmp_path / "line", dataset="line", shots=5, steps_per_epoch=2)
    with pytest.raises(SettingsError, match="has curves of line, but this run of sinusoid"):
        draw(curves, EvalConfig(), [other], offline=True, on_event=ignore)
