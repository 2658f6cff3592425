"""Small packs, and small archives in the form of Omniglot's."""

import io
import zipfile
from dataclasses import fields

import numpy as np
import torch
from PIL import Image

from mamlctl.data.reading.packs import pack
from mamlctl.data.sets import omniglot
from mamlctl.data.tasks.episodes import Placement, StreamSettings
from mamlctl.data.tasks.image_tasks import ImageSettings, TaskStream

ALPHABETS, CHARACTERS, DRAWINGS = 2, 3, 4


def small_pack(counts, side=4, seed=0):
    """A pack of random images; class c has counts[c] of them."""
    counts = np.array(counts)
    pixels = np.random.default_rng(seed).integers(0, 256, (counts.sum(), 1, side, side), dtype=np.uint8)
    return pack(pixels, counts, tuple(f"class{number}" for number in range(len(counts))))


def stream_settings(**settings):
    """Settings of a stream of small tasks; `device` and `dtype` make its `place`."""
    place = {name: settings.pop(name) for name in ("device", "dtype") if name in settings}
    place = Placement(**{"device": torch.device("cpu")} | place)
    return StreamSettings(**{"seed": 0, "shots": 1, "queries": 1, "place": place} | settings)


def image_stream(packed, classes, kind=TaskStream, **settings):
    """A stream of image tasks, with all settings by name."""
    names = {field.name for field in fields(ImageSettings)} & settings.keys()
    images = ImageSettings(**{"name": "small"} | {name: settings.pop(name) for name in names})
    return kind(packed, classes, stream_settings(**settings), images)


def png(pixels_HW):
    """A 1-bit PNG like those of Omniglot."""
    file = io.BytesIO()
    Image.fromarray(pixels_HW).convert("1").save(file, "PNG")
    return file.getvalue()


def tiny_members(folder, seed):
    """The files of a tiny Omniglot archive: path -> PNG, and path -> pixels."""
    generator = np.random.default_rng(seed)
    pixels = {}
    for alphabet in range(ALPHABETS):
        for character in range(1, CHARACTERS + 1):
            for drawing in range(1, DRAWINGS + 1):
                name = (
                    f"{folder}/Alphabet_{alphabet}/character{character:02d}/{character:04d}_{drawing:02d}.png"
                )
                pixels[name] = generator.random((omniglot.SIDE, omniglot.SIDE)) < 0.9
    return {name: png(pixels_HW) for name, pixels_HW in pixels.items()}, pixels


def tiny_part(folder, pixels):
    """What the tiny archive must contain, as in `omniglot.PARTS`."""
    names = sorted(pixels)
    bits = np.stack([np.packbits(pixels[name], axis=-1) for name in names])
    characters = ALPHABETS * CHARACTERS
    digest = omniglot.content_digest(names, bits)
    return omniglot.OmniglotPart(folder, ALPHABETS, characters, characters * DRAWINGS, digest)


def write_zip(path, members):
    """Write a zip with `members` (name -> bytes) and a file that macOS adds."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("__MACOSX/images_background/._Greek", b"resource fork")
    return path
