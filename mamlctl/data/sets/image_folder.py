"""The user's own images: a folder of class folders, or of train, val and test with class folders in each."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.formatting import plural
from mamlctl.core.literals import RESIZES, SPLITS, ClassLevel
from mamlctl.data.counter_rng import shuffled
from mamlctl.data.reading.archives import read_regular
from mamlctl.data.reading.decoding import ImageFile, ImageShape, decoded
from mamlctl.data.reading.image_files import HINT
from mamlctl.data.reading.packs import PackedImages, is_packed, load_pack, stream_pack
from mamlctl.data.sets.folder_layout import (
    CHANNELS,
    FRACTIONS,
    SIDE,
    class_files,
    class_level,
    home_of,
    unread_lists,
)
from mamlctl.data.sets.listed_images import is_list

MOST_NAMED = 5  # files that are listed before "and n more"


def prepare(folder: Path, root: Path, sources: Sequence[Path], on_event: OnEvent) -> None:
    """Drop the packs of the folder, so that `open_pack` makes them again.

    Args:
        folder: the image folder.
        root: the data root.
        sources: not used, since the folder is the source.
        on_event: not used.
    """
    for sidecar in (root / home_of(folder)).glob("*.json"):
        sidecar.unlink(missing_ok=True)


def is_here(folder: Path, root: Path) -> bool:
    """Whether the folder exists; `open_pack` packs it if necessary."""
    return folder.is_dir()


def open_pack(
    folder: Path,
    root: Path,
    resize: str = RESIZES[0],
    *,
    side: int = SIDE,
    channels: int = CHANNELS,
    level: ClassLevel | None = None,
    on_event: OnEvent,
) -> PackedImages:
    """Return all images of the folder, packed again if a file was added, removed or changed.

    Images that cannot be read, and classes without images, are left out and listed in the pack's facts.

    Args:
        folder: the user's folder.
        root: the data root.
        resize: one of `RESIZES`.
        side: height and width in pixels.
        channels: 1 (grey) or 3 (colour).
        level: which folders are classes; None: `class_level` decides.
        on_event: receives notices and progress.

    Raises:
        DataError: the folder does not exist or has another structure, or no image can be read.
    """
    if level is None:
        level = class_level(folder)
    classes = class_files(folder, level)
    if (unread := unread_lists(folder)) and is_list(folder / "train.csv"):
        on_event(Notice(unread[0]))
    if level == "leaf":
        found = f"{len(classes)} innermost {plural(len(classes), 'folder')}"
        on_event(Notice(f"the classes are the {found} of {folder}; --classes top takes its top folders"))
    stamp = _stamp(folder, classes, _facts_of)
    suffix = "" if level == "top" else f"-{level}"
    pack_path = root / home_of(folder) / f"{side}x{side}x{channels}-{resize}{suffix}.npy"
    if is_packed(pack_path):
        packed = load_pack(pack_path, str(folder))
        if packed.facts.get("stamp") == stamp or _is_as_old_pack(pack_path, packed, folder, classes):
            return _with_left_out(packed, classes, on_event)
        on_event(Notice(f"{folder} has changed since it was packed: packing it again"))
    files = [
        ImageFile(name, path.relative_to(folder).as_posix(), partial(read_regular, path, HINT))
        for name, paths in classes.items()
        for path in paths
    ]
    left_out = [f"{name} (an empty class)" for name, paths in classes.items() if not paths]
    if not files:
        hint = "put the images of each class into a separate folder"
        raise DataError(f"{folder} contains no images", hint=hint)
    shape = ImageShape(side, channels, resize)
    images = decoded(
        files,
        shape,
        what=pack_path.parent.name,
        on_event=on_event,
        on_bad=lambda error: left_out.append(str(error)),
    )
    stream_pack(pack_path, shape.chw, images, lambda: {"stamp": stamp, "left_out": left_out})
    return _with_left_out(load_pack(pack_path, str(folder)), classes, on_event)


def split_classes(
    packed: PackedImages, scheme: str, seed: int, fractions: str = FRACTIONS, least: int = 1
) -> dict[str, NDArray[np.int64]]:
    """Return the classes of train, val and test.

    Args:
        packed: all images.
        scheme: `folders` (train, val and test) or `fractions` (of the shuffled classes).
        seed: the seed of the shuffle.
        fractions: shares of train, val and test. With `folders`, a missing val or test takes its share of
            the classes from train.
        least: classes with fewer images are in no split, unless all have fewer.
    """
    large = packed.counts >= least
    usable = np.flatnonzero(large if large.any() else packed.counts)
    if scheme == "fractions":
        return dict(zip(SPLITS, _parted(usable, seed, _shares(fractions)), strict=True))
    of_folder = np.array([packed.names[number].partition("/")[0] for number in usable])
    classes = {split: usable[of_folder == split] for split in SPLITS}
    shares = [
        share if not len(classes[split]) else 0.0
        for split, share in zip(SPLITS, _shares(fractions), strict=True)
    ]
    if sum(shares):
        shares[0] = 1 - sum(shares[1:])
        for split, part in zip(SPLITS, _parted(classes["train"], seed, shares), strict=True):
            classes[split] = part if split == "train" or not len(classes[split]) else classes[split]
    return classes


def _shares(fractions: str) -> list[float]:
    parts = [float(part) for part in fractions.split("-")]
    return [part / sum(parts) for part in parts]


def _parted(classes: NDArray[np.int64], seed: int, shares: Sequence[float]) -> list[NDArray[np.int64]]:
    """The shuffled classes in parts of the given shares (0..1)."""
    order = classes[shuffled(len(classes), seed, "class split")]
    return [np.sort(part) for part in np.split(order, _ends(shares, len(classes))[:-1])]


def _ends(shares: Sequence[float], classes: int) -> NDArray[np.int64]:
    """Where each part of the classes ends."""
    return np.round(np.cumsum(shares) * classes).astype(np.int64)


def classes_needed(fractions: str, ways: int) -> int:
    """Return from how many classes on every split has `ways` of them, except splits with a share of 0."""
    shares = _shares(fractions)
    parts = [part for part, share in enumerate(shares) if share]
    # Each part is at most one class smaller than its share. Through rounding, a part of more classes may be
    # smaller than one of fewer, so the search goes down to the first number that is too small.
    classes = math.ceil((ways + 1) / min(shares[part] for part in parts))
    while np.diff([0, *_ends(shares, classes - 1)])[parts].min() >= ways:
        classes -= 1
    return classes


def _stamp(
    folder: Path, classes: Mapping[str, Sequence[Path]], facts_of: Callable[[os.stat_result], Sequence[int]]
) -> str:
    """A digest that changes if a file is added or removed, or if the facts about one change."""
    digest = hashlib.sha256()
    for name, files in classes.items():
        digest.update(f"{name}\0".encode(errors="surrogateescape"))
        for file in files:
            facts = "\0".join(map(str, [file.relative_to(folder).as_posix(), *facts_of(_status(file))]))
            digest.update(f"{facts}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _status(file: Path) -> os.stat_result:
    """The status of a file, or of a link that leads to nothing."""
    try:
        return file.stat()
    except OSError:
        return file.lstat()


def _facts_of(status: os.stat_result) -> tuple[int, int, int]:
    # A program can write a file and restore its size and its modification time, but not its change time.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_as_old_pack(
    path: Path, packed: PackedImages, folder: Path, classes: Mapping[str, Sequence[Path]]
) -> bool:
    """Whether an older pack, whose stamp has no change times, was written after every change."""
    last = max((_status(file).st_ctime_ns for files in classes.values() for file in files), default=0)
    return last < path.stat().st_mtime_ns and packed.facts.get("stamp") == _stamp(
        folder, classes, lambda status: (status.st_size, status.st_mtime_ns)
    )


def _with_left_out(
    packed: PackedImages, classes: Mapping[str, Sequence[Path]], on_event: OnEvent
) -> PackedImages:
    """Add classes without a readable image to what was left out, and send one notice of all of it."""
    packed_classes = set(packed.names)
    unreadable = [name for name, files in classes.items() if files and name not in packed_classes]
    left_out = [f"{name} (no readable image)" for name in unreadable] + packed.facts.get("left_out", [])
    if left_out:
        more = f" and {len(left_out) - MOST_NAMED} more" if len(left_out) > MOST_NAMED else ""
        on_event(Notice(f"{len(left_out)} left out: {'; '.join(left_out[:MOST_NAMED])}{more}"))
    return replace(packed, facts={**packed.facts, "left_out": left_out})
