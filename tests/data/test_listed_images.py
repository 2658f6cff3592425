"""Images without class folders, whose classes and splits are in train.csv, val.csv and test.csv."""

import os
import shutil

import pytest
from PIL import Image

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import Notice
from mamlctl.data.sets.folder_layout import class_files, has_lists
from mamlctl.data.tasks.episodes import Placement
from mamlctl.data.tasks.streams import open_streams
from mamlctl.experiments.settings import fill_defaults, resolve_settings

CLASSES = {"train": ("ant", "bee", "cat"), "val": ("dog", "eel"), "test": ("fox", "gnu")}


def write_lists(folder, home="images", head="filename,label", images=3):
    """Write images and the list of each split, and return the folder."""
    (folder / home).mkdir(parents=True)
    for split, labels in CLASSES.items():
        lines = [head]
        for label in labels:
            for number in range(images):
                Image.new("L", (9, 9), 80 * number + len(lines)).save(folder / home / f"{label}{number}.png")
                lines.append(f"{label}{number}.png,{label}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def opened(path, root, **flags):
    import torch

    notices = []
    base = {"dataset": str(path), "image_size": 8, "channels": 1, "ways": 2, "filters": 4}
    settings = fill_defaults(resolve_settings([("flag", base | {"data_root": str(root)} | flags)]).config)
    place = Placement(torch.device("cpu"))
    splits = ("train", "val", "test")
    _, source = open_streams(settings, splits, place, offline=True, on_event=notices.append)
    return source, [event.text for event in notices if isinstance(event, Notice)]


@pytest.mark.parametrize("home", ["images", "."])
@pytest.mark.parametrize("head", ["filename,label", "\ufeffFilename, Label", '"filename","label"'])
def test_lists_give_classes_and_splits(tmp_path, home, head):
    source, notices = opened(write_lists(tmp_path / "mine", home, head), tmp_path / "root")
    assert notices == []
    assert source.names == {
        split: [f"{split}/{label}" for label in labels] for split, labels in CLASSES.items()
    }


def test_missing_list_gets_its_share_of_the_classes_of_train(tmp_path):
    folder = write_lists(tmp_path / "mine")
    both = (folder / "train.csv").read_text() + (folder / "val.csv").read_text().partition("\n")[2]
    (folder / "train.csv").write_text(both)
    (folder / "val.csv").unlink()
    source, _ = opened(folder, tmp_path / "root", split_fractions="60-40-0")
    assert [len(source.names[split]) for split in CLASSES] == [3, 2, 2]


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda path: path.symlink_to("nowhere"), "there is no .*val.csv"),
        (os.mkfifo, "val.csv is a named pipe or a device"),
    ],
)
def test_list_that_cannot_be_read_does_not_count_as_missing(tmp_path, make, fact):
    folder = write_lists(tmp_path / "mine")
    (folder / "val.csv").unlink()
    make(folder / "val.csv")
    with pytest.raises(DataError, match=fact):
        class_files(folder, "top")


def test_changed_list_is_read_again(tmp_path):
    folder = write_lists(tmp_path / "mine")
    opened(folder, tmp_path / "root")
    text = (folder / "test.csv").read_text()
    (folder / "test.csv").write_text(text.replace(",gnu", ",gorilla"))
    source, notices = opened(folder, tmp_path / "root")
    assert source.names["test"] == ["test/fox", "test/gorilla"]
    assert "has changed since it was packed" in notices[0]


def test_class_folders_count_more_than_lists_that_describe_them(tmp_path):
    folder = write_lists(tmp_path / "mine")
    assert has_lists(folder)
    (folder / "cat").mkdir()
    assert not has_lists(folder)
    other = write_lists(tmp_path / "other", head="file,species")
    assert not has_lists(other)


