"""The registry of data sets: it imports without torch, and every entry is consistent."""

import subprocess
import sys

import pytest

from mamlctl.data.reading.image_files import FILTERS
from mamlctl.data.sets import cifar100, glyphs, omniglot
from mamlctl.data.sets.curves import FAMILIES
from mamlctl.data.sets.registry import DATA_SETS, absolute_data_set, is_image_folder, is_regression
from mamlctl.settings.schema import TrainConfig


def test_registry_imports_without_slow_modules():
    code = "import sys, mamlctl.data.rules; print({'torch', 'numpy', 'PIL', 'tarfile'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done


def test_entries_agree_with_the_modules_that_they_do_not_import():
    origin = omniglot.ORIGIN, sum(omniglot.SIZES.values()), omniglot.SMALL
    entry = DATA_SETS["omniglot"]
    assert (entry.origin, entry.download_bytes, entry.image_shape_CHW[-1]) == origin
    assert DATA_SETS["glyphs"].image_shape_CHW == (1, glyphs.SIDE, glyphs.SIDE)
    entry = DATA_SETS["fc100"]
    assert entry.image_shape_CHW == (cifar100.CHANNELS, cifar100.SIDE, cifar100.SIDE)
    assert (entry.download_bytes, entry.folder) == (cifar100.SIZE, cifar100.HOME)
    assert all({*data_set.resizes} <= {"none", *FILTERS} for data_set in DATA_SETS.values())


@pytest.mark.parametrize("name", DATA_SETS)
def test_entry_fits_its_defaults(name):
    data_set = DATA_SETS[name]
    assert data_set.name == name and name not in FAMILIES
    channels, height, width = data_set.image_shape_CHW
    defaults = data_set.defaults
    assert (defaults["channels"], defaults["image_size"]) == (channels, height) and height == width
    assert defaults["split_scheme"] == data_set.split_schemes[0] and defaults["resize"] == data_set.resizes[0]
    assert bool(data_set.archives) == bool(data_set.download_bytes)
    assert defaults["normalize"] == "none" or channels == 3


def test_names_and_folders_are_distinguished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    assert is_image_folder("pets") and is_image_folder("./absent") and not is_image_folder("absent")
    assert absolute_data_set("pets") == str(tmp_path / "pets")
    (tmp_path / "omniglot").mkdir()
    assert not is_image_folder("omniglot") and absolute_data_set("omniglot") == "omniglot"
    assert is_regression(TrainConfig(dataset="sinusoid"))
    assert not is_regression(TrainConfig(dataset="omniglot"))
