"""The built-in data set: reproducible pixels, distinct classes, moderate difficulty; and its pack."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from helpers.data_cases import image_stream
from helpers.shared import ignore

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.data.reading.packs import load_pack
from mamlctl.data.rules import choice_problems
from mamlctl.data.sets import glyphs
from mamlctl.data.sets.registry import DATA_SETS, fetch_or_open, find_data_set
from mamlctl.settings.schema import TrainConfig


@pytest.fixture
def packed(glyphs_root):
    return glyphs.open_pack(glyphs_root, on_event=ignore)


def test_data_set_has_its_size_and_conventions(packed):
    assert packed.images_MCHW.shape == (8000, 1, 28, 28)
    assert packed.images_MCHW.dtype == np.uint8
    assert (packed.counts == 20).all()
    assert len(set(packed.names)) == 400
    paper = (packed.images_MCHW == 255).mean((1, 2, 3))
    ink = (packed.images_MCHW < 64).mean((1, 2, 3))
    assert paper.min() > 0.3
    assert ink.min() > 0.005  # no drawing is empty
    assert len(np.unique(packed.images_MCHW.reshape(8000, -1), axis=0)) == 8000


def test_drawing_again_gives_the_same_pixels(packed):
    again = glyphs.draw(ignore, classes=20)
    assert (again.images_MCHW == packed.images_MCHW[:400]).all()
    assert again.names == packed.names[:20]


def test_pixels_alone_separate_classes_but_not_well(packed):
    """A nearest neighbour on pixels is far above chance (0.2), but far below what a learner can reach."""
    classes = glyphs.split_classes(packed, "own", 0)["test"]
    settings = {
        "ways": 5,
        "shots": 1,
        "queries": 1,
        "rotations": "none",
        "ink": 1,
    }
    tasks = image_stream(packed, classes, split="test", **settings).episodes(0, 1000)
    nearest_TE = torch.cdist(tasks.query_x_TECHW.flatten(2), tasks.support_x_TECHW.flatten(2)).argmin(-1)
    assert 0.45 < (nearest_TE == tasks.query_y_TE).double().mean() < 0.75


def test_splits_cover_all_classes_once(packed):
    splits = glyphs.split_classes(packed, "own", 0)
    assert {split: len(classes) for split, classes in splits.items()} == {"train": 300, "val": 40, "test": 60}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(400))
    other = glyphs.split_classes(packed, "own", 1)
    assert (splits["train"] != other["train"]).any()
    assert (splits["train"] == glyphs.split_classes(packed, "own", 0)["train"]).all()


def damage_truncate(array, sidecar):
    array.write_bytes(array.read_bytes()[:-1000])


def damage_pixel(array, sidecar):
    data = bytearray(array.read_bytes())
    data[-1] ^= 255
    array.write_bytes(data)


def damage_empty(array, sidecar):
    array.write_bytes(b"")


def damage_missing(array, sidecar):
    array.unlink()


def damage_json(array, sidecar):
    sidecar.write_text("{")


def damage_format(array, sidecar):
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "format": 99}))


def damage_shape(array, sidecar):
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "shape": [1, 2]}))


def damage_names(array, sidecar):
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "names": ["a"]}))


def damage_list(array, sidecar):
    sidecar.write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_pixel,
        damage_empty,
        damage_missing,
        damage_json,
        damage_format,
        damage_shape,
        damage_names,
        damage_list,
    ],
)
def test_damaged_pack_is_reported_with_a_hint_to_force(damage, tmp_path, glyphs_root):
    folder = tmp_path / "glyphs"
    folder.mkdir()
    for file in (glyphs_root / "glyphs").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (array,), (sidecar,) = folder.glob("*.npy"), folder.glob("*.json")
    damage(array, sidecar)
    with pytest.raises(DataError) as raised:
        glyphs.open_pack(tmp_path, on_event=ignore)
    assert str(array) in raised.value.message
    assert raised.value.hint == "run mamlctl fetch glyphs --force"
    assert "\n" not in raised.value.message


def test_force_draws_again(tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "draw", partial(glyphs.draw, classes=2))
    first = fetch_or_open(find_data_set("glyphs"), tmp_path, offline=True, on_event=ignore)
    (array,) = (tmp_path / "glyphs").glob("*.npy")
    damage_pixel(array, None)
    assert (
        fetch_or_open(find_data_set("glyphs"), tmp_path, offline=True, force=True, on_event=ignore).digest
        == first.digest
    )
    assert sorted(file.suffix for file in (tmp_path / "glyphs").iterdir()) == [".json", ".npy"]
    assert load_pack(array, "glyphs").digest == first.digest


def test_root_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        fetch_or_open(find_data_set("glyphs"), tmp_path / "file", offline=True, force=True, on_event=ignore)


def test_glyphs_are_always_available(tmp_path):
    assert glyphs.is_here(tmp_path)
    assert not DATA_SETS["omniglot"].is_here(tmp_path)


def test_local_archives_have_no_effect_on_a_drawn_set(tmp_path):
    with pytest.raises(SettingsError, match="--from has no effect on glyphs"):
        fetch_or_open(find_data_set("glyphs"), tmp_path, source=[tmp_path], offline=True, on_event=ignore)


def test_data_sets_are_opened_by_name(glyphs_root):
    data_set = find_data_set("glyphs")
    packed = data_set.open_pack(glyphs_root, "none", on_event=ignore)
    assert packed.images_MCHW.shape[1:] == data_set.image_shape_CHW
    assert set(data_set.split_classes(packed, "own", 0)) == {"train", "val", "test"}
    assert all(name == data_set.name for name, data_set in DATA_SETS.items())


def test_error_for_an_unknown_choice_has_the_nearest():
    assert choice_problems(TrainConfig(dataset="omniglott")) == [
        ("unknown data set 'omniglott'", "did you mean 'omniglot'?")
    ]
    assert choice_problems(TrainConfig(split_scheme="vinyal", resize="none")) == [
        ("omniglot has no --split-scheme 'vinyal'", "did you mean 'vinyals'?"),
        ("omniglot has no --resize 'none'", "use bilinear or bicubic or lanczos or box or nearest"),
    ]
