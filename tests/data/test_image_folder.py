"""A folder of the user's images: any size and mode, broken files, splits by folders or by fractions."""

import io
import itertools
import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from helpers.shared import ignore
from PIL import Image

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import Notice
from mamlctl.data.reading.packs import pack
from mamlctl.data.sets import image_folder
from mamlctl.data.sets.folder_layout import class_files
from mamlctl.data.sets.registry import find_data_set, open_images
from mamlctl.data.tasks.episodes import Placement
from mamlctl.data.tasks.streams import open_streams, split_of
from mamlctl.experiments.settings import fill_defaults, resolve_settings

CPU = torch.device("cpu")
MODES = ("RGB", "L", "RGBA", "P", "I;16")


def picture(mode, number, size):
    """An image in any mode, filled with one colour that encodes the class."""
    grey = 20 + 10 * number
    if mode == "I;16":
        return Image.fromarray(np.full(size[::-1], grey * 257, dtype=np.uint16))
    image = Image.new("RGB", size, (grey, grey, grey))
    return image.quantize(2) if mode == "P" else image.convert(mode)


def make(path, classes=12, images=5, split="", first=0):
    """Make class folders of images with all modes and many sizes."""
    for number in range(first, first + classes):
        home = path / split / f"class {number:02d}"
        home.mkdir(parents=True)
        for image in range(images):
            size = (20 + 3 * image, 43 - 2 * number)
            picture(MODES[(number + image) % len(MODES)], number, size).save(home / f"{image}.png")
    return path


def settings(path, root, **more):
    base = {"dataset": str(path), "image_size": 8, "channels": 1, "ways": 2, "data_root": str(root)}
    return fill_defaults(resolve_settings([("flag", base | {"filters": 4} | more)]).config)


def opened(path, root, notices=None, **more):
    events = notices if notices is not None else []
    return open_streams(
        settings(path, root, **more),
        ("train", "val", "test"),
        Placement(CPU),
        offline=True,
        on_event=events.append,
    )


def test_every_image_gets_the_requested_shape(tmp_path):
    path = make(tmp_path / "mine")
    packed = image_folder.open_pack(path, tmp_path / "root", side=8, channels=3, on_event=ignore)
    assert packed.images_MCHW.shape == (60, 3, 8, 8)
    assert packed.names == tuple(f"class {number:02d}" for number in range(12))
    for number in range(12):
        images = packed.images_MCHW[packed.starts[number] : packed.starts[number + 1]]
        assert np.abs(images.astype(int) - (20 + 10 * number)).max() <= 1
    grey = image_folder.open_pack(path, tmp_path / "root", side=8, channels=1, on_event=ignore)
    assert grey.images_MCHW.shape == (60, 1, 8, 8)


def test_class_names_need_not_be_utf8(tmp_path):
    path = make(tmp_path / "mine")
    (path / "class 00").rename(path / os.fsdecode(b"caf\xe9"))
    for _ in range(2):  # the second time from the pack
        packed = image_folder.open_pack(path, tmp_path / "root", side=8, channels=1, on_event=ignore)
        assert packed.names == ("caf\udce9", *(f"class {number:02d}" for number in range(1, 12)))


def test_folder_is_packed_once_and_again_when_a_file_changes(tmp_path):
    path, notices = make(tmp_path / "mine"), []
    first = image_folder.open_pack(path, tmp_path / "root", side=8, on_event=ignore)
    assert (
        image_folder.open_pack(path, tmp_path / "root", side=8, on_event=notices.append).digest
        == first.digest
    )
    assert notices == []
    picture("L", 11, (9, 9)).save(path / "class 00" / "new.png")
    again = image_folder.open_pack(path, tmp_path / "root", side=8, on_event=notices.append)
    assert [event.text for event in notices if isinstance(event, Notice)] == [
        f"{path} has changed since it was packed: packing it again"
    ]
    assert again.digest != first.digest and again.counts[0] == first.counts[0] + 1