def test_a_notice_says_that_lists_beside_class_folders_are_not_read(tmp_path):
    folder = write_lists(tmp_path / "mine")
    for name in "abcdef":
        shutil.copytree(folder / "images", folder / name)
    _, notices = opened(folder, tmp_path / "root", split_fractions="1-1-1")
    lists = "test.csv and train.csv and val.csv"
    assert notices == [f"{folder} has {lists}, but also a folder a, so its folders are the classes"]


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda folder: (folder / "train.csv").unlink(), "{} has test.csv and val.csv, but no train.csv"),
        (
            lambda folder: (folder / "train.csv").rename(folder / "Train.csv"),
            "{} has Train.csv and test.csv and val.csv, but no train.csv",
        ),
        (
            lambda folder: (folder / "images").rename(folder / "photos"),
            "{} has test.csv and train.csv and val.csv, but also a folder photos, "
            "so its folders are the classes",
        ),
        (
            lambda folder: (folder / "train.csv").write_text("file,species\na.png,ant\n"),
            "{}/train.csv does not have the columns filename and label",
        ),
    ],
)
@pytest.mark.parametrize("home", ["images", "."])
def test_an_error_says_why_lists_are_not_read(tmp_path, change, fact, home):
    folder = write_lists(tmp_path / "mine", home)
    (folder / "images").mkdir(exist_ok=True)
    change(folder)
    with pytest.raises(DataError) as raised:
        class_files(folder, "top")
    assert raised.value.message == fact.format(folder) and raised.value.hint


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("none.png,ant", "train.csv, line 11 lists 'none.png', which is not in"),
        ("../secret.png,ant", "line 11 lists '../secret.png', which is not in"),
        ("/etc/passwd,ant", "line 11 lists '/etc/passwd', which is not in"),
        (f"{'x' * 300}.png,ant", "line 11 lists 'xxx.*, which is not in"),
        ("ant0.png,bee", "line 11 lists ant0.png, but so does .*train.csv, line 2"),
        ("ant0.png,", "line 11 has no file name or no label"),
        ("extra.png,dog", "val.csv, line 2 has class 'dog', which is also in train.csv"),
        ("\udcff.png,ant", "train.csv cannot be read after line 1: .* can't decode"),
    ],
)
def test_error_names_the_line(tmp_path, line, fact):
    folder = write_lists(tmp_path / "mine")
    Image.new("L", (9, 9)).save(tmp_path / "secret.png")
    Image.new("L", (9, 9)).save(folder / "images" / "extra.png")
    with (folder / "train.csv").open("ab") as file:
        file.write(os.fsencode(line) + b"\n")
    with pytest.raises(DataError, match=fact) as raised:
        class_files(folder, "top")
    assert raised.value.hint and "\n" not in raised.value.message


@pytest.mark.parametrize("column", ["filename", "label"])
def test_a_column_that_occurs_twice_is_refused(tmp_path, column):
    folder = write_lists(tmp_path / "mine", head=f"filename,label,{column.upper()}")
    with pytest.raises(DataError, match=f"train.csv, line 1 has 2 columns named {column}"):
        class_files(folder, "top")


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("file,species", "the columns 'file', 'species'; it needs filename and label"),
        ("filename;label", "the columns 'filename;label'; it needs filename and label"),
        ("label,name", "the columns 'label', 'name'; it needs filename"),
        ("", "no columns; it needs filename and label"),
    ],
)
def test_a_list_without_the_columns_is_refused_with_those_it_has(tmp_path, head, found):
    folder = write_lists(tmp_path / "mine")
    for text in (f"{head}\nant0.png,ant\n", head):
        (folder / "val.csv").write_text(text)
        with pytest.raises(DataError) as raised:
            class_files(folder, "top")
        assert raised.value.message == f"{folder}/val.csv, line 1 has {found}"
        assert "with the columns filename,label" in raised.value.hint


def test_choice_of_folders_has_no_effect_on_lists(tmp_path):
    folder = write_lists(tmp_path / "mine")
    with pytest.raises(
        SettingsError, match=r"--classes leaf has no effect: the classes of .* are in its train.csv"
    ):
        opened(folder, tmp_path / "root", classes="leaf")
