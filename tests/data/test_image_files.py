"""Images of every mode and size become arrays of one shape, with the right pixels."""

import io
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

import mamlctl
from mamlctl.core.errors import DataError
from mamlctl.data.reading.image_files import FORMATS, MOST_PIXELS, read_image
from mamlctl.data.sets.folder_layout import class_folders


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(image, kind="PNG", *, side=8, channels=3, **options):
    return read_image(encoded(image, kind, **options), "x", side=side, channels=channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F"])
def test_every_mode_keeps_its_colour(mode, channels):
    grey = 255 if mode == "1" else 120
    image = Image.new("L", (8, 8), grey)
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.full((8, 8), grey * 257, dtype=np.uint16 if mode == "I;16" else np.int32))
    elif mode == "F":
        image = Image.fromarray(np.full((8, 8), grey / 255, dtype=np.float32))
    elif mode == "P":
        image = image.convert("RGB").quantize(4)
    elif mode != "L":
        image = image.convert("RGB").convert(mode) if mode == "CMYK" else image.convert(mode)
    kind = "TIFF" if mode in ("CMYK", "F", "I") else "PNG"
    result = read(image, kind, channels=channels)
    assert result.shape == (channels, 8, 8) and result.dtype == np.uint8
    assert np.abs(result.astype(int) - grey).max() <= 1


def test_transparent_pixels_become_white():
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[:, :2] = (200, 10, 30, 255)
    result = read(Image.fromarray(pixels, "RGBA"), side=4)
    assert (result[:, :, :2] == np.array([200, 10, 30])[:, None, None]).all() and (
        result[:, :, 2:] == 255
    ).all()
    palette = Image.fromarray(np.repeat([[0, 1]], 2, axis=0).astype(np.uint8), "P")
    palette.putpalette([9, 9, 9, 7, 7, 7])
    assert (read(palette, side=2, channels=1, transparency=0)[0] == [255, 7]).all()


def test_longer_side_is_cropped_evenly():
    strip = np.zeros((4, 12), dtype=np.uint8)
    strip[:, 4:8] = 200
    assert (read(Image.fromarray(strip), side=4, channels=1) == 200).all()


def test_exif_rotation_is_applied():
    pixels = np.zeros((4, 4), dtype=np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    result = read(Image.fromarray(pixels), side=4, channels=1, exif=exif)
    assert (result[0, 3] == 255).all() and (result[0, :3] == 0).all()


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"no image at all", encoded(Image.new("L", (50, 50)))[:60]])
def test_error_names_a_file_that_is_not_an_image(data):
    with pytest.raises(DataError, match=r"cannot read image cat/7\.png: ") as raised:
        read_image(data, "cat/7.png", side=4, channels=1)
    assert "\n" not in str(raised.value)


def test_image_that_is_a_program_for_ghostscript_starts_no_process(monkeypatch):
    commands = []

    def start(command, *_, **__):
        commands.append(command)
        raise OSError("started")

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    data = encoded(Image.new("L", (8, 8)), "EPS")
    with pytest.raises(OSError), Image.open(io.BytesIO(data)) as image:
        image.load()
    assert commands and "gs" in commands[0][0]  # Pillow alone starts it
    commands.clear()
    with pytest.raises(DataError, match=r"cannot read image 0\.png: not an image of a supported format"):
        read_image(data, "0.png", side=8, channels=1)
    assert not commands


def test_images_are_opened_in_one_place_only():
    package = Path(mamlctl.__file__).parent
    places = [path for path in package.rglob("*.py") if "Image.open(" in path.read_text(encoding="utf-8")]
    assert places == [package / "data" / "reading" / "image_files.py"]


def test_every_format_that_can_be_written_can_be_read():
    Image.init()
    grey = Image.new("L", (8, 8), 100)
    for kind in sorted(FORMATS & Image.SAVE.keys()):
        image = grey.convert("1") if kind == "XBM" else grey
        result = read(image.convert("RGB") if kind in ("QOI", "ICNS", "WEBP", "AVIF") else image, kind)
        assert result.shape == (3, 8, 8), kind


@pytest.mark.filterwarnings("ignore")  # those of Pillow about wrong metadata, as in the command line
def test_damaged_image_is_a_data_error_or_an_image():
    Image.init()
    generator = np.random.default_rng(0)
    colour = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for kind in sorted(FORMATS & Image.SAVE.keys() - {"XBM"}):
        sound = encoded(colour, kind)
        for _ in range(30):
            data = bytearray(sound)
            for place in generator.integers(0, len(data), 3):
                data[place] = generator.integers(256)
            with suppress(DataError):
                read_image(bytes(data[: generator.integers(1, 2 * len(data))]), kind, side=8, channels=3)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF"])
def test_image_above_the_limit_is_refused_before_it_is_decoded(monkeypatch, kind):
    side = 6400
    assert side**2 > MOST_PIXELS > (side - 100) ** 2
    data = encoded(Image.new("1" if kind == "TIFF" else "P", (side, side)), kind)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match="image big has more than 40,000,000 pixels"):
        read_image(data, "big", side=8, channels=1)


def test_class_folders_are_listed_without_other_files(tmp_path):
    for name in (
        "b/2.png",
        "b/deep/1.jpg",
        "a/x.bmp",
        "a/notes.txt",
        "a/.hidden.png",
        ".git/x.png",
        "__MACOSX/y.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    folders = class_folders(tmp_path)
    assert {name: [file.name for file in files] for name, files in folders.items()} == {
        "a": ["x.bmp"],
        "b": ["2.png", "1.jpg"],
        "empty": [],
    }
    with pytest.raises(DataError, match="contains no folders"):
        class_folders(tmp_path / "empty")
    with pytest.raises(DataError, match="is not a folder"):
        class_folders(tmp_path / "a" / "x.bmp")
