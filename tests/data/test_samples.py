"""The images of `fetch samples`."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamlctl.core.errors import DataError
from mamlctl.data.reading.image_files import read_image
from mamlctl.data.samples import CLASSES, NAME, NEXT, QUERIES, SIDE, write_samples
from mamlctl.data.sets import glyphs
from mamlctl.data.tasks.user_images import Reader, find_queries, read_support


@pytest.fixture
def events(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return []


def test_the_folders_are_a_support_set_and_labelled_queries(events):
    fetched = write_samples(False, events.append)
    support = read_support(Path(NAME, "support"), Reader(28, 1, "bilinear"))
    queries, repeated = find_queries([Path(NAME, "query")], support.classes)
    assert support.counts == (1,) * CLASSES
    assert (len(queries), repeated) == (CLASSES * QUERIES, 0)
    assert {query.label for query in queries} == set(support.classes)
    assert (fetched.classes, fetched.images, fetched.folder) == (CLASSES, CLASSES * (1 + QUERIES), NAME)
    assert NEXT.endswith("eval omniglot-5w1s --support samples/support --query samples/query")


def test_each_image_is_one_drawing_of_its_glyph_in_a_size_that_a_person_can_see(events):
    write_samples(False, events.append)
    packed = glyphs.draw(events.append, CLASSES)
    drawn_MHW = packed.images_MCHW[:, 0].astype(int)
    for label, name in enumerate(packed.names):
        for number in range(1 + QUERIES):
            file = Path(NAME, "query" if number else "support", name, f"{number + 1}.png")
            data = file.read_bytes()
            assert Image.open(BytesIO(data)).size == (SIDE, SIDE)
            read_CHW = read_image(data, str(file), side=28, channels=1, resize="bilinear")
            differences_M = np.abs(drawn_MHW - read_CHW[0]).mean((1, 2))
            assert differences_M.argmin() == packed.starts[label] + number


def test_files_that_exist_are_replaced_only_with_force(events):
    digest = write_samples(False, events.append).digest
    changed = Path(NAME, "support", "glyph000", "1.png")
    changed.write_bytes(b"mine")
    changed.with_name("other.png").write_bytes(b"also mine")
    assert write_samples(False, events.append).digest != digest
    assert changed.read_bytes() == b"mine"
    assert write_samples(True, events.append).digest == digest
    assert changed.with_name("other.png").read_bytes() == b"also mine"


def test_a_folder_of_other_files_is_left_alone(events):
    mine = Path(NAME, "mine", "1.png")
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(DataError, match="samples/ has other files"):
        write_samples(False, events.append)
    assert [*Path(NAME).rglob("*")] == [mine.parent, mine]


@pytest.mark.parametrize("place", [NAME, f"{NAME}/query"])
def test_a_file_in_place_of_a_folder_is_left_alone(place, events):
    file = Path(place)
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(DataError, match=f"{place} is not a folder") as raised:
        write_samples(False, events.append)
    assert raised.value.hint == "rename it, or call mamlctl fetch samples in another folder"
    assert file.read_text() == "mine"
