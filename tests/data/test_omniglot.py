"""The real Omniglot: counts, pixels and splits."""

import io
import zipfile

import numpy as np
import pytest
from helpers.shared import ignore
from PIL import Image

from mamlctl.core.errors import DataError
from mamlctl.core.events import Notice, Progress
from mamlctl.data.sets import omniglot
from mamlctl.data.sets.registry import fetch_or_open, find_data_set

pytestmark = pytest.mark.realdata


@pytest.fixture(scope="module")
def packed(omniglot_root):
    return omniglot.open_pack(omniglot_root, on_event=ignore)


def test_counts_are_the_published_ones(packed):
    assert packed.images_MCHW.shape == (32_460, 1, 28, 28)
    assert len(packed.names) == 1623
    assert (packed.counts == 20).all()
    alphabets = {tuple(name.split("/")[:2]) for name in packed.names}
    assert len(alphabets) == 50
    assert sum(part == "background" for part, _ in alphabets) == 30
    assert sum(name.startswith("background/") for name in packed.names) == 964
    assert packed.names[0] == "background/Alphabet_of_the_Magi/character01"
    assert packed.names[-1] == "evaluation/ULOG/character26"


def upstream_image(folder, name, drawing):
    """The drawing in the archive, read by code independent of the package."""
    part, alphabet, character = name.split("/")
    with zipfile.ZipFile(folder / f"images_{part}.zip") as archive:
        inside = f"images_{part}/{alphabet}/{character}/"
        names = sorted(entry for entry in archive.namelist() if entry.startswith(inside))
        return Image.open(io.BytesIO(archive.read(names[drawing])))


def test_nearest_gives_the_pixels_of_the_official_code(omniglot_root, omniglot_zips):
    """It resizes the 1-bit image to 28x28 with LANCZOS, for which Pillow uses nearest."""
    official = omniglot.open_pack(omniglot_root, "nearest", on_event=ignore)
    assert set(np.unique(official.images_MCHW)) == {0, 255}
    assert official.images_MCHW.mean() / 255 == pytest.approx(0.917, abs=0.005)  # paper is 1 there too
    for image in range(7, 32_460, 3001):
        drawing = upstream_image(omniglot_zips, official.names[image // 20], image % 20)
        assert drawing.mode == "1"
        want = np.asarray(drawing.resize((28, 28), resample=Image.Resampling.LANCZOS))
        assert (official.images_MCHW[image, 0] == 255 * want).all()


def test_default_filter_shrinks_grey_values(packed, omniglot_zips):
    for image in range(11, 32_460, 4001):
        grey = upstream_image(omniglot_zips, packed.names[image // 20], image % 20).convert("L")
        want = np.asarray(grey.resize((28, 28), resample=Image.Resampling.BILINEAR))
        assert (packed.images_MCHW[image, 0] == want).all()


def test_originals_are_kept_whole(omniglot_root, omniglot_zips):
    originals = omniglot.load_pack(omniglot_root / "omniglot" / "originals-105.npy", "omniglot")
    for image in (0, 19_279, 19_280, 32_459):
        drawing = upstream_image(omniglot_zips, originals.names[image // 20], image % 20)
        pixels = np.unpackbits(originals.images_MCHW[image, 0], axis=-1)[:, :105]
        assert (pixels == np.asarray(drawing)).all()


def test_splits_are_disjoint_and_have_the_published_sizes(packed):
    sizes = {"maml++": (1150, 50, 423), "vinyals": (1028, 172, 423)}
    for scheme in find_data_set("omniglot").split_schemes:
        splits = omniglot.split_classes(packed, scheme, 0)
        assert sorted(np.concatenate(list(splits.values()))) == list(range(1623))
        assert list(splits) == ["train", "val", "test"]
        if scheme in sizes:
            assert tuple(map(len, splits.values())) == sizes[scheme]


def alphabets_of(packed, classes):
    return {packed.names[number].split("/")[1] for number in classes}


def test_vinyals_splits_have_the_published_alphabets(packed):
    splits = omniglot.split_classes(packed, "vinyals", 0)
    assert alphabets_of(packed, splits["val"]) == set(omniglot.VINYALS_VAL)
    whole = {
        "Kannada",
        "Keble",
        "Malayalam",
        "Manipuri",
        "Mongolian",
        "Old_Church_Slavonic_(Cyrillic)",
        "Oriya",
        "Syriac_(Serto)",
        "Sylheti",
        "Tengwar",
        "Tibetan",
        "ULOG",
    }
    assert alphabets_of(packed, splits["test"]) == {*whole, "Gurmukhi"}
    gurmukhi = [packed.names[n] for n in splits["test"] if "/Gurmukhi/" in packed.names[n]]
    assert gurmukhi == [f"evaluation/Gurmukhi/character{number}" for number in (42, 43, 44, 45)]
    assert not alphabets_of(packed, splits["train"]) & {*whole, *omniglot.VINYALS_VAL}


def test_lake_tests_on_the_evaluation_archive_and_validates_on_whole_alphabets(packed):
    splits = omniglot.split_classes(packed, "lake", 0)
    assert splits["test"].tolist() == list(range(964, 1623))
    assert len(alphabets_of(packed, splits["val"])) == 5
    assert not alphabets_of(packed, splits["val"]) & alphabets_of(packed, splits["train"])
    assert (omniglot.split_classes(packed, "lake", 1)["val"][:5] != splits["val"][:5]).any()


def test_mamlpp_split_has_its_own_seed(packed):
    first, again, other = (omniglot.split_classes(packed, "maml++", seed) for seed in (0, 0, 1))
    assert all((first[split] == again[split]).all() for split in first)
    assert not np.array_equal(first["test"], other["test"])


def test_fetch_again_changes_nothing_and_sends_a_notice(omniglot_root, packed):
    before = {file.name: file.stat().st_mtime_ns for file in (omniglot_root / "omniglot").iterdir()}
    events = []
    fetched = fetch_or_open(find_data_set("omniglot"), omniglot_root, offline=True, on_event=events.append)
    assert fetched.digest == packed.digest
    assert events == [Notice(f"omniglot is already in {omniglot_root}; --force prepares it again")]
    after = {file.name: file.stat().st_mtime_ns for file in (omniglot_root / "omniglot").iterdir()}
    assert {name: after[name] for name in before} == before


def test_error_for_a_missing_data_set_has_the_command(tmp_path):
    with pytest.raises(DataError, match=f"omniglot is not in {tmp_path}") as raised:
        find_data_set("omniglot").open_pack(tmp_path, "box", on_event=ignore)
    assert raised.value.hint == "run mamlctl fetch omniglot"
    assert list(tmp_path.iterdir()) == []


def test_packing_another_filter_reports_progress(omniglot_root):
    events = []
    omniglot.open_pack(omniglot_root, "box", on_event=events.append)
    assert events[-1] == Progress("omniglot: shrink images", 32_000, 32_460)
    again = []
    omniglot.open_pack(omniglot_root, "box", on_event=again.append)
    assert again == []


def test_a_zip_with_other_files_is_not_called_missing(tmp_path):
    for part in omniglot.PARTS:
        with zipfile.ZipFile(tmp_path / f"{part.folder}.zip", "w") as archive:
            archive.writestr("readme.txt", "text")
    with pytest.raises(DataError) as raised:
        omniglot.prepare(tmp_path / "root", [tmp_path], ignore)
    path = tmp_path / "images_background.zip"
    example = "images_background/Greek/character01/0001_01.png"
    assert raised.value.message == f"{path} has no images with names like {example}"
    assert raised.value.hint == "download the archive again"
