"""mini-ImageNet and tieredImageNet from the user's files in every form, and errors that name the problem."""

import io
import pickle
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.shared import SHARED, ignore
from PIL import Image

from mamlctl.core.errors import DataError
from mamlctl.core.events import Notice, Progress
from mamlctl.data.reading.packs import load_pack, stream_pack
from mamlctl.data.sets import imagenet
from mamlctl.data.sets.class_splits import listed_split, split_classes
from mamlctl.data.sets.imagenet import MINI, TIERED
from mamlctl.data.sets.registry import fetch_or_open, imagenet_set

CLASSES = listed_split("mini-imagenet")
IMAGES = 2


@pytest.fixture
def small(monkeypatch):
    """mini-ImageNet with two images per class."""
    monkeypatch.setattr(imagenet, "PER_CLASS", IMAGES)


def jpeg(number, size=(84, 84)):
    file = io.BytesIO()
    pixels = np.full((*size, 3), number % 256, dtype=np.uint8)
    # Blocks that encode the number, since a JPEG merges similar colours.
    pixels[: size[0] // 2, :, 1:] = (
        200 * np.array([number >> bit & 1 for bit in range(12)]).repeat(7)[:, None]
    )
    Image.fromarray(pixels).save(file, "JPEG", subsampling=0)
    return file.getvalue()


def members(form):
    """File name -> contents, in one of the forms that users have."""
    files = {}
    for number, (label, split) in enumerate(sorted(CLASSES.items())):
        for image in range(IMAGES):
            file = f"{label}{image:08d}.jpg"
            folder = {"split": f"{split}/{label}/", "classes": f"images/{label}/", "flat": "images/"}[form]
            files[folder + file] = jpeg(2 * number + image)
    files["notes.txt"] = b"no image"
    files["__MACOSX/._n01532829.jpg"] = b"resource fork"
    return files


def as_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return [path]


def as_zip(path, files):
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return [path.with_suffix(".zip")]


def as_tar(path, files):
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return [path.with_suffix(".tar")]


def as_split_zips(path, files):
    """A folder with train.zip, val.zip, test.zip."""
    path.mkdir()
    for split in ("train", "val", "test"):
        as_zip(path / split, {name: data for name, data in files.items() if name.startswith(split)})
    return [path]


def fetch(root, source, which=MINI, on_event=ignore, force=False):
    return fetch_or_open(imagenet_set(which, ""), root, source=source, force=force, on_event=on_event)


@pytest.mark.parametrize("form", ["split", "classes", "flat"])
@pytest.mark.parametrize("kind", [as_folder, as_zip, as_tar])
def test_every_form_gives_the_same_pack(small, tmp_path, form, kind):
    packed = fetch(tmp_path / "root", kind(tmp_path / "source", members(form)))
    assert packed.images_MCHW.shape == (200, 3, 84, 84) and packed.names == tuple(sorted(CLASSES))
    splits = split_classes(packed, "ravi", 0)
    assert {split: len(numbers) for split, numbers in splits.items()} == {"train": 64, "val": 16, "test": 20}
    assert all(
        CLASSES[packed.names[number]] == split for split, numbers in splits.items() for number in numbers
    )
    assert np.abs(packed.images_MCHW[:, 0].mean((1, 2)) - np.arange(200)).max() < 5  # JPEG's error


def test_zips_of_splits_in_a_folder_are_found(small, tmp_path):
    packed = fetch(tmp_path / "root", as_split_zips(tmp_path / "source", members("split")))
    assert packed.images_MCHW.shape == (200, 3, 84, 84)


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (lambda files: files.pop("flat/n0153282900000001.jpg"), "n01532829 has 1 image instead of 2"),
        (lambda files: files.update({"flat/n0153282900000009.jpg": jpeg(1)}), "n01532829 has 3 images"),
        (
            lambda files: files.update({"flat/n9999999900000000.jpg": jpeg(1)}),
            "it has 101 classes, not 100, and n99999999 is not one of those",
        ),
        (
            lambda files: [files.pop(name) for name in list(files) if "n0153282" in name],
            "it lacks 1 of the 100 classes",
        ),
        (lambda files: files.clear(), "contains no images with file or folder names like n01532829"),
        (
            lambda files: files.update({"flat/n0153282900000001.jpg": b"oops"}),
            "cannot read image .*flat/n01532829",
        ),
    ],
)
def test_error_names_the_problem_and_leaves_nothing_behind(small, tmp_path, spoil, fact):
    files = {name.replace("images/", "flat/"): data for name, data in members("flat").items()}
    spoil(files)
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(DataError, match=fact) as raised:
        fetch(tmp_path / "root", as_folder(source, files))
    assert raised.value.exit_code == 3 and raised.value.hint
    assert not list((tmp_path / "root").rglob("*.*"))


