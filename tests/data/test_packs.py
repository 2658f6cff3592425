"""Packs whose sidecar is damaged: an error that names the file, never another exception."""

import json
import shutil

import numpy as np
import pytest
from helpers.shared import ignore

from mamlctl.core.errors import DataError
from mamlctl.core.files import replacing
from mamlctl.data.reading import packs
from mamlctl.data.reading.packs import load_pack, pack, packs_of, save_pack, verify_pack
from mamlctl.data.sets import glyphs, image_folder

VALUES = [None, True, -1, 1.5, "x", [], [1], ["x"], [None], {}, {"x": 1}, 10**30, [10**30], [[0, 1]]]


@pytest.fixture
def root(tmp_path, glyphs_root):
    """A data root of its own."""
    glyphs.open_pack(glyphs_root, on_event=ignore)
    return shutil.copytree(glyphs_root, tmp_path / "root")


@pytest.mark.parametrize("large", [False, True])
def test_a_sidecar_with_a_value_of_a_wrong_type_is_damage(root, monkeypatch, large):
    if large:  # so that only a sample of its blocks is checked
        monkeypatch.setattr(packs, "DIGEST_CHECKED_BELOW", 0)
    (path,) = packs_of(root / "glyphs")
    sidecar = path.with_suffix(".json")
    whole = json.loads(sidecar.read_text())
    facts = [{"facts": value} for value in VALUES]
    facts += [{"facts": {name: value}} for value in VALUES for name in packs.FACTS]
    for change in [*facts, *({name: value} for name in whole for value in VALUES if name != "facts")]:
        sidecar.write_text(json.dumps(whole | change))
        try:
            packed = load_pack(path, "glyphs")
        except DataError as error:
            assert error.message.startswith(f"{path} "), change
            assert "\n" not in error.message
            assert error.hint == "run mamlctl fetch glyphs --force"
        else:
            assert all(isinstance(digest, str) for digest in packed.older_digests), change
    for value in VALUES:
        sidecar.write_text(json.dumps(value))
        with pytest.raises(DataError, match="is damaged"):
            load_pack(path, "glyphs")


def test_verify_reads_the_pixels_once(root, monkeypatch):
    (path,) = packs_of(root / "glyphs")
    read, blocks = [], packs._blocks
    monkeypatch.setattr(packs, "_digest", lambda *parts: pytest.fail("the mapped pixels are read too"))
    monkeypatch.setattr(packs, "_blocks", lambda file, size: read.append(size) or blocks(file, size))
    packed = verify_pack(path, "glyphs", ignore)
    assert read == [packed.images_MCHW.nbytes]
    assert packed.digest == json.loads(path.with_suffix(".json").read_text())["digest"]


def test_packs_of_a_folder_may_vanish_while_they_are_dropped(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    home = tmp_path / "root" / image_folder.home_of(folder)
    home.mkdir(parents=True)
    (home / "gone.json").symlink_to(home / "nothing")
    found = list(home.glob("*.json"))
    (home / "gone.json").unlink()
    monkeypatch.setattr("pathlib.Path.glob", lambda self, pattern: found)
    image_folder.prepare(folder, tmp_path / "root", (), ignore)


def test_packing_removes_what_killed_processes_have_left_for_the_same_pack(tmp_path):
    names = (".a.npy.killed_1", ".a.json.killed_2", ".a.npy.made_now.new", ".b.npy.killed_3", ".a.npy.backup")
    for name in names:
        (tmp_path / name).write_bytes(b"remnant")
    packed = pack(np.zeros((1, 1, 4, 4), np.uint8), np.array([1]), ("cat",))
    with replacing(tmp_path / "a.npy") as file:
        (writing,) = {path.name for path in tmp_path.iterdir()} - {*names}
        save_pack(tmp_path / "a.npy", packed)
        left = {path.name for path in tmp_path.iterdir()}
        file.write(b"pixels")
    kept = {".a.npy.made_now.new", ".b.npy.killed_3", ".a.npy.backup"}
    assert left == {writing, "a.npy", "a.json"} | kept
    assert (tmp_path / "a.npy").read_bytes() == b"pixels", "a file that is being written is kept"
