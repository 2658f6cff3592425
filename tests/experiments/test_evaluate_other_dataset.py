"""Tests of runs on other data than those of their training, which are converted or refused."""

import itertools
import json

import numpy as np
import pytest
from helpers.shared import ignore
from PIL import Image

from mamlctl.core.errors import SettingsError
from mamlctl.data.reading.packs import load_pack, packs_of
from mamlctl.data.sets import glyphs
from mamlctl.experiments.evaluate import evaluate_run
from mamlctl.experiments.settings import resolve_settings
from mamlctl.experiments.train import train
from mamlctl.experiments.trained_model import load_trained_model
from mamlctl.settings.evaluation import EvalConfig


def trained(path, root, **settings):
    flags = {
        "epochs": 1,
        "steps_per_epoch": 2,
        "val_tasks": 4,
        "filters": 4,
        "ways": 3,
        "data_root": str(root),
    }
    config = resolve_settings([("flag", flags | settings)]).config
    train(config, out=path, offline=True, time_limit_s=None, command="test", on_event=ignore)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data root with glyphs."""
    root = tmp_path_factory.mktemp("root")
    glyphs.open_pack(root, on_event=ignore)
    return root


@pytest.fixture(scope="module")
def mine(tmp_path_factory, root):
    """Ten classes of glyphs as 40x40 colour files with black ink."""
    path = tmp_path_factory.mktemp("mine")
    packed = load_pack(packs_of(root / "glyphs")[0], "glyphs")
    for number in range(10):
        (path / packed.names[number]).mkdir()
        for image in range(4):
            picture = Image.fromarray(packed.images_MCHW[packed.starts[number] + image, 0]).resize((40, 40))
            picture.convert("RGB").save(path / packed.names[number] / f"{image}.png")
    return path


@pytest.fixture(scope="module")
def grey(tmp_path_factory, root):
    """A run on grey glyphs."""
    return trained(tmp_path_factory.mktemp("grey") / "run", root, dataset="glyphs")


@pytest.fixture(scope="module")
def colour(tmp_path_factory, root, mine):
    """A run on 20x20 colour images."""
    path = tmp_path_factory.mktemp("colour") / "run"
    return trained(path, root, dataset=str(mine), image_size=20, split_fractions="1-1-1", bn="support")


def test_images_of_a_folder_are_converted_to_the_runs_shape(grey, mine):
    settings = EvalConfig(dataset=str(mine), split="train", tasks=5)
    model = load_trained_model(grey, settings, offline=True, on_event=ignore)
    assert model.source.example_shape == (1, 28, 28) and model.config.ink == 1
    x = model.stream.episodes(0, 2).support_x_TECHW
    assert x.shape == (2, 3, 1, 28, 28)
    assert x.mean() < 0.4  # ink is 1, as in training, and covers less than the paper
    found = evaluate_run(grey, settings, offline=True, on_event=ignore)
    assert found.dataset == str(mine)
    note = f"trained on glyphs, tested on {mine}, with images resized to 28x28 pixels"
    assert found.notes == (note,)
    (summary,) = (grey / "eval").glob("train-*/summary.json")
    assert json.loads(summary.read_text())["notes"] == [note]


def test_grey_images_are_copied_to_three_colours(colour):
    model = load_trained_model(colour, EvalConfig(dataset="glyphs", tasks=5), offline=True, on_event=ignore)
    x = model.stream.episodes(0, 2).support_x_TECHW
    assert x.shape == (2, 3, 3, 20, 20) and (x[:, :, 0] == x[:, :, 1]).all()
    converted = "with images resized to 20x20 pixels, with grey copied to three colours"
    assert model.notes[0].endswith(f"tested on glyphs, {converted}")
    assert model.config.split_scheme == "own"


def test_the_run_stores_the_split_of_its_folder(colour):
    stored = json.loads((colour / "classes.json").read_text())
    model = load_trained_model(colour, EvalConfig(), offline=True, on_event=ignore)
    assert stored == model.source.names
    assert {split: len(names) for split, names in stored.items()} == {"train": 3, "val": 4, "test": 3}
    assert len(set(itertools.chain(*stored.values()))) == 10


def test_the_training_data_set_needs_no_note(grey):
    assert load_trained_model(grey, EvalConfig(), offline=True, on_event=ignore).notes == ()


@pytest.mark.parametrize(
    ("dataset", "fact"),
    [
        ("mini-imagenet", "mini-imagenet has colour images, but the run was trained on grey ones"),
        ("sinusoid", "sinusoid has curves, but the run was trained on images"),
        ("glyps", "unknown data set 'glyps'"),
    ],
)
def test_data_that_do_not_fit_the_network_are_refused(grey, dataset, fact):
    with pytest.raises(SettingsError) as raised:
        load_trained_model(grey, EvalConfig(dataset=dataset), offline=True, on_event=ignore)
    assert [problem for problem, _ in raised.value.problems] == [fact]


def test_a_run_on_curves_is_tested_on_other_curves(tmp_path, root):
    flags = {"epochs": 1, "steps_per_epoch": 3, "val_tasks": 4, "dataset": "sinusoid"}
    config = resolve_settings([("flag", flags)]).config
    train(config, out=tmp_path / "run", offline=True, time_limit_s=None, command="test", on_event=ignore)
    found = evaluate_run(tmp_path / "run", EvalConfig(dataset="line", tasks=4), offline=True, on_event=ignore)
    assert found.notes == ("trained on sinusoid, tested on line",) and np.isfinite(found.rows[0].score)


def test_a_run_on_a_folder_works_from_another_working_directory(colour, monkeypatch, tmp_path, mine):
    monkeypatch.chdir(tmp_path)
    found = evaluate_run(colour, EvalConfig(tasks=4), offline=True, on_event=ignore)
    assert found.rows[0].bn == "support" and found.dataset == str(mine)