@pytest.mark.parametrize("source", ["folder", "files"])
def test_pickles_give_the_same_tasks_as_images(small, tmp_path, source):
    """Each split has the same classes in the same order, with the same images."""
    of_images = fetch(tmp_path / "images", as_folder(tmp_path / "source", members("split")))
    folder = as_pickles(tmp_path / "pickles", of_images)
    packed = fetch(tmp_path / "root", [folder] if source == "folder" else sorted(folder.iterdir()))
    for split, classes in split_classes(packed, "ravi", 0).items():
        others = split_classes(of_images, "ravi", 0)[split]
        assert [packed.names[n] for n in classes] == [of_images.names[n] for n in others]
        for number, other in zip(classes, others, strict=True):
            one, two = packed.starts[number], of_images.starts[other]
            assert np.array_equal(packed.images_MCHW[one : one + 2], of_images.images_MCHW[two : two + 2])


def as_pickles(folder, packed):
    """Write the pickles of a pack, and return its folder."""
    folder.mkdir()
    for split, classes in split_classes(packed, "ravi", 0).items():
        places = np.concatenate([np.arange(IMAGES) + packed.starts[number] for number in classes])
        names = [packed.names[number] for number in classes]
        class_dict = {name: [IMAGES * at, IMAGES * at + 1] for at, name in enumerate(names)}
        images_MHWC = np.asarray(packed.images_MCHW[places].transpose(0, 2, 3, 1)).copy()
        content = {"image_data": images_MHWC, "class_dict": class_dict}
        (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content, 2))
    return folder


@pytest.fixture
def with_twins(small, tmp_path):
    """A pack from a folder with three identical images of two classes, and the folder of its pickles."""
    files = members("flat")
    names = sorted(name for name in files if name.endswith(".jpg") and "images/" in name)
    files[names[0]] = files[names[1]] = files[names[7]]
    packed = fetch(tmp_path / "from images", as_folder(tmp_path / "source", files))
    return packed, as_pickles(tmp_path / "pickles", packed)


def test_same_pixels_from_pickles_and_from_images_are_the_same_pack(with_twins, tmp_path):
    of_images, pickles = with_twins
    notices = []
    packed = fetch(tmp_path / "root", [pickles], on_event=notices.append)
    assert (packed.digest, packed.names) == (of_images.digest, of_images.names)
    assert packed.facts == of_images.facts and len(packed.facts["twins"]) == 2
    texts = [event.text for event in notices if isinstance(event, Notice)]
    assert any("2 pairs of images are identical, 1 of them across classes" in text for text in texts)


def older_pack(root, packed):
    """Pack as older versions packed pickles: the classes in the order of the published list."""
    order = [name for name in CLASSES if name in packed.names]
    images = ((name, image) for name, images in packed.of_classes(order) for image in images)
    stream_pack(root / "mini-imagenet" / "84x84.npy", (3, 84, 84), images)
    return load_pack(root / "mini-imagenet" / "84x84.npy", "mini-imagenet")


def test_older_pack_of_pickles_gets_the_order_and_keeps_its_digest(with_twins, tmp_path):
    of_images, _ = with_twins
    older = older_pack(tmp_path / "root", of_images)
    assert older.digest != of_images.digest
    assert of_images.older_digests == (older.digest,)
    for sorts in (True, False):
        events = []
        packed = imagenet.open_pack(MINI, tmp_path / "root", on_event=events.append)
        assert (packed.digest, packed.older_digests) == (of_images.digest, (older.digest,))
        texts = [event.text for event in events if isinstance(event, Notice)]
        assert ["from an older version: sorting its classes" in text for text in texts] == [True] * sorts
        assert (Progress("mini-imagenet: sort classes", 100, 100) in events) == sorts
    for split, classes in split_classes(older, "ravi", 0).items():  # so the tasks are the same
        now = split_classes(packed, "ravi", 0)[split]
        assert [older.names[number] for number in classes] == [packed.names[number] for number in now]