def test_image_that_changes_but_keeps_its_size_and_time_is_packed_again(tmp_path):
    path, notices = make(tmp_path / "mine"), []
    image = path / "class 00" / "new.bmp"  # not compressed, so its size does not depend on its colour
    picture("L", 0, (9, 9)).save(image)
    first = image_folder.open_pack(path, tmp_path / "root", side=8, on_event=ignore)
    facts = image.stat()
    picture("L", 7, (9, 9)).save(image)
    os.utime(image, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (image.stat().st_size, image.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)
    again = image_folder.open_pack(path, tmp_path / "root", side=8, on_event=notices.append)
    assert [event.text for event in notices if isinstance(event, Notice)] == [
        f"{path} has changed since it was packed: packing it again"
    ]
    assert again.digest != first.digest


def test_older_pack_without_change_times_is_kept_until_a_file_changes(tmp_path):
    path, notices = make(tmp_path / "mine"), []
    first = image_folder.open_pack(path, tmp_path / "root", side=8, on_event=ignore)
    (sidecar,) = (tmp_path / "root").rglob("*.json")
    document = json.loads(sidecar.read_text())
    document["facts"]["stamp"] = image_folder._stamp(
        path, class_files(path, "top"), lambda status: (status.st_size, status.st_mtime_ns)
    )
    sidecar.write_text(json.dumps(document))
    again = image_folder.open_pack(path, tmp_path / "root", side=8, on_event=notices.append)
    assert again.digest == first.digest and notices == []
    facts = next(path.rglob("*.png")).stat()
    time.sleep(0.02)  # longer than the resolution of a file system's clock
    os.utime(next(path.rglob("*.png")), ns=(facts.st_atime_ns, facts.st_mtime_ns))
    image_folder.open_pack(path, tmp_path / "root", side=8, on_event=notices.append)
    assert "has changed since it was packed" in notices[0].text


@pytest.fixture
def flawed(tmp_path):
    """A folder with a broken file, an empty class, a class of only broken files, and a small class."""
    path = make(tmp_path / "mine")
    (path / "class 03" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    (path / "nothing").mkdir()
    (path / "broken").mkdir()
    (path / "broken" / "x.png").write_bytes(b"")
    (path / "small").mkdir()
    picture("L", 3, (9, 9)).save(path / "small" / "one.png")
    (path / "class 03" / "notes.txt").write_text("no image")
    return path


def test_bad_files_and_classes_are_left_out_with_one_notice_each_time(flawed, tmp_path):
    notices = []
    streams, _ = opened(flawed, tmp_path / "root", notices)
    texts = [event.text for event in notices if isinstance(event, Notice)]
    assert len(texts) == 2
    assert texts[0].startswith("4 left out: broken (no readable image); nothing (an empty class); ")
    assert "cannot read image class 03/broken.jpg: " in texts[0]
    assert "cannot read image broken/x.png: " in texts[0]
    assert texts[1] == "left out: 1 class with fewer than 2 images (--shots plus --queries): small (1)"
    assert sum(stream.pool for stream in streams.values()) == 12
    again = []
    opened(flawed, tmp_path / "root", again)
    assert [event.text for event in again if isinstance(event, Notice)] == texts


@pytest.mark.parametrize("level", ["top", "leaf"])
def test_links_to_nothing_and_pipes_are_left_out_with_a_notice(tmp_path, level):
    path = make(tmp_path / "mine", split="group/" if level == "leaf" else "")
    place = next(folder for folder in path.rglob("class 03"))
    (place / "moved.png").symlink_to("nowhere.png")
    os.mkfifo(place / "pipe.png")
    for _ in range(2):
        notices = []
        opened(path, tmp_path / "root", notices, classes=level)
        text = notices[-1].text
        assert text.startswith("2 left out: there is no ") and "moved.png; " in text
        assert text.endswith("pipe.png is a named pipe or a device, not a file or a folder")


@pytest.mark.parametrize("fixed", [False, True])
def test_strict_refuses_bad_files_and_small_classes(flawed, tmp_path, fixed):
    if fixed:
        (flawed / "nothing").rmdir()
        (flawed / "broken" / "x.png").unlink()
        (flawed / "broken").rmdir()
        (flawed / "class 03" / "broken.jpg").unlink()
    with pytest.raises(
        DataError,
        match="1 class with fewer than 2"
        if fixed
        else r"--strict is on, but 4 cannot be used: broken \(no readable image\); nothing",
    ) as raised:
        opened(flawed, tmp_path / "root", strict=True)
    assert raised.value.exit_code == 3 and raised.value.hint


def names(config, packed):
    return {split: [packed.names[n] for n in classes] for split, classes in split_of(config, packed).items()}


def test_tasks_that_are_too_large_for_every_class_are_refused(tmp_path):
    with pytest.raises(SettingsError) as raised:
        opened(make(tmp_path / "mine"), tmp_path / "root", shots=4, queries=2)
    facts = [fact for fact, _ in raised.value.problems]
    assert facts == [f"{tmp_path / 'mine'} has 5 images per class, but --shots 4 + --queries 2 is 6"]


@pytest.mark.parametrize(
    ("more", "hints"),
    [
        (
            {"ways": 3},
            ["use --ways 2 or fewer, at least 19 classes, or other --split-fractions than 64-16-20"],
        ),
        (
            {"ways": 5},
            ["use --ways 2 or fewer, at least 30 classes, or other --split-fractions than 64-16-20"],
        ),
        ({"ways": 2, "split_fractions": "1-0-1"}, ["use other --split-fractions than 1-0-1"]),
    ],
)
def test_too_few_classes_are_refused_with_the_number_that_is_needed(tmp_path, more, hints):
    with pytest.raises(SettingsError) as raised:
        opened(make(tmp_path / "mine"), tmp_path / "root", **more)
    assert [hint for fact, hint in raised.value.problems if "'val'" in fact] == hints


@pytest.mark.parametrize("fractions", ["64-16-20", "1-1-1", "50-25-25", "10-1-0", "3-0-1"])
def test_the_number_of_classes_that_is_needed_is_the_smallest(fractions):
    def sizes(classes):
        packed = pack(np.zeros((classes, 1, 4, 4), np.uint8), np.ones(classes, int), ("c",) * classes)
        parts = image_folder.split_classes(packed, "fractions", 0, fractions)
        return [
            len(part)
            for part, share in zip(parts.values(), fractions.split("-"), strict=True)
            if share != "0"
        ]

    for ways in (2, 5, 7):
        needed = image_folder.classes_needed(fractions, ways)
        assert all(min(sizes(classes)) >= ways for classes in range(needed, 3 * needed))
        assert min(sizes(needed - 1)) < ways


def test_split_folders_need_classes_in_each(tmp_path):
    for split, first, classes in (("train", 0, 4), ("val", 4, 2), ("test", 6, 3)):
        make(tmp_path / "mine", classes, split=split, first=first)
    with pytest.raises(SettingsError) as raised:
        opened(tmp_path / "mine", tmp_path / "root", ways=3)
    ((_, hint),) = raised.value.problems
    assert hint == "use --ways 2 or fewer, at least 3 classes in 'val'"


@pytest.mark.parametrize("splits", [False, True])
def test_small_classes_are_left_out_before_the_split(tmp_path, splits):
    path = make(tmp_path / "mine", 10, split="train" if splits else "")
    for name in ("a", "b", "c", "d", "e"):
        home = path / ("train" if splits else "") / name
        home.mkdir()
        picture("L", 3, (9, 9)).save(home / "one.png")
    notices = []
    _, source = opened(path, tmp_path / "root", notices)
    sizes = {"train": 6, "val": 2, "test": 2}
    assert {split: len(names) for split, names in source.names.items()} == sizes == source.classes
    (text,) = [event.text for event in notices if isinstance(event, Notice)]
    assert text.startswith("left out: 5 classes with fewer than 2 images")
    assert sorted(itertools.chain(*source.names.values()))[0].endswith("class 00")


def test_small_classes_of_a_stored_split_stay_in_their_part(tmp_path):
    """The other parts are as they were when the run started."""
    path = make(tmp_path / "mine", 10)
    stored = names(
        settings(path, tmp_path), image_folder.open_pack(path, tmp_path, side=8, channels=1, on_event=ignore)
    )
    for image in range(1, 5):
        (path / stored["train"][0] / f"{image}.png").unlink()
    _, source = open_streams(
        settings(path, tmp_path / "root"),
        ("train",),
        Placement(CPU),
        offline=True,
        on_event=ignore,
        stored=stored,
    )
    assert source.names == stored and source.classes == {"train": len(stored["train"]) - 1}


def test_classes_are_split_by_fractions_and_seed(tmp_path):
    path = make(tmp_path / "mine")
    packed = image_folder.open_pack(path, tmp_path / "root", side=8, channels=1, on_event=ignore)
    one = names(settings(path, tmp_path, split_fractions="50-25-25"), packed)
    assert {split: len(classes) for split, classes in one.items()} == {"train": 6, "val": 3, "test": 3}
    assert sorted(itertools.chain(*one.values())) == list(packed.names)
    assert one == names(settings(path, tmp_path, split_fractions="2-1-1"), packed)
    assert one != names(settings(path, tmp_path, split_fractions="2-1-1", split_seed=1), packed)


def test_folders_train_val_and_test_define_the_split(tmp_path):
    path = tmp_path / "mine"
    for split, first, classes in (("train", 0, 4), ("val", 4, 2), ("test", 6, 3)):
        make(path, classes, split=split, first=first)
    packed = image_folder.open_pack(path, tmp_path / "root", side=8, channels=1, on_event=ignore)
    by_split = names(settings(path, tmp_path), packed)
    assert {split: len(classes) for split, classes in by_split.items()} == {
        "train": 4,
        "val": 2,
        "test": 3,
    }
    assert all(name.startswith(f"{split}/") for split, classes in by_split.items() for name in classes)


def test_missing_val_is_taken_from_train(tmp_path):
    path = tmp_path / "mine"
    make(path, 10, split="train")
    make(path, 3, split="test", first=10)
    packed = image_folder.open_pack(path, tmp_path / "root", side=8, channels=1, on_event=ignore)
    by_split = names(settings(path, tmp_path), packed)
    assert {split: len(classes) for split, classes in by_split.items()} == {
        "train": 8,
        "val": 2,
        "test": 3,
    }
    assert all(name.startswith("train/") for name in by_split["val"])


@pytest.mark.parametrize(
    ("more", "fact"),
    [
        ({"split_fractions": "a-b"}, "--split-fractions is 'a-b'"),
        ({"split_fractions": "1-1"}, "--split-fractions is '1-1'"),
        ({"split_fractions": "0-1-1"}, "--split-fractions is '0-1-1'"),
        ({"split_scheme": "vinyals"}, "has no --split-scheme 'vinyals'"),
        ({"normalize": "imagenet"}, "--normalize imagenet is for colours"),
        ({"dataset": "glyphs", "strict": True}, "--strict has no effect"),
        ({"dataset": "nowhere"}, "unknown data set 'nowhere'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, more, fact):
    with pytest.raises(SettingsError) as raised:
        settings(make(tmp_path / "mine", 2, 2), tmp_path, **more)
    assert any(fact in problem for problem, _ in raised.value.problems)


@pytest.mark.parametrize(
    ("form", "fact"),
    [
        ("absent", "is not a folder"),
        ("file", "is not a folder"),
        ("flat", "contains no folders"),
        ("empty", "contains no images"),
    ],
)
def test_other_folders_are_refused(tmp_path, form, fact):
    path = tmp_path / "mine"
    if form == "file":
        path.write_text("")
    elif form != "absent":
        path.mkdir()
        (path / "notes").mkdir() if form == "empty" else picture("L", 1, (8, 8)).save(path / "x.png")
    with pytest.raises(DataError, match=fact):
        opened(path, tmp_path / "root")


def test_grey_data_sets_can_have_colours_and_another_size(tmp_path):
    flags = {"dataset": "glyphs", "image_size": 16, "channels": 3, "data_root": str(tmp_path)}
    config = fill_defaults(resolve_settings([("flag", flags)]).config)
    streams, source = open_streams(config, ("train",), Placement(CPU), offline=True, on_event=ignore)
    assert source.example_shape == (3, 16, 16)
    x = streams["train"].episodes(0, 2).support_x_TECHW
    assert x.shape == (2, 5, 3, 16, 16) and torch.equal(x[:, :, 0], x[:, :, 2])
    packed = open_images(
        find_data_set("glyphs"), tmp_path, resize="none", side=16, channels=3, on_event=ignore
    )
    whole = find_data_set("glyphs").open_pack(tmp_path, "none", on_event=ignore)
    one = Image.fromarray(whole.images_MCHW[7, 0]).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(packed.images_MCHW[7, 0], np.asarray(one)) and packed.names == whole.names


def test_folder_is_stored_with_its_absolute_path(tmp_path, monkeypatch):
    make(tmp_path / "mine", 2, 2)
    monkeypatch.chdir(tmp_path)
    assert resolve_settings([("flag", {"dataset": "./mine"})]).config.dataset == str(tmp_path / "mine")
    assert resolve_settings([("flag", {"dataset": "mine"})]).config.dataset == str(tmp_path / "mine")
    # The name of a data set wins over a folder of the same name.
    make(tmp_path / "glyphs", 2, 2)
    assert resolve_settings([("flag", {"dataset": "glyphs"})]).config.dataset == "glyphs"


def test_truncated_file_does_not_change_the_order(tmp_path):
    """The images after one that is left out keep their classes."""
    path = make(tmp_path / "mine", 3, 4)
    whole = io.BytesIO()
    picture("RGB", 1, (30, 30)).save(whole, "JPEG")
    (path / "class 01" / "0.jpg").write_bytes(whole.getvalue()[:-200])
    packed = image_folder.open_pack(path, tmp_path / "root", side=8, channels=1, on_event=ignore)
    assert packed.counts.tolist() == [4, 4, 4]
    assert np.abs(packed.images_MCHW.reshape(3, -1).astype(int) - [[20], [30], [40]]).max() <= 1


@pytest.mark.parametrize(
    ("splits", "fact"),
    [
        ({"train": 3, "val": 3}, "has 3 classes both in train and in val, for example 'class 00'"),
        ({"val": 3, "test": 3}, "has folders test and val, but no folder train"),
        ({"train": 3, "test": 3, "more": 2}, "has folders test and train, but also a folder more"),
    ],
)
def test_invalid_splits_are_refused(tmp_path, splits, fact):
    for split, classes in splits.items():
        make(tmp_path / "mine", classes, split=split)
    with pytest.raises(DataError, match=fact):
        opened(tmp_path / "mine", tmp_path / "root")


def test_class_may_be_called_train(tmp_path):
    path = make(tmp_path / "mine", 3)
    (path / "class 00").rename(path / "train")
    packed = image_folder.open_pack(path, tmp_path / "root", side=8, channels=1, on_event=ignore)
    assert packed.names == ("class 01", "class 02", "train")


def test_run_keeps_its_split_when_classes_are_added(tmp_path):
    path = make(tmp_path / "mine")
    config = settings(path, tmp_path / "root")
    packed = image_folder.open_pack(path, tmp_path / "root", side=8, channels=1, on_event=ignore)
    stored = names(config, packed)
    for number in range(3):
        (path / f"a{number}").mkdir()
        picture("L", number, (9, 9)).save(path / f"a{number}" / "x.png")
    packed = image_folder.open_pack(path, tmp_path / "root", side=8, channels=1, on_event=ignore)
    splits = split_of(config, packed, stored)
    assert {split: [packed.names[n] for n in part] for split, part in splits.items()} == stored
    assert names(config, packed) != stored
    shutil.rmtree(path / "class 03")
    packed = image_folder.open_pack(path, tmp_path / "root", side=8, channels=1, on_event=ignore)
    with pytest.raises(DataError, match="no longer has class 'class 03'"):
        split_of(config, packed, stored)
