"""`train --log tensorboard`, read back by TensorBoard's own reader and compared with metrics.jsonl."""

import importlib.util
import json
from dataclasses import asdict

import numpy as np
import pytest
from helpers.grid_cases import TINY
from helpers.shared import ignore
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mamlctl.core.events import MetaStepDone, Progress
from mamlctl.display.logs.tensorboard import TensorBoardLog, scalars
from mamlctl.experiments.settings import fill_defaults, resolve_settings
from mamlctl.experiments.train import resume, train
from mamlctl.run_folder import open_run

LEARNT = TINY | {"algo": "maml++", "report_every": 2}
SPEED = ("report/tasks_per_second", "report/memory_bytes")  # which differ between equal runs


def trained(out, listen=ignore, logged=True, base=LEARNT, **settings):
    """Train a run of six meta-steps, with the log if `logged`."""
    config = resolve_settings([("flag", base | settings)]).config
    how = {"offline": True, "time_limit_s": None, "command": ""}
    if not logged:
        train(config, out=out, on_event=listen, **how)
        return
    with TensorBoardLog(fill_defaults, listen) as log:
        train(config, out=out, on_event=log, **how)


def resumed(out):
    with TensorBoardLog(fill_defaults, ignore) as log:
        resume(out, {}, offline=True, time_limit_s=None, command="", on_event=log)


def read(run):
    """What TensorBoard shows of a run."""
    shown = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    shown.Reload()
    return shown


def shown_scalars(run):
    shown = read(run)
    return {
        name: [(each.step, each.value) for each in shown.Scalars(name)] for name in shown.Tags()["scalars"]
    }


def stored_scalars(run):
    """The same from metrics.jsonl, whose rows are read here without the code under test."""
    stored = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kind, step = row.pop("kind"), row.pop("step")
        del row["epoch"]
        for key, value in row.items():
            named = {f"{kind}/{key}": value}
            if key in ("query_losses", "query_accuracies"):
                named = {f"{key}/{place}": part for place, part in enumerate(value)}
            elif key == "msl_weights":
                named = {f"{key}/{place + 1}": part for place, part in enumerate(value)}
            elif key == "rates":
                named = {
                    f"{key}/{tensor}/{place + 1}": rate
                    for tensor, rates in value.items()
                    for place, rate in enumerate(rates)
                }
            for name, number in named.items():
                if isinstance(number, bool | int | float):
                    stored.setdefault(name, []).append((step, number))
    return stored


def assert_same(shown, stored):
    """The same names, steps and values, which TensorBoard stores in float32."""
    assert shown.keys() == stored.keys()
    for name, entries in stored.items():
        assert [step for step, _ in shown[name]] == [step for step, _ in entries], name
        np.testing.assert_allclose([value for _, value in shown[name]], [value for _, value in entries], 1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, glyphs_root):
    """A run that was logged from its start to its end."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    trained(run, data_root=str(glyphs_root))
    return run


def test_scalars_are_those_of_metrics_jsonl(whole):
    shown = shown_scalars(whole)
    assert_same(shown, stored_scalars(whole))
    assert [step for step, _ in shown["query_losses/2"]] == [1, 2, 3, 4, 6]
    assert [step for step, _ in shown["validation/val_accuracy"]] == [3, 6]
    assert {"rates/conv1.weight/1", "rates/linear.bias/2", "report/meta_lr", "report/query_accuracy"} < {
        *shown
    }


def test_settings_and_pictures_are_logged(whole):
    shown = read(whole)
    metadata = shown.SummaryMetadata("_hparams_/session_start_info")
    info = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info
    hparams = info.hparams
    assert info.group_name == "whole"
    logged = {name: getattr(value, value.WhichOneof("kind")) for name, value in hparams.items()}
    settings = asdict(fill_defaults(open_run(whole).config))
    assert logged == {name: value for name, value in settings.items() if value is not None}
    assert logged["da_epochs"] == 1, "derived settings too"
    for name in ("training", "rates"):
        (picture,) = shown.Images(name)
        assert (picture.step, picture.encoded_image_string[:4]) == (6, b"\x89PNG")
        assert picture.width > picture.height > 100


def crash(found):
    """A listener that ends the run at an event, as a crash would."""

    def listen(event):
        if found(event):
            raise KeyboardInterrupt

    return listen


@pytest.mark.parametrize(
    "found",
    [
        lambda event: isinstance(event, MetaStepDone) and event.step == 5,
        lambda event: isinstance(event, Progress) and event.what == "validating",
        lambda event: isinstance(event, MetaStepDone) and event.step == 1,
    ],
    ids=["between checkpoints", "in a validation", "before the first checkpoint"],
)
def test_a_resumed_run_has_every_step_once(whole, tmp_path, glyphs_root, found):
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trained(run, crash(found), data_root=str(glyphs_root))
    resumed(run)
    assert len([*(run / "tensorboard").iterdir()]) == 2
    shown = shown_scalars(run)
    assert_same(shown, stored_scalars(run))
    expected = shown_scalars(whole)
    assert {name: each for name, each in shown.items() if name not in SPEED} == {
        name: each for name, each in expected.items() if name not in SPEED
    }
    assert [picture.step for picture in read(run).Images("training")] == [6]


def test_a_run_that_was_trained_without_a_log_is_logged_when_it_is_resumed(tmp_path, glyphs_root):
    run = tmp_path / "run"
    trained(run, logged=False, data_root=str(glyphs_root))
    assert not (run / "tensorboard").exists()
    for _ in range(2):  # the second time repeats the last step
        resumed(run)
        assert_same(shown_scalars(run), stored_scalars(run))


def test_runs_are_side_by_side_and_curves_have_errors(whole, tmp_path):
    of_curves = {key: value for key, value in LEARNT.items() if key not in ("ways", "filters")}
    trained(whole.parent / "curves", base=of_curves, dataset="sinusoid", algo="maml", engine="adjoint")
    shown = EventMultiplexer().AddRunsFromDirectory(str(whole.parent)).Reload()
    assert {*shown.Runs()} == {"whole/tensorboard", "curves/tensorboard"}
    assert [each.step for each in shown.Scalars("curves/tensorboard", "validation/val_mse")] == [3, 6]
    assert_same(shown_scalars(whole.parent / "curves"), stored_scalars(whole.parent / "curves"))
    assert not any(name.startswith("query_accuracies") for name in shown_scalars(whole.parent / "curves"))


def test_numbers_that_are_not_finite_and_missing_ones():
    row = {"kind": "report", "step": 3, "epoch": 0, "support_loss": None, "query_losses": [float("nan"), 0.5]}
    (first, nan), second = scalars(row)
    assert (first, second) == ("query_losses/0", ("query_losses/1", 0.5))
    assert np.isnan(nan)


@pytest.mark.parametrize(
    ("name", "installed", "code", "lines"),
    [
        ("tensorboard", False, 1, ["tensorboard is not installed", "pip install 'mamlctl[tensorboard]'"]),
        ("wandb", True, 2, ["--log is 'wandb', which is not a kind of log", "use tensorboard"]),
    ],
)
def test_a_log_that_cannot_be_written_is_refused_before_any_work(
    name, installed, code, lines, tmp_path, monkeypatch, cli
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: find(module) if installed else None)
    left, _, err = cli("train", "--dataset", "glyphs", "--log", name, "--out", tmp_path / "run")
    assert left == code
    assert err.splitlines() == [f"error: {lines[0]}", f"hint:  {lines[1]}"]
    assert not (tmp_path / "run").exists()
