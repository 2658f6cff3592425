"""Runs on a folder of images: what they print about its classes, and what happens after it has moved."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.shared import ignore
from PIL import Image

from mamlctl.core.errors import DataError, MamlctlError, SettingsError
from mamlctl.core.events import Notice, Progress
from mamlctl.experiments import training_images
from mamlctl.experiments.evaluate import evaluate_run
from mamlctl.experiments.settings import resolve_settings
from mamlctl.experiments.train import resume, train
from mamlctl.experiments.trained_model import load_trained_model
from mamlctl.run_folder import open_run
from mamlctl.settings.evaluation import EvalConfig


def photos(path, names, images=3, shift=0):
    """Class folders of small images, each filled with noise that depends on its name and number."""
    for name in names:
        (path / name).mkdir(parents=True)
        for image in range(images):
            noise = np.random.default_rng([*name.encode(), image, shift]).integers(0, 256, (8, 8))
            Image.fromarray(noise.astype(np.uint8)).save(path / name / f"{image}.png")
    return path


def trained(path, folder, root, notices=None, time_limit_s=None, **settings):
    flags = {"dataset": str(folder), "image_size": 8, "channels": 1, "net": "mlp", "hidden": "4"}
    flags |= {"epochs": 2, "steps_per_epoch": 2, "val_tasks": 4, "ways": 2, "data_root": str(root)}
    config = resolve_settings([("flag", flags | {"algo": "maml"} | settings)]).config
    on_event = ignore if notices is None else lambda event: notices.append(event)
    train(config, out=path, offline=True, time_limit_s=time_limit_s, command="test", on_event=on_event)
    return path


def texts(events):
    return [event.text for event in events if isinstance(event, Notice)]


def test_a_refused_run_leaves_no_folder(tmp_path):
    folder = photos(tmp_path / "p", [f"c{number:02d}" for number in range(20)])
    with pytest.raises(SettingsError, match="too small"):
        trained(tmp_path / "run", folder, tmp_path / "root", net="conv4", hidden=None)
    assert not (tmp_path / "run").exists()


def test_every_run_prints_its_classes(tmp_path, glyphs_root):
    folder, notices = photos(tmp_path / "p", [f"c{number:02d}" for number in range(20)]), []
    trained(tmp_path / "run", folder, tmp_path / "root", notices)
    assert texts(notices) == ["classes: 13 train / 3 val / 4 test"]
    notices = []
    trained(tmp_path / "glyphs", "glyphs", glyphs_root, notices, image_size=28)
    assert texts(notices) == ["classes: 300 train / 40 val / 60 test"]


NAMES = [f"c{number:02d}" for number in range(12)]
TEST = EvalConfig(tasks=5)


@pytest.fixture
def place(tmp_path):
    """A folder with a finished run on the photos in `p`."""
    trained(tmp_path / "run", photos(tmp_path / "p", NAMES), tmp_path / "root")
    return tmp_path


def evaluated(place, dataset=None, **settings):
    notices = []
    chosen = replace(TEST, dataset=None if dataset is None else str(dataset), **settings)
    result = evaluate_run(place / "run", chosen, offline=True, on_event=notices.append)
    return result, texts(notices)


def resumed(path, **overrides):
    return resume(path, overrides, offline=True, time_limit_s=None, command="test", on_event=ignore)


def test_moved_images_are_tested_on_the_split_of_the_run(place):
    before, notices = evaluated(place)
    assert notices == []
    (place / "p").rename(place / "q")
    with pytest.raises(DataError) as raised:
        evaluated(place)
    assert str(place / "p") in raised.value.message
    assert raised.value.hint.endswith(f"mamlctl eval {place / 'run'} --dataset DIR")
    after, notices = evaluated(place, place / "q")
    assert notices == [f"{place / 'q'} has the images of {place / 'p'}: using the split of the run"]
    assert after.rows == before.rows and after.folder == before.folder and after.notes == ()


def test_the_folder_of_moved_images_is_compared_once(place, monkeypatch):
    (place / "p").rename(place / "q")
    scan, scans = training_images.class_files, []
    monkeypatch.setattr(training_images, "class_files", lambda *folder: scans.append(folder) or scan(*folder))
    evaluated(place, place / "q")
    assert len(scans) == 1


def test_the_split_of_the_run_is_used_if_classes_are_added_elsewhere(place):
    (place / "p").rename(place / "q")
    photos(place / "q", ["a1", "a2", "a3", "a4"])
    model = load_trained_model(
        place / "run", replace(TEST, dataset=str(place / "q")), offline=True, on_event=ignore
    )
    stored = open_run(place / "run").classes()
    assert model.source.names == stored
    assert "images or classes have changed" in model.notes[-1]


def test_hashing_the_training_images_reports_progress(tmp_path):
    events = []
    run = trained(tmp_path / "run", photos(tmp_path / "p", NAMES), tmp_path / "root", events)
    hashed = [event for event in events if isinstance(event, Progress) and event.what == "hash images"]
    classes = len(open_run(run).classes()["train"])
    assert [(event.done, event.total) for event in hashed] == [
        (3 * n, 3 * classes) for n in range(1, classes + 1)
    ]


def test_training_images_under_other_names_are_refused(place):
    (place / "q").mkdir()
    for number, name in enumerate(NAMES):
        shutil.copytree(place / "p" / name, place / "q" / f"{(7 * number) % 12} {name}")
    with pytest.raises(DataError) as raised:
        evaluated(place, place / "q")
    assert re.fullmatch(r"the run was trained on [36] of the 6 test images of .*/q", raised.value.message)
    assert raised.value.exit_code == 3 and "--allow-overlap" in raised.value.hint
    result, notices = evaluated(place, place / "q", allow_overlap=True)
    assert raised.value.message in result.notes and raised.value.message in notices
    evaluated(place, place / "q", split="train")  # does not claim to be a test


def test_other_images_of_the_same_classes_are_tested_on_the_split_of_the_run(place):
    photos(place / "q", NAMES, shift=1)
    result, notices = evaluated(place, place / "q")
    assert "the data are not those of the training: images or classes have changed" in notices
    assert not [note for note in result.notes if "was trained on" in note]


def test_one_training_image_in_a_test_class_is_found(place):
    stored = open_run(place / "run").classes()
    photos(place / "q", NAMES, shift=1)
    shutil.copy(place / "p" / stored["train"][0] / "1.png", place / "q" / stored["test"][0] / "9.png")
    with pytest.raises(DataError, match="the run was trained on 1 of the 7 test images"):
        evaluated(place, place / "q")


def test_copies_in_the_own_data_are_only_noticed(tmp_path):
    photos(tmp_path / "p", NAMES)
    for name in NAMES[1:]:  # every class has the same last image
        shutil.copy(tmp_path / "p" / "c00" / "2.png", tmp_path / "p" / name / "2.png")
    trained(tmp_path / "run", tmp_path / "p", tmp_path / "root")
    assert evaluated(tmp_path)[1] == []
    (tmp_path / "p").rename(tmp_path / "q")
    _, notices = evaluated(tmp_path, tmp_path / "q")
    assert notices[-1].startswith("the run was trained on 2 of the 6 test images of ")


def test_runs_without_a_list_of_their_images_get_a_notice(place):
    (place / "run" / "training_images.bin").unlink()
    photos(place / "q", [f"other {name}" for name in NAMES])
    _, notices = evaluated(place, place / "q")
    fact = "has no list of its training images: they may be among those of the test"
    assert notices[-1] == f"{place / 'run'} {fact}"
    assert evaluated(place)[1] == []


@pytest.mark.parametrize("size", [0, 4, 8, 16, 24, -8])
def test_a_list_of_training_images_that_is_cut_short_gets_a_notice(place, size):
    file = place / "run" / "training_images.bin"
    file.write_bytes(file.read_bytes()[:size])
    photos(place / "q", [f"other {name}" for name in NAMES])
    _, notices = evaluated(place, place / "q")
    fact = "has a damaged list of its training images: they may be among those of the test"
    assert notices[-1] == f"{place / 'run'} {fact}"


def test_lists_of_training_images_without_a_checksum_are_read(place):
    file = place / "run" / "training_images.bin"
    digests = np.frombuffer(file.read_bytes()[16:], dtype="<u8")
    for older, is_whole in ((digests, True), (digests[::-1], False)):
        file.write_bytes(older.tobytes())
        stored = training_images.stored_digests(open_run(place / "run"))
        assert np.array_equal(stored, digests) if is_whole else stored is None


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({}, "--allow-overlap has no effect without --dataset"),
        ({"dataset": "glyphs", "split": "train"}, "--allow-overlap has no effect with --split train"),
    ],
)
def test_allow_overlap_must_have_an_effect(place, settings, fact):
    with pytest.raises(SettingsError) as raised:
        evaluated(place, allow_overlap=True, **settings)
    assert [problem for problem, _ in raised.value.problems] == [fact]


def test_a_run_is_resumed_with_moved_images_to_the_same_result(tmp_path):
    photos(tmp_path / "p", NAMES)
    for name, limit_s in (("whole", None), ("parts", 0.0)):
        trained(tmp_path / name, tmp_path / "p", tmp_path / "root", time_limit_s=limit_s)
    assert open_run(tmp_path / "parts").state().status == "interrupted"
    (tmp_path / "p").rename(tmp_path / "q")
    with pytest.raises(DataError) as raised:
        resumed(tmp_path / "parts")
    assert raised.value.hint.endswith(f"mamlctl train --resume {tmp_path / 'parts'} --dataset DIR")
    shutil.copytree(tmp_path / "q", tmp_path / "changed")
    shutil.copy(tmp_path / "q" / "c00" / "0.png", tmp_path / "changed" / "c01" / "0.png")
    with pytest.raises(DataError, match="but the run started with"):
        resumed(tmp_path / "parts", dataset=str(tmp_path / "changed"))
    assert resumed(tmp_path / "parts", dataset=str(tmp_path / "q")).status == "finished"
    content = [
        torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True)["digest"]
        for name in ("whole", "parts")
    ]
    assert content[0] == content[1]
    assert open_run(tmp_path / "parts").config.dataset == str(tmp_path / "p")


def test_moved_images_that_cannot_be_compared_are_refused(place):
    (place / "p").rename(place / "q")
    (place / "run" / "environment.json").unlink()
    with pytest.raises(DataError, match="has no digest of its data"):
        resumed(place / "run", dataset=str(place / "q"))


def test_a_resumed_run_keeps_its_split(tmp_path):
    """It does not matter by which rules an older version split the classes."""
    photos(tmp_path / "p", NAMES)
    run = trained(tmp_path / "run", tmp_path / "p", tmp_path / "root", time_limit_s=0.0)
    stored = json.loads((run / "classes.json").read_text())
    stored["train"], stored["test"] = stored["test"] + stored["train"][2:], stored["train"][:2]
    (run / "classes.json").write_text(json.dumps(stored))
    notices = []
    resume(run, {}, offline=True, time_limit_s=None, command="test", on_event=notices.append)
    assert texts(notices)[0] == "classes: 8 train / 2 val / 2 test"
    assert open_run(run).classes() == stored


def test_resume_accepts_a_folder_but_no_other_data_set(place, monkeypatch, cli):
    (place / "p").rename(place / "q")
    monkeypatch.chdir(place)
    for name, expected in (("q", 0), ("glyphs", 2)):
        code, _, err = cli("train", "--resume", place / "run", "--dataset", name)
        assert code == expected
    assert f"--dataset is glyphs, but the run to resume has {place / 'p'}" in err


def test_older_runs_keep_their_top_folders_as_classes(tmp_path):
    folder = photos(tmp_path / "p", [f"{name}/inside" for name in NAMES])
    run = trained(tmp_path / "run", folder, tmp_path / "root", time_limit_s=0.0, classes="top")
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    assert "classes: top\n" in lines
    (run / "config.yaml").write_text("".join(line for line in lines if line != "classes: top\n"))
    assert resumed(run).status == "finished"
    result, notices = evaluated(tmp_path)
    assert result.notes == () and notices == []
    names = [name for part in open_run(run).classes().values() for name in part]
    assert sorted(names) == NAMES
    folder.rename(tmp_path / "q")
    _, notices = evaluated(tmp_path, tmp_path / "q")
    assert notices[0].endswith("using the split of the run")


def test_another_folder_is_read_by_its_own_layout(place):
    nested = photos(place / "q", [f"{a}/{b}" for a in "abcdef" for b in "xyz"])
    for classes, names in ((None, {"a/x"}), ("leaf", {"a/x"}), ("top", {"a"})):
        chosen = replace(TEST, dataset=str(nested), classes=classes, split="train")
        model = load_trained_model(place / "run", chosen, offline=True, on_event=ignore)
        assert names <= {name for part in model.source.names.values() for name in part}
    shutil.copy(nested / "a" / "x" / "0.png", nested / "a" / "0.png")
    with pytest.raises(SettingsError, match="contains 1 image and 3 folders with images"):
        evaluated(place, nested)
    evaluated(place, nested, classes="top", split="train")


@pytest.mark.parametrize(
    ("dataset", "fact"),
    [
        (None, "--classes has no effect with the data of the run; it is for --dataset"),
        ("glyphs", "--classes has no effect with glyphs, which is not a folder"),
    ],
)
def test_classes_must_have_an_effect(place, dataset, fact):
    with pytest.raises(SettingsError) as raised:
        evaluated(place, dataset, classes="top")
    assert fact in [problem for problem, _ in raised.value.problems]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"train": 5}', '{"train": ["c00"'])
def test_a_damaged_list_of_classes_is_not_replaced_by_a_new_split(place, text):
    (place / "run" / "classes.json").write_text(text)
    for call in (lambda: evaluated(place), lambda: resumed(place / "run")):
        with pytest.raises(MamlctlError, match="is damaged, so the split of the run is unknown"):
            call()
