"""Small folders of images to try `mamlctl eval RUN --support DIR --query DIR` with, drawn by code."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image

from mamlctl.core.errors import DataError
from mamlctl.core.events import OnEvent
from mamlctl.core.files import replacing
from mamlctl.core.results import FetchedSet
from mamlctl.data.sets import glyphs

NAME = "samples"
NEXT = f"try mamlctl eval omniglot-5w1s --support {NAME}/support --query {NAME}/query"
CLASSES = 5  # as in the tasks of omniglot-5w1s
QUERIES = 3  # per class, next to one support image
SIDE = 4 * glyphs.SIDE  # pixels, so that a person can see the characters


def write_samples(force: bool, on_event: OnEvent) -> FetchedSet:
    """Write `samples/support` and `samples/query` in the current folder, with a subfolder per class.

    `force` also replaces the files that exist. Raises DataError if something else is there.
    """
    folder, files = Path(NAME), list[Path]()
    for place in (folder, folder / "support", folder / "query"):
        if (place.exists() or place.is_symlink()) and not place.is_dir():
            hint = "rename it, or call mamlctl fetch samples in another folder"
            raise DataError(f"{place} is not a folder", hint=hint)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "support").is_dir():
        raise DataError(f"{NAME}/ has other files", hint="call mamlctl fetch samples in another folder")
    packed = glyphs.draw(on_event, CLASSES)
    for label, name in enumerate(packed.names):
        for number in range(1 + QUERIES):
            file = folder / ("query" if number else "support") / name / f"{number + 1}.png"
            if force or not file.exists():
                image_HW = packed.images_MCHW[packed.starts[label] + number, 0]
                image = Image.fromarray(image_HW).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                with replacing(file) as target:
                    image.save(target, "png")
            files.append(file)
    digest = hashlib.sha256(b"".join(map(Path.read_bytes, files))).hexdigest()
    return FetchedSet(NAME, CLASSES, len(files), digest, str(folder))
