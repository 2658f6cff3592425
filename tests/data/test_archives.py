"""Archives that are damaged or wrong: the error has two lines, and nothing is left behind."""

import zipfile
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from helpers.data_cases import png, tiny_members, tiny_part, write_zip
from helpers.server_cases import HTML
from helpers.shared import ignore

from mamlctl.core.errors import DataError
from mamlctl.data.reading import archives
from mamlctl.data.sets import omniglot
from mamlctl.data.sets.registry import DATA_SETS, fetch_or_open

FOLDERS = ("images_background", "images_evaluation")


@pytest.fixture(scope="module")
def tiny():
    """Members of two tiny archives, and the parts that describe them."""
    content = {folder: tiny_members(folder, seed) for seed, folder in enumerate(FOLDERS)}
    members = {folder: pngs for folder, (pngs, _) in content.items()}
    return members, tuple(tiny_part(folder, pixels) for folder, (_, pixels) in content.items())


@pytest.fixture
def source(tmp_path, tiny):
    """A folder with the two tiny zips."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name, members in tiny[0].items():
        write_zip(folder / f"{name}.zip", members)
    return folder


@pytest.fixture
def fetch(tmp_path, tiny):
    """Fetch the tiny data set into a new root."""

    def call(*sources, parts=tiny[1], on_event=ignore, force=False):
        root = tmp_path / "root"
        root.mkdir(exist_ok=True)
        data_set = replace(DATA_SETS["omniglot"], prepare=partial(omniglot.prepare, parts=parts))
        return fetch_or_open(data_set, root, source=sources or None, force=force, on_event=on_event)

    return call


def assert_refused(fetch, tmp_path, *sources, match):
    """The fetch raises a DataError with one line and a hint, and leaves the root empty."""
    with pytest.raises(DataError, match=match) as raised:
        fetch(*sources)
    assert raised.value.exit_code == 3
    assert "\n" not in raised.value.message
    assert raised.value.hint and "\n" not in raised.value.hint
    assert list((tmp_path / "root").iterdir()) == []


def unpacked(source, folder):
    """Unpack the two archives of `source` into `folder`."""
    for name in FOLDERS:
        with zipfile.ZipFile(source / f"{name}.zip") as archive:
            archive.extractall(folder)
    return folder


def test_zips_folders_and_files_give_the_same_data_set(fetch, source, tmp_path):
    digests = {fetch(source).digest}
    for sources in (
        [source / f"{name}.zip" for name in FOLDERS],
        [unpacked(source, tmp_path / "unpacked")],
        [tmp_path / "unpacked" / name for name in FOLDERS],
        [source / "images_background.zip", tmp_path / "unpacked" / "images_evaluation"],
    ):
        digests.add(fetch(*sources, force=True).digest)
    assert len(digests) == 1


def test_only_verified_files_reach_the_root(fetch, source, tmp_path):
    packed = fetch(source)
    assert packed.names[:2] == ("background/Alphabet_0/character01", "background/Alphabet_0/character02")
    assert packed.counts.tolist() == [4] * 12
    names = sorted(file.name for file in (tmp_path / "root" / "omniglot").iterdir())
    assert names == [
        f"{stem}.{kind}" for stem in ("28x28-bilinear", "originals-105") for kind in ("json", "npy")
    ]


def test_damaged_originals_are_reported_and_force_fixes_them(fetch, source, tmp_path):
    digest = fetch(source).digest
    original = tmp_path / "root" / "omniglot" / "originals-105.npy"
    original.write_bytes(original.read_bytes()[:-9])
    with pytest.raises(DataError, match="originals-105") as raised:
        omniglot.open_pack(tmp_path / "root", "box", on_event=ignore)
    assert raised.value.hint == "run mamlctl fetch omniglot --force"
    assert fetch(source, force=True).digest == digest
    omniglot.open_pack(tmp_path / "root", "box", on_event=ignore)


def test_a_truncated_zip_is_refused(fetch, source, tmp_path):
    path = source / "images_evaluation.zip"
    path.write_bytes(path.read_bytes()[:-200])
    assert_refused(fetch, tmp_path, source, match="images_evaluation.zip is a zip that is cut off")


def test_a_zip_with_damaged_bytes_is_refused(fetch, source, tmp_path):
    path = source / "images_background.zip"
    data = bytearray(path.read_bytes())
    data[300:310] = bytes(10)
    path.write_bytes(data)
    assert_refused(
        fetch, tmp_path, source, match=r"images_background.zip is damaged at images_background/Alph"
    )


def test_an_html_page_in_place_of_a_zip_is_named(fetch, source, tmp_path):
    (source / "images_background.zip").write_bytes(HTML)
    assert_refused(
        fetch,
        tmp_path,
        source,
        match=r"images_background.zip is an HTML page \(Quota exceeded\), not an archive",
    )


def test_wrong_count_names_both_numbers(fetch, source, tmp_path, tiny):
    members = dict(list(tiny[0]["images_background"].items())[:-1])
    write_zip(source / "images_background.zip", members)
    match = "contains 2 alphabets, 6 characters and 23 images, but Omniglot's has 2, 6 and 24"
    assert_refused(fetch, tmp_path, source, match=match)


def test_wrong_pixels_are_refused(fetch, source, tmp_path, tiny):
    members = dict(tiny[0]["images_background"])
    first, second, *_ = members
    members[first] = members[second]
    write_zip(source / "images_background.zip", members)
    assert_refused(fetch, tmp_path, source, match="but not its pixels: digest")


@pytest.mark.parametrize(
    "name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "C:\\evil.png", "..\\evil"]
)
def test_an_unsafe_name_is_refused(fetch, source, tmp_path, tiny, name):
    write_zip(source / "images_background.zip", {**tiny[0]["images_background"], name: b"evil"})
    assert_refused(fetch, tmp_path, source, match="contains a file with the unsafe name")
    assert not list(tmp_path.rglob("evil*"))


def test_a_member_that_is_too_large_is_refused(fetch, source, tmp_path, tiny):
    bomb = {**tiny[0]["images_background"], "images_background/bomb.png": bytes(archives.MEMBER_BYTES + 1)}
    write_zip(source / "images_background.zip", bomb)
    match = "'images_background/bomb.png' has 16,777,217 bytes, more than the limit of 16,777,216"
    assert_refused(fetch, tmp_path, source, match=match)


def test_an_encrypted_member_is_refused(fetch, source, tmp_path):
    path = source / "images_background.zip"
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the encryption bit of the first entry of the directory
    path.write_bytes(data)
    assert_refused(fetch, tmp_path, source, match="contains the encrypted file")


def small_png():
    return png(np.ones((8, 8), dtype=bool))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda data: b"not an image", "cannot read image images_background/Alphabet_0/character02"),
        (lambda data: data[: len(data) // 2], "cannot read image images_background/Alphabet_0/character02"),
        (lambda data: b"", "cannot read image images_background/Alphabet_0/character02"),
        (lambda data: small_png(), "has mode 1, 8x8 pixels, but Omniglot's have mode 1, 105x105 pixels"),
    ],
)
def test_unreadable_image_is_named(fetch, source, tmp_path, tiny, damage, match):
    members = dict(tiny[0]["images_background"])
    name = "images_background/Alphabet_0/character02/0002_03.png"
    members[name] = damage(members[name])
    write_zip(source / "images_background.zip", members)
    assert_refused(fetch, tmp_path, source, match=match)


def test_sources_without_archives_are_refused(fetch, source, tmp_path):
    assert_refused(fetch, tmp_path, tmp_path / "nowhere", match=r"there is no .*nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(fetch, tmp_path, empty, match="contains neither images_background.zip nor a folder")
    only = source / "images_background.zip"
    assert_refused(fetch, tmp_path, only, match="contains neither images_evaluation.zip nor a folder")


def test_offline_error_has_the_command(tmp_path):
    with pytest.raises(DataError, match="--offline forbids") as raised:
        fetch_or_open(DATA_SETS["omniglot"], tmp_path, offline=True, on_event=ignore)
    assert "mamlctl fetch omniglot" in raised.value.hint
    assert list(tmp_path.iterdir()) == []


def test_archives_have_the_addresses_of_torchvision():
    sources = omniglot.archives()
    assert [source.file for source in sources] == [f"{name}.zip" for name in FOLDERS]
    urls = [(source.file, url) for source in sources for url in source.urls]
    assert len(urls) == 4
    assert all(url.startswith("https://") and url.endswith(file) for file, url in urls)
    assert sum(source.bytes for source in sources) == DATA_SETS["omniglot"].download_bytes
    # From ../shared/data/README.md, measured on the upstream files.
    assert [source.md5 for source in sources] == [
        "68d2efa1b9178cc56df9314c21c6e718",
        "6b91aef0f799c5bb55b94e3f2daec811",
    ]