def test_older_pack_is_sorted_by_one_process_at_a_time(with_twins, tmp_path, monkeypatch):
    older_pack(tmp_path / "root", with_twins[0])
    sort, waits, sorts = imagenet._pack_in_order, threading.Event(), []

    def slow_sort(*arguments):
        sorts.append(arguments)
        assert waits.wait(60), "the other process waits for the lock"
        sort(*arguments)

    def on_event(event):
        if isinstance(event, Notice) and "waiting for" in event.text:
            waits.set()

    monkeypatch.setattr(imagenet, "_pack_in_order", slow_sort)
    with ThreadPoolExecutor(2) as pool:
        roots = [tmp_path / "root"] * 2
        opened = list(pool.map(lambda root: imagenet.open_pack(MINI, root, on_event=on_event), roots))
    assert {packed.digest for packed in opened} == {with_twins[0].digest} and len(sorts) == 1
    assert not list((tmp_path / "root" / "mini-imagenet").glob("*.lock"))


def test_older_pack_in_a_read_only_root_is_used_as_it_is(with_twins, tmp_path, monkeypatch):
    older = older_pack(tmp_path / "root", with_twins[0])

    def refuse(*_, **__):
        raise DataError("cannot write", hint="x")

    monkeypatch.setattr(imagenet, "stream_pack", refuse)
    assert imagenet.open_pack(MINI, tmp_path / "root", on_event=ignore).digest == older.digest


def test_identical_images_are_reported(small, tmp_path):
    files, notices = members("flat"), []
    names = sorted(name for name in files if name.endswith(".jpg") and "images/" in name)
    files[names[0]] = files[names[1]] = files[names[7]]
    packed = fetch(tmp_path / "root", as_folder(tmp_path / "source", files), on_event=notices.append)
    (text,) = [event.text for event in notices if isinstance(event, Notice)]
    assert "2 pairs of images are identical, 1 of them across classes" in text
    pairs = [("n01532829", "n01532829"), ("n01532829", "n01749939")]
    assert [tuple(pair) for pair in packed.facts["twins"]] == pairs


def test_error_without_files_explains_how_to_get_them(tmp_path):
    with pytest.raises(DataError, match="cannot be downloaded: the terms of ImageNet forbid") as raised:
        fetch(tmp_path, None)
    assert "mamlctl fetch mini-imagenet --from" in raised.value.hint


def test_tiered_is_split_by_its_folders(tmp_path, monkeypatch):
    tiny = imagenet.ListedSet("tiered-imagenet", "tieredImageNet", (2, 1, 1), (4, 2, 2), ("ren",), "get it")
    monkeypatch.setattr(imagenet, "TIERED", tiny)
    assert TIERED.classes == (351, 97, 160)
    files = {
        f"{split}/n0000000{number}/{image}.jpg": jpeg(number)
        for number, split in enumerate(("train", "train", "val", "test"))
        for image in range(2)
    }
    packed = fetch(tmp_path / "root", as_folder(tmp_path / "source", files), which=tiny)
    assert packed.names == ("test/n00000003", "train/n00000000", "train/n00000001", "val/n00000002")
    splits = imagenet.split_by_folders(packed, "ren", 0)
    assert {split: part.tolist() for split, part in splits.items()} == {
        "train": [1, 2],
        "val": [3],
        "test": [0],
    }
    files.pop("val/n00000002/1.jpg")
    with pytest.raises(DataError, match="val has 1 class and 1 image instead of 1 and 2"):
        fetch(tmp_path / "other", as_zip(tmp_path / "fewer", files), which=tiny)


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """The real data set, packed from its zips."""
    source = SHARED / "mini-imagenet"
    if not (source / "train.zip").is_file():
        pytest.skip("real mini-ImageNet is not in ../shared/data/mini-imagenet")
    notices = []
    root = tmp_path_factory.mktemp("mini-root")
    return fetch(root, [source], on_event=notices.append), notices, root


@pytest.mark.realdata
def test_real_data_set_has_its_counts_and_eight_pairs_of_twins(real):
    packed, notices, _ = real
    assert packed.images_MCHW.shape == (60_000, 3, 84, 84) and set(packed.counts) == {600}
    splits = split_classes(packed, "ravi", 0)
    assert {split: len(numbers) for split, numbers in splits.items()} == {"train": 64, "val": 16, "test": 20}
    assert len(packed.facts["twins"]) == 8 and sum(a != b for a, b in packed.facts["twins"]) == 7
    assert any(
        "8 pairs of images are identical" in event.text for event in notices if isinstance(event, Notice)
    )


@pytest.mark.realdata
def test_real_pixels_are_those_that_pillow_decodes(real):
    packed, _, _ = real
    with zipfile.ZipFile(SHARED / "mini-imagenet" / "val.zip") as archive:
        name = "val/n01855672/n0185567200000003.jpg"
        pixels = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")).transpose(2, 0, 1)
    first = packed.starts[packed.names.index("n01855672")]
    assert np.array_equal(packed.images_MCHW[first], pixels)
