"""Glyphs: a built-in few-shot data set of invented characters, drawn by code to look hand-drawn.

A class has two to four curved strokes; an image is one drawing of them, with its own wobble, slant, size,
position and pen. All arithmetic is simple and elementwise, so every machine draws the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.events import Notice, OnEvent, Progress
from mamlctl.data.counter_rng import random_words, shuffled
from mamlctl.data.reading.packs import PackedImages, is_packed, load_pack, pack, save_pack

NAME = "glyphs"
VERSION = 1  # of the drawing code: raise it with any change that alters a pixel
CLASSES = 400
DRAWINGS = 20  # per class, as in Omniglot
SIDE = 28  # pixels
TRAIN = 300  # classes; 60 are left for test
VAL = 40  # classes
SHAPE_SEED = 0  # fixed, since the data set is; the split has its own seed
STROKES = (2, 4)  # fewest and most per glyph
CONTROLS = 4  # control points of a stroke's cubic curve
POINTS = 48  # drawn points per stroke, less than a pixel apart

# Chosen by eye, and so that a nearest neighbour on pixels reaches about 65 % on 5-way 1-shot tasks.
WOBBLE = 0.05  # standard deviation of a control point, in units of the glyph's box
SLANT = 0.13  # standard deviation of the affine map's entries: rotation, shear and size
SHIFT = 1.1  # standard deviation in pixels
BOX = 19.0  # side in pixels of the glyph's box inside the image
PEN = (0.7, 1.4)  # smallest and largest radius in pixels


def prepare(root: Path, sources: Sequence[Path], on_event: OnEvent) -> None:
    """Draw the data set and save it.

    Args:
        root: the data root.
        sources: not used, since the images are drawn.
        on_event: receives notices and progress.
    """
    on_event(Notice(f"drawing {NAME} (built in, no download)"))
    save_pack(_path(root), draw(on_event))


def open_pack(root: Path, resize: str = "none", *, on_event: OnEvent) -> PackedImages:
    """Return all images: 28x28, ink 0, paper 255, drawn on first use.

    Args:
        root: the data root.
        resize: not used, since there is one size.
        on_event: receives notices and progress if the images are drawn.

    Raises:
        DataError: the pack is damaged.
    """
    if not is_packed(_path(root)):
        prepare(root, (), on_event)
    return load_pack(_path(root), NAME)


def is_here(root: Path) -> bool:
    """Always true, since `open_pack` draws missing images."""
    return True


def split_classes(packed: PackedImages, scheme: str, seed: int) -> dict[str, NDArray[np.int64]]:
    """Return 300 classes for train, 40 for val and 60 for test, shuffled.

    Args:
        packed: the images of all classes.
        scheme: not used, since there is one scheme.
        seed: the seed of the split.
    """
    train, val, test = np.split(shuffled(len(packed.names), seed, "class split"), [TRAIN, TRAIN + VAL])
    return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}


def _path(root: Path) -> Path:
    return root / NAME / f"{SIDE}x{SIDE}-v{VERSION}.npy"


def draw(on_event: OnEvent, classes: int = CLASSES) -> PackedImages:
    """Draw the first `classes` glyphs, twenty times each."""
    images_MCHW = np.empty((classes * DRAWINGS, 1, SIDE, SIDE), dtype=np.uint8)
    for number in range(classes):
        strokes_BPX = _drawings(_shape(number), number)
        images_MCHW[number * DRAWINGS : (number + 1) * DRAWINGS, 0] = strokes_BPX
        if number % 50 == 49:
            on_event(Progress(f"{NAME}: draw classes", number + 1, classes))
    names = tuple(f"glyph{number:03d}" for number in range(classes))
    return pack(images_MCHW, np.full(classes, DRAWINGS, dtype=np.int64), names)


def _uniform(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Random words as uniform numbers in [-1, 1)."""
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1


def _bell(raw_3: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Sum of three uniform numbers (the last axis): about normally distributed, with variance 1."""
    parts = _uniform(raw_3)
    return parts[..., 0] + parts[..., 1] + parts[..., 2]  # each has variance 1/3


def _shape(number: int) -> NDArray[np.float64]:
    """A glyph's control points (strokes, 4, 2), scaled so that its curves fill a box of side 1 around 0."""
    most = STROKES[1]
    words = random_words(SHAPE_SEED, "glyph shapes", number, 1 + most * CONTROLS * 2)
    strokes = STROKES[0] + int(words[0] % np.uint64(STROKES[1] - STROKES[0] + 1))
    controls = _uniform(words[1:]).reshape(most, CONTROLS, 2)[:strokes]
    drawn = np.stack([_curve(controls[None, ..., axis]) for axis in (0, 1)], axis=-1)[0]
    low, high = drawn.min(0), drawn.max(0)
    shape: NDArray[np.float64] = (controls - (low + high) / 2) / (high - low).max()
    return shape


def _drawings(controls: NDArray[np.float64], number: int) -> NDArray[np.uint8]:
    """Twenty drawings of one glyph, _BHW."""
    wobbles = controls.size
    words = random_words(SHAPE_SEED, "glyph drawings", number, DRAWINGS * (wobbles + 7) * 3)
    noise = _bell(words.reshape(DRAWINGS, wobbles + 7, 3))
    bent = controls + WOBBLE * noise[:, :wobbles].reshape(DRAWINGS, *controls.shape)
    x, y = bent[..., 0], bent[..., 1]
    a, b, c, d = (SLANT * noise[:, wobbles + entry, None, None] for entry in range(4))
    shift_x, shift_y = (SHIFT * noise[:, wobbles + entry, None, None] for entry in (4, 5))
    middle = (SIDE - 1) / 2
    x, y = (
        middle + BOX * (x + a * x + b * y) + shift_x,
        middle + BOX * (y + c * x + d * y) + shift_y,
    )
    pen = np.clip((PEN[0] + PEN[1]) / 2 + (PEN[1] - PEN[0]) / 4 * noise[:, wobbles + 6], *PEN)
    return _inked(_curve(x), _curve(y), pen)


def _curve(controls: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points on the cubic Bezier curves of strokes: (B, strokes, 4) -> (B, strokes * POINTS)."""
    t = np.arange(POINTS) / (POINTS - 1)
    p, q, r, s = (controls[..., place, None] for place in range(CONTROLS))
    u = 1 - t
    points = u * u * u * p + 3 * u * u * t * q + 3 * u * t * t * r + t * t * t * s
    return points.reshape(len(points), -1)


def _inked(x: NDArray[np.float64], y: NDArray[np.float64], pen: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Draw ink where a pixel is within the pen's radius of a point, with a soft edge one pixel wide."""
    grid = np.arange(SIDE, dtype=np.float32)
    dx2_BPW = (grid - x[..., None].astype(np.float32)) ** 2
    dy2_BPH = (grid - y[..., None].astype(np.float32)) ** 2
    nearest = np.full((len(x), SIDE, SIDE), np.inf, dtype=np.float32)
    for point in range(x.shape[1]):  # one point at a time, since all of them would not fit in the cache
        np.minimum(nearest, dy2_BPH[:, point, :, None] + dx2_BPW[:, point, None, :], out=nearest)
    ink = np.clip(pen[:, None, None] + 0.5 - np.sqrt(nearest), 0, 1)
    return (255 - np.rint(255 * ink)).astype(np.uint8)
