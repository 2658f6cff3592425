"""CIFAR-100 from its archive: pixels and classes, errors that name the wrong file, and published splits."""

import hashlib
import io
import os
import pickle
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from helpers.shared import ignore
from PIL import Image

from mamlctl.core.errors import DataError
from mamlctl.data.sets import cifar100, class_splits
from mamlctl.data.sets.cifar100 import CifarPart
from mamlctl.data.sets.registry import DATA_SETS, fetch_or_open

NAMES = cifar100.class_names()
PER_CLASS = {"train": 3, "test": 2}
META = {"fine_label_names": list(NAMES), "coarse_label_names": ["fish"]}


def content(file, seed):
    """The contents of a file of a small CIFAR-100: random labels, and images as rows of colour planes."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(NAMES)), PER_CLASS[file]))
    rows = generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    return {"fine_labels": labels.tolist(), "data": rows, "coarse_labels": [0], "filenames": ["x.png"]}


CONTENTS = {file: content(file, seed) for seed, file in enumerate(PER_CLASS)}


def files(**changed):
    """Name in the archive -> bytes, with the pickles in `changed` replaced."""
    contents = {"meta": META, **CONTENTS}
    return {
        f"cifar-100-python/{file}": changed.get(file, pickle.dumps(contents[file], 2)) for file in contents
    }


PARTS = tuple(
    CifarPart(file, PER_CLASS[file], hashlib.md5(files()[f"cifar-100-python/{file}"]).hexdigest())
    for file in PER_CLASS
)


def write_tar(path, members, mode="w:gz"):
    with tarfile.open(path, mode, **({"compresslevel": 1} if mode == "w:gz" else {})) as archive:
        folder = tarfile.TarInfo("cifar-100-python")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in {"cifar-100-python/file.txt~": b"", **members}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def archive(tmp_path):
    (tmp_path / "source").mkdir()
    return write_tar(tmp_path / "source" / "cifar-100-python.tar.gz", files())


@pytest.fixture
def fetch(tmp_path):
    """Fetch the small data set into a new root."""

    def call(*sources, parts=PARTS, name="cifar-fs", force=False, on_event=ignore):
        root = tmp_path / "root"
        root.mkdir(exist_ok=True)
        data_set = replace(DATA_SETS[name], prepare=partial(cifar100.prepare, parts=parts))
        options = {"offline": True, "force": force, "on_event": on_event}
        return fetch_or_open(data_set, root, source=sources or None, **options)

    return call


def refused(fetch, tmp_path, *sources, match):
    """The fetch raises a DataError with one line and a hint, and leaves the root empty."""
    with pytest.raises(DataError, match=match) as raised:
        fetch(*sources)
    assert "\n" not in raised.value.message
    assert raised.value.hint and "\n" not in raised.value.hint
    assert list((tmp_path / "root").iterdir()) == []


def test_classes_and_pixels_are_those_of_the_files(fetch, archive):
    packed = fetch(archive)
    assert packed.names == NAMES
    assert packed.counts.tolist() == [5] * 100
    assert packed.images_MCHW.shape == (500, 3, 32, 32)
    for label in (0, 41, 99):
        # First the images of train, in the order of the file; a row is three planes of 1,024 bytes.
        rows = np.concatenate(
            [values["data"][np.array(values["fine_labels"]) == label] for values in CONTENTS.values()]
        )
        images = packed.images_MCHW[packed.starts[label] : packed.starts[label + 1]]
        assert np.array_equal(images[:, 0].reshape(5, 1024), rows[:, :1024])
        assert np.array_equal(images[:, 2].reshape(5, 1024), rows[:, 2048:])
        assert images[4, 1, 2, 3] == rows[4, 1024 + 2 * 32 + 3]


def test_archive_and_folder_give_the_same_data_set(fetch, archive, tmp_path):
    digests = {fetch(archive).digest, fetch(archive.parent, force=True).digest}
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    for source in (tmp_path / "unpacked", tmp_path / "unpacked" / "cifar-100-python"):
        digests.add(fetch(source, force=True).digest)
    digests.add(fetch(write_tar(tmp_path / "plain.tar", files(), "w"), force=True).digest)
    digests.add(fetch(tmp_path / "nothing-yet", archive, force=True).digest)
    assert len(digests) == 1


def class_folders(path, *, kind="png", name="{part}/{label}/{number}"):
    """Write the images of every class; they are numbered in the order of the file."""
    for part, values in CONTENTS.items():
        for number, (row, label) in enumerate(zip(values["data"], values["fine_labels"], strict=True)):
            file = path / f"{name.format(part=part, label=NAMES[label], number=number)}.{kind}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(row.reshape(3, 32, 32).transpose(1, 2, 0)).save(file)
    return path


def test_class_folders_give_the_same_data_set(fetch, archive, tmp_path):
    digest, notices = fetch(archive).digest, []
    folder = class_folders(tmp_path / "folders")
    assert (folder / "train" / "train").is_dir()  # a class of this name in a part of this name
    assert fetch(folder, force=True, on_event=notices.append).digest == digest
    assert "only the original archive can be verified" in notices[-1].text
    with zipfile.ZipFile(tmp_path / "folders.zip", "w") as zipped:
        for file in folder.rglob("*.png"):
            zipped.write(file, file.relative_to(folder))
    assert fetch(tmp_path / "folders.zip", force=True).digest == digest
    class_folders(folder, name="__MACOSX/{part}/{label}/._{number}")  # macOS adds such files to zips
    assert fetch(folder, force=True).digest == digest
    joined = class_folders(tmp_path / "joined", name="data/{label}/{part[1]}{number:05d}")
    assert fetch(joined, force=True).counts.tolist() == [5] * 100


def test_class_folders_that_are_not_the_complete_data_set(fetch, tmp_path):
    folder = class_folders(tmp_path / "folders")
    first = next((folder / "test" / "apple").iterdir())
    first.rename(tmp_path / "kept.png")
    refused(fetch, tmp_path, folder, match="folders has 4 images of class apple, not 5")
    Image.new("RGB", (84, 84)).save(first)
    refused(fetch, tmp_path, folder, match=r"image folders/test/apple/.* has 84x84 pixels, but .* 32x32")
    first.write_bytes(b"no image")
    refused(fetch, tmp_path, folder, match="cannot read image folders/test/apple/")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_any_protocol_are_read(fetch, tmp_path, protocol):
    changed = {file: pickle.dumps(values, protocol) for file, values in CONTENTS.items()}
    parts = [
        CifarPart(file, PER_CLASS[file], hashlib.md5(data).hexdigest()) for file, data in changed.items()
    ]
    packed = fetch(write_tar(tmp_path / "other.tar.gz", files(**changed)), parts=parts)
    assert packed.images_MCHW.shape == (500, 3, 32, 32)


def test_both_data_sets_share_one_pack(fetch, archive, tmp_path):
    fetch(archive, name="fc100")
    root = tmp_path / "root"
    assert [str(file.relative_to(root)) for file in sorted(root.rglob("*.npy"))] == ["cifar-100/32x32.npy"]
    digests = set()
    for name in ("cifar-fs", "fc100"):
        assert DATA_SETS[name].is_here(root)
        packed = DATA_SETS[name].open_pack(root, "none", on_event=ignore)
        splits = DATA_SETS[name].split_classes(packed, DATA_SETS[name].split_schemes[0], 0)
        assert packed.images_MCHW.shape[1:] == DATA_SETS[name].image_shape_CHW
        assert {split: len(classes) for split, classes in splits.items()} == {
            "cifar-fs": {"train": 64, "val": 16, "test": 20},
            "fc100": {"train": 60, "val": 20, "test": 20},
        }[name]
        digests.add(packed.digest)
        notices = []
        fetch_or_open(DATA_SETS[name], root, offline=True, on_event=notices.append)
        assert notices[0].text.startswith(f"{name} is already in")
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["cifar-fs", "fc100"])
def test_error_for_a_missing_data_set_has_its_command(tmp_path, name):
    data_set = DATA_SETS[name]
    with pytest.raises(DataError, match=f"^{name} is not in") as raised:
        data_set.open_pack(tmp_path, "none", on_event=ignore)
    assert raised.value.hint == f"run mamlctl fetch {name}"
    with pytest.raises(DataError, match="--offline forbids") as raised:
        fetch_or_open(data_set, tmp_path, offline=True, on_event=ignore)
    assert raised.value.hint.startswith(f"run mamlctl fetch {name}")


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def changed(file, **values):
    return pickle.dumps({**CONTENTS[file], **values}, 2)


def labels_with(label):
    return [label, *CONTENTS["train"]["fine_labels"][1:]]


FIRST = CONTENTS["train"]["fine_labels"][0]
WRONG = {
    "counts": (
        {"train": changed("train", fine_labels=labels_with((FIRST + 1) % 100))},
        r"train in .* has [24] images of class [a-z_]+, not 3",
    ),
    "fewer": (
        {"test": changed("test", fine_labels=[0], data=CONTENTS["test"]["data"][:1])},
        "test in .* has 1 image of class apple, not 2",
    ),
    "pixels": (
        {"test": changed("test", data=CONTENTS["test"]["data"] ^ 1)},
        "test in .* but not its bytes: md5",
    ),
    "label too large": ({"train": changed("train", fine_labels=labels_with(100))}, "outside 0 to 99"),
    "negative label": ({"train": changed("train", fine_labels=labels_with(-1))}, "outside 0 to 99"),
    "label of another type": ({"train": changed("train", fine_labels=labels_with("a"))}, "outside 0 to 99"),
    "rows missing": (
        {"train": changed("train", data=CONTENTS["train"]["data"][1:])},
        r"train in .* contains uint8 \(299, 3072\), not 300 rows of 3,072 bytes",
    ),
    "floats": (
        {"train": changed("train", data=CONTENTS["train"]["data"].astype("f4"))},
        r"contains float32 \(300, 3072\)",
    ),
    "no labels": (
        {"train": pickle.dumps({"data": CONTENTS["train"]["data"]})},
        "has no list called fine_labels",
    ),
    "no data": ({"train": changed("train", data=[1, 2])}, "train in .* has no ndarray called data"),
    "a list": ({"train": pickle.dumps([1, 2])}, "train in .* has no ndarray called data"),
    "names": ({"meta": pickle.dumps({"fine_label_names": list(NAMES[::-1])})}, "meta in .* does not list"),
    "no names": ({"meta": pickle.dumps({})}, "meta in .* has no list called fine_label_names"),
    "cut off": ({"test": files()["cifar-100-python/test"][:-50]}, "test in .* is cut off or unreadable"),
    "no pickle": ({"train": b"<html>"}, "train in .* is not a valid pickle of arrays"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_error_names_the_wrong_file(fetch, tmp_path, wrong):
    replaced, match = WRONG[wrong]
    refused(fetch, tmp_path, write_tar(tmp_path / "cifar.tar.gz", files(**replaced)), match=match)


def test_attack_in_a_file_runs_nothing(fetch, tmp_path):
    mark = tmp_path / "ran"
    for file in ("meta", "train", "test"):
        evil = pickle.dumps({**(CONTENTS | {"meta": META})[file], "batch_label": Touch(mark)}, 2)
        path = write_tar(tmp_path / "evil.tar.gz", files(**{file: evil}))
        refused(fetch, tmp_path, path, match=f"{file} in .*evil.tar.gz is refused: it uses 'posix.system'")
    assert not mark.exists()


def test_an_archive_that_is_cut_off_or_damaged_is_refused(fetch, archive, tmp_path):
    data = archive.read_bytes()
    archive.write_bytes(b"")
    refused(fetch, tmp_path, archive, match="is neither a zip nor a tar")
    for length in (10, 1000, len(data) // 2, len(data) - 1000):
        archive.write_bytes(data[:length])
        refused(fetch, tmp_path, archive, match="is damaged or cut off")
    archive.write_bytes(data[:5000] + bytes(100) + data[5100:])
    refused(fetch, tmp_path, archive, match="is damaged or cut off")
    archive.write_bytes(b"<html>Quota exceeded</html>")
    refused(fetch, tmp_path, archive, match="is an HTML page, not an archive")


def test_an_archive_without_a_file_is_refused(fetch, tmp_path):
    members = files()
    del members["cifar-100-python/test"]
    path = write_tar(tmp_path / "less.tar.gz", members)
    refused(fetch, tmp_path, path, match=r"less.tar.gz does not contain the file cifar-100-python/test")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "C:\\evil", "..\\evil"])
def test_an_unsafe_name_is_refused(fetch, tmp_path, name):
    path = write_tar(tmp_path / "evil.tar.gz", {name: b"evil", **files()})
    refused(fetch, tmp_path, path, match="contains a file with the unsafe name")


def test_a_file_that_is_too_large_is_refused(fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar100, "FILE_BYTES", 1000)
    path = write_tar(tmp_path / "a.tar.gz", files())
    refused(fetch, tmp_path, path, match="bytes, more than the limit of 1,000")


def test_links_are_not_followed(fetch, tmp_path):
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as archive:
        for file in ("meta", "train", "test"):
            link = tarfile.TarInfo(f"cifar-100-python/{file}")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    refused(fetch, tmp_path, path, match="which is a link or a device")


def test_sources_without_cifar_are_refused(fetch, tmp_path):
    for folder in ("train", "test", "meta"):  # of another data set
        (tmp_path / "other" / folder).mkdir(parents=True)
    match = "contains neither cifar-100-python.tar.gz nor a folder"
    refused(fetch, tmp_path, tmp_path / "other", match=match)


def test_archive_has_the_address_of_torchvision():
    from torchvision.datasets import CIFAR100

    (source,) = cifar100.archives()
    assert source.file == CIFAR100.filename == "cifar-100-python.tar.gz"
    (url,) = source.urls
    assert url.startswith("https://") and url.endswith(source.file)
    assert source.md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    upstream = dict(CIFAR100.train_list + CIFAR100.test_list)
    assert {part.file: part.md5 for part in cifar100.PARTS} == upstream


# The published splits.


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("mini-imagenet", (64, 16, 20)), ("cifar-fs", (64, 16, 20)), ("fc100", (60, 20, 20))],
)
def test_lists_are_complete_and_disjoint(name, numbers):
    listed = class_splits.listed_split(name)
    assert len(listed) == 100  # each class once
    assert Counter(listed.values()) == dict(zip(class_splits.SPLITS, numbers, strict=True))


def test_both_cifar_lists_have_the_same_classes():
    assert class_splits.listed_split("fc100").keys() == set(NAMES)
    assert (NAMES[0], NAMES[19], NAMES[-1]) == ("apple", "cattle", "worm")  # labels 0, 19 and 99


def test_fc100_never_splits_a_superclass():
    listed = class_splits.listed_split("fc100")
    for superclass, split in (
        ("beaver dolphin otter seal whale", "val"),
        ("bear leopard lion tiger wolf", "test"),
        ("bicycle bus motorcycle pickup_truck train", "train"),
    ):
        splits = {listed[name] for name in superclass.split()}
        assert len(splits) == 1, (superclass, split)


def test_lists_equal_their_sources():
    from conftest import SHARED

    folder = SHARED / "splits"
    if not folder.is_dir():
        pytest.skip("the class lists are not in ../shared/data/splits")
    for name in ("cifar-fs", "fc100"):
        listed = class_splits.listed_split(name)
        for split in class_splits.SPLITS:
            names = (folder / name / f"{split}_classes.txt").read_text().split()
            assert [one for one, place in listed.items() if place == split] == names
    listed = class_splits.listed_split("mini-imagenet")
    for split in class_splits.SPLITS:
        lines = (folder / "miniImagenet" / f"{split}.csv").read_text().split()[1:]
        names = dict.fromkeys(line.split(",")[1] for line in lines)
        assert [one for one, place in listed.items() if place == split] == list(names)


def test_classes_of_another_data_set_are_refused(fetch, archive):
    packed = fetch(archive)
    with pytest.raises(
        DataError, match="the classes are not those of mini-imagenet: 200 differ, for example"
    ):
        class_splits.split_classes(packed, "ravi", 0)
