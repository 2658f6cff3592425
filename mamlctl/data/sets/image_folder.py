"""The user's own images: a folder of class folders, or with train, val and test above them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.data.counter_rng import shuffled
from mamlctl.data.reading.decoding import ImageShape, decoded, of_path
from mamlctl.data.reading.image_files import FILTERS, class_folders
from mamlctl.data.reading.packs import PackedImages, is_packed, load_pack, stream_pack
from mamlctl.data.sets.class_splits import SPLITS

# mini-ImageNet's, for which the field's networks are made.
SIDE = 84
CHANNELS = 3
RESIZES = tuple(FILTERS)
SPLIT_SCHEMES = ("folders", "fractions")
FRACTIONS = "64-16-20"  # mini-ImageNet's classes
MOST_NAMED = 5  # files that are named before "and n more"


def prepare(folder: Path, root: Path, sources: Sequence[Path], on_event: OnEvent) -> None:
    """Forget the packs of the folder, so that `open_pack` makes them again; there are no other `sources`."""
    for sidecar in (root / home_of(folder)).glob("*.json"):
        sidecar.unlink()


def is_here(folder: Path, root: Path) -> bool:
    """Whether the folder is there: what is not packed yet, `open_pack` packs."""
    return folder.is_dir()


def open_pack(
    folder: Path,
    root: Path,
    resize: str = RESIZES[0],
    *,
    side: int = SIDE,
    channels: int = CHANNELS,
    on_event: OnEvent,
) -> PackedImages:
    """All images of the folder; packed anew if a file came, went or changed since.

    Images that cannot be read, and classes without any, are left out and written down. Raises DataError if
    nothing is left, or there is no folder of such a form.
    """
    classes = _classes(folder)
    stamp = _stamp(folder, classes)
    path = root / home_of(folder) / f"{side}x{side}x{channels}-{resize}.npy"
    if is_packed(path):
        packed = load_pack(path, str(folder))
        if packed.facts.get("stamp") == stamp:
            _announce_left_out(packed.facts["left_out"], on_event)
            return packed
        on_event(Notice(f"{folder} has changed since it was packed: packing it anew"))
    files = [of_path(file, folder, name) for name, paths in classes.items() for file in paths]
    left_out = [f"{name} (an empty class)" for name, paths in classes.items() if not paths]
    if not files:
        raise DataError(
            f"{folder} holds no images", hint="put the images of each class into a folder of its own"
        )
    shape = ImageShape(side, channels, resize)
    images = decoded(
        files,
        shape,
        what=path.parent.name,
        on_event=on_event,
        on_bad=lambda error: left_out.append(str(error)),
    )
    stream_pack(path, shape.chw, images, lambda: {"stamp": stamp, "left_out": left_out})
    packed = load_pack(path, str(folder))
    _announce_left_out(packed.facts["left_out"], on_event)
    return packed


def split_classes(
    packed: PackedImages, scheme: str, seed: int, fractions: str = FRACTIONS
) -> dict[str, NDArray[np.int64]]:
    """By the folders train, val and test, or by `fractions` of the classes, shuffled by `seed`.

    Without a folder val, or test, its share of `fractions` is taken from train.
    """
    of_folder = np.array([name.partition("/")[0] for name in packed.names])
    if scheme == "fractions":
        return dict(zip(SPLITS, _parted(np.arange(len(of_folder)), seed, _shares(fractions)), strict=True))
    classes = {split: np.flatnonzero(of_folder == split) for split in SPLITS}
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
    """The classes dealt out: every share that is not 0 gets a class if there are enough."""
    order = classes[shuffled(len(classes), seed, "class split")]
    ends = np.round(np.cumsum(shares)[:-1] * len(classes)).astype(np.int64)
    return [np.sort(part) for part in np.split(order, ends)]


def fraction_problem(fractions: str) -> tuple[str, str] | None:
    """Why `fractions` are none, and the way out."""
    try:
        parts = [float(part) for part in fractions.split("-")]
    except ValueError:
        parts = []
    if len(parts) == len(SPLITS) and all(0 <= part < np.inf for part in parts) and parts[0] > 0:
        return None
    return f"--split-fractions is {fractions!r}", "write shares of train, val and test like 64-16-20"


def has_splits(folder: Path) -> bool:
    """Whether the classes lie in folders train, val and test: two of them, or train and nothing beside it."""
    if not folder.is_dir():
        return False
    names = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    return names == {"train"} or len(names & set(SPLITS)) > 1


def _classes(folder: Path) -> dict[str, list[Path]]:
    """The files of every class; of folders train, val and test the names begin with those."""
    if not has_splits(folder):
        return class_folders(folder)
    parts = class_folders(folder).keys()
    if "train" not in parts or (odd := sorted(parts - set(SPLITS))):
        fact = f"a folder {odd[0]}" if "train" in parts else "no folder train"
        message = f"{folder} has {' and '.join(sorted(parts & set(SPLITS)))}, but {fact} beside them"
        raise DataError(message, hint="name the splits train, val and test, with one folder a class in each")
    by_split = {split: class_folders(folder / split) for split in SPLITS if split in parts}
    where: dict[str, str] = {}
    for split, classes in by_split.items():
        for name in classes:
            if name in where:
                message = f"{folder} has class {name!r} in {where[name]} and in {split}"
                hint = "splits share no class here: put all images of a class into one folder, without splits"
                raise DataError(message, hint=hint)
            where[name] = split
    return {
        f"{split}/{name}": files for split, classes in by_split.items() for name, files in classes.items()
    }


def _stamp(folder: Path, classes: dict[str, list[Path]]) -> str:
    """What changes when a file comes, goes or is written."""
    digest = hashlib.sha256()
    for name, files in classes.items():
        digest.update(f"{name}\0".encode())
        for file in files:
            status = file.stat()
            digest.update(
                f"{file.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(
                    errors="surrogateescape"
                )
            )
    return digest.hexdigest()


def home_of(folder: Path) -> str:
    """Where its packs lie: named for people, and by a digest of its path, since names are not unique."""
    digest = hashlib.sha256(str(folder).encode(errors="surrogateescape")).hexdigest()
    return f"folders/{folder.name}-{digest[:12]}"


def _announce_left_out(left_out: Sequence[str], on_event: OnEvent) -> None:
    """One notice of everything that was left out."""
    if left_out:
        more = f" and {len(left_out) - MOST_NAMED} more" if len(left_out) > MOST_NAMED else ""
        on_event(Notice(f"{len(left_out)} left out: {'; '.join(left_out[:MOST_NAMED])}{more}"))
