"""Which folders of a user's folder are splits and which are classes, and what is refused as ambiguous."""

import itertools
import os

import pytest
from helpers.shared import ignore
from PIL import Image

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import Notice
from mamlctl.data.sets import image_folder
from mamlctl.data.sets.folder_layout import class_files, class_level, split_folders
from mamlctl.data.tasks.episodes import Placement
from mamlctl.data.tasks.streams import open_streams
from mamlctl.experiments.grid.command_lines import train_arguments
from mamlctl.experiments.settings import fill_defaults, resolve_settings


def tree(root, *paths):
    """Make a folder with these files; those ending in .png are images, and the rest is text."""
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".png":
            Image.new("L", (6, 6), number % 256).save(file)
        else:
            file.write_text("text")
    return root


def alphabets(root, groups=4, characters=3, images=3, split=""):
    """Class folders inside folders, as Omniglot unpacks."""
    names = itertools.product(range(groups), range(characters), range(images))
    return tree(root, *(f"{split}alphabet{a}/character{c}/{i}.png" for a, c, i in names))


def config(path, **flags):
    base = {"dataset": str(path), "image_size": 8, "channels": 1, "ways": 2, "filters": 4}
    return fill_defaults(resolve_settings([("flag", base | flags)]).config)


def opened(path, root, **flags):
    notices = []
    settings = config(path, data_root=str(root), **flags)
    _, source = open_streams(settings, ("train",), _place(), offline=True, on_event=notices.append)
    return source, [event.text for event in notices if isinstance(event, Notice)]


def _place():
    import torch

    return Placement(torch.device("cpu"))


@pytest.mark.parametrize(
    ("files", "level"),
    [
        (["a/1.png", "b/1.png"], "top"),
        (["a/x/1.png", "b/y/1.png"], "leaf"),
        (["a/x/1.png", "b/1.png"], "top"),
        (["a/README", "a/x/1.png", "b/y/1.png"], "leaf"),
        (["a/.hidden/1.png", "b/.hidden/1.png"], "top"),
        (["a/x/notes.txt", "b/notes.txt"], "top"),
        (["train/a/1.png", "test/b/1.png"], "top"),
        (["train/a/x/1.png", "test/b/x/1.png"], "leaf"),
        (["train/a/x/1.png", "test/b/1.png"], "top"),
    ],
)
def test_classes_are_the_innermost_folders_if_all_top_folders_contain_only_folders(tmp_path, files, level):
    assert class_level(tree(tmp_path, *files)) == level


def test_innermost_folders_are_named_with_their_groups_and_one_line_says_so(tmp_path):
    source, notices = opened(alphabets(tmp_path / "o"), tmp_path / "root")
    names = sorted(itertools.chain(*source.names.values()))
    assert names == [f"alphabet{a}/character{c}" for a in range(4) for c in range(3)]
    assert notices == [
        f"the classes are the 12 innermost folders of {tmp_path / 'o'}; --classes top takes its top folders"
    ]


def test_classes_top_and_leaf_decide_explicitly(tmp_path):
    path = alphabets(tmp_path / "o")
    source, notices = opened(path, tmp_path / "root", classes="top", split_fractions="1-1-0")
    assert sorted(itertools.chain(*source.names.values())) == [f"alphabet{a}" for a in range(4)]
    assert notices == []
    tree(path, "alphabet9/0.png", "alphabet9/1.png")  # so that the folders no longer decide
    source, _ = opened(path, tmp_path / "root", classes="leaf")
    assert {"alphabet0/character0", "alphabet9"} <= {*itertools.chain(*source.names.values())}


def test_the_rule_applies_inside_split_folders(tmp_path):
    path = alphabets(tmp_path / "o", split="Train/")
    tree(path, *(f"novel/greek/{letter}/{image}.png" for letter in "ab" for image in range(2)))
    source, _ = opened(path, tmp_path / "root")
    assert source.names["test"] == ["test/greek/a", "test/greek/b"]
    assert {name.count("/") for names in source.names.values() for name in names} == {2}


def test_a_link_to_a_class_counts_and_a_circle_ends(tmp_path):
    path = tree(tmp_path / "o", "a/x/1.png", "b/y/1.png")
    tree(tmp_path / "elsewhere", "1.png")
    (path / "a" / "z").symlink_to(tmp_path / "elsewhere")
    (path / "b" / "y" / "round").symlink_to(path)
    assert [*class_files(path, "leaf")] == ["a/x", "a/z", "b/y"]


@pytest.mark.parametrize(
    ("files", "place", "counts"),
    [
        (["a/1.png", "a/2.png", "a/x/3.png", "a/y/z/4.png", "b/1.png"], "a", "2 images and 2 folders"),
        (["a/b/1.png", "a/b/x/2.png", "c/d/1.png"], "a/b", "1 image and 1 folder"),
        (["stray.png", "a/1.png", "b/1.png"], ".", "1 image and 2 folders"),
        (["train/a/1.png", "train/a/x/1.png", "test/b/1.png"], "train/a", "1 image and 1 folder"),
    ],
)
def test_folders_with_images_and_folders_with_images_are_refused(tmp_path, files, place, counts):
    path = tree(tmp_path, *files)
    with pytest.raises(SettingsError) as raised:
        config(path)
    ((fact, hint),) = raised.value.problems
    assert fact == f"{(path / place).resolve()} contains {counts} with images"
    assert "--classes top" in hint
    assert config(path, classes="top").classes == "top"


@pytest.mark.parametrize(
    ("files", "fact"),
    [
        (
            ["a/x/1.png", "a/y/2.png", "b/1.png", "c/1.png", "d/deep/x/1.png"],
            "2 folders with images and 1 folder with several folders of images, such as a",
        ),
        (
            ["train/a/x/1.png", "train/a/y/2.png", "train/b/x/1.png", "train/b/y/1.png", "test/c/1.png"],
            "1 folder with images and 2 folders with several folders of images, such as train/a",
        ),
    ],
)
def test_classes_of_different_depth_are_refused(tmp_path, files, fact):
    path = tree(tmp_path, *files)
    with pytest.raises(SettingsError) as raised:
        config(path)
    ((found, hint),) = raised.value.problems
    assert found == f"{path.resolve()} contains {fact}"
    assert "--classes leaf" in hint and "--classes top" in hint
    for level in ("leaf", "top"):
        assert config(path, classes=level).classes == level


def test_one_folder_of_images_inside_a_class_is_not_ambiguous(tmp_path):
    assert config(tree(tmp_path, "a/photos/1.png", "b/1.png")).classes == "top"


def test_commands_of_a_grid_name_the_classes_of_a_folder(tmp_path):
    path = alphabets(tmp_path / "o")
    assert "--classes leaf" in " ".join(train_arguments(config(path)))
    tree(path, "alphabet0/stray.png")
    words = train_arguments(config(path, classes="top"))
    assert "--classes top" in " ".join(words)
    assert "--classes" not in train_arguments(config("glyphs"))


def test_other_data_sets_refuse_classes_and_stored_settings_lack_them(tmp_path):
    with pytest.raises(SettingsError, match="--classes has no effect: glyphs has"):
        config("glyphs", classes="leaf")
    assert config("glyphs").classes == "top"  # which is not part of digests


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train", "val", "test"], ["train", "val", "test"]),
        (["Train", "Valid", "Test"], ["train", "val", "test"]),
        (["base", "val", "novel"], ["train", "val", "test"]),
        (["training", "testing"], ["train", "test"]),
        (["Train"], ["train"]),
        (["Train", "Test", "extra"], ["train", "test"]),
        (["cat", "train", "dog"], []),
        (["novel", "test"], []),
    ],
)
def test_split_folders_are_recognised_by_their_usual_names(tmp_path, names, splits):
    path = tree(tmp_path, *(f"{name}/class of {name}/1.png" for name in names))
    assert [*split_folders(path)] == splits


def test_classes_may_have_the_names_of_splits(tmp_path):
    assert split_folders(tree(tmp_path, "Train/1.png", "Novel/1.png", "base/1.png")) == {}


def test_usual_names_of_splits_become_train_val_and_test(tmp_path):
    for split, names in (("Train", "abcd"), ("Valid", "ef"), ("Test", "gh")):
        tree(tmp_path / "o", *(f"{split}/{name}/{i}.png" for name in names for i in range(2)))
    source, _ = opened(tmp_path / "o", tmp_path / "root")
    assert {split: len(names) for split, names in source.names.items()} == {"train": 4, "val": 2, "test": 2}
    assert all(name.startswith(f"{split}/") for split, names in source.names.items() for name in names)


def test_the_same_classes_in_two_splits_are_refused_before_files_are_listed(tmp_path, monkeypatch):
    path = tree(tmp_path, *(f"{split}/{name}/1.png" for split in ("train", "test") for name in "abc"))
    monkeypatch.setattr("mamlctl.data.sets.folder_layout.class_folders", None)
    with pytest.raises(DataError) as raised:
        class_files(path, "top")
    assert raised.value.message == f"{path} has 3 classes both in train and in test, for example 'a'"
    assert f"--dataset {path / 'train'}" in raised.value.hint


def test_a_large_flat_folder_is_not_searched_for_mixed_folders_twice(tmp_path, monkeypatch):
    """The level is decided by the first image."""
    path = tree(tmp_path, *(f"{name}/1.png" for name in "abcdef"))
    scanned, scan = [], os.scandir
    monkeypatch.setattr("mamlctl.data.sets.folder_layout.os.scandir", lambda p: scanned.append(p) or scan(p))
    assert class_level(path) == "top" and len(scanned) == 1


def test_a_class_without_a_readable_image_is_named(tmp_path):
    path = tree(tmp_path / "o", "a/1.png", "b/1.png", "c/1.png")
    (path / "c" / "1.png").write_bytes(b"")
    notices = []
    for _ in range(2):  # the second time, it is packed already
        packed = image_folder.open_pack(path, tmp_path / "root", side=8, on_event=notices.append)
        assert packed.facts["left_out"][0] == "c (no readable image)"
    assert all(
        event.text.startswith("2 left out: c (no readable image); ")
        for event in notices
        if isinstance(event, Notice)
    )
    assert image_folder.open_pack(path, tmp_path / "root", side=8, on_event=ignore).names == ("a", "b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_enormous_files_among_the_images_are_left_out(tmp_path):
    folder = alphabets(tmp_path / "o")
    os.mkfifo(folder / "alphabet0" / "character0" / "a.png")
    with (folder / "alphabet0" / "character1" / "b.png").open("wb") as file:
        file.truncate(20 * 1024**3)
    _, notices = opened(folder, tmp_path / "root", queries=2)
    (text,) = [text for text in notices if "left out" in text]
    assert text.startswith("2 left out: ") and "character0/a.png is a named pipe or a device" in text
    assert "character1/b.png has 21,474,836,480 bytes, more than the limit of 536,870,912" in text
