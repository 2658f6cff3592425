"""mini-ImageNet and tieredImageNet, packed from the user's files, since they may not be redistributed.

The classes of mini-ImageNet are from Ravi & Larochelle 2017 (twitter-research/meta-learning-lstm), the counts
of tieredImageNet from Ren et al. 2018, section 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError
from mamlctl.core.events import Notice, OnEvent, Progress
from mamlctl.core.files import read_object
from mamlctl.core.formatting import plural
from mamlctl.core.literals import SPLITS
from mamlctl.data.reading.archives import Members, open_members
from mamlctl.data.reading.decoding import ImageFile, ImageShape, decoded, twins
from mamlctl.data.reading.packs import (
    PackedImages,
    add_facts,
    is_packed,
    load_pack,
    stream_pack,
    writing_pack,
)
from mamlctl.data.sets.class_splits import listed_split
from mamlctl.data.sets.facts import MINI, SIDE, TIERED, ListedSet
from mamlctl.data.sets.mini_imagenet_pickles import cache_files, read_mini_cache

IMAGE = re.compile(r"\.(jpe?g|png|bmp|webp)$", re.IGNORECASE)
SYNSET = re.compile(r"n\d{8}")  # a class of ImageNet, with which the names of its files start
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
PICKLES = (".pkl", ".pickle")
PER_CLASS = 600  # images in each class of mini-ImageNet


def prepare(listed: ListedSet, root: Path, sources: Sequence[Path], on_event: OnEvent) -> None:
    """Verify and pack the user's files.

    Args:
        listed: the data set.
        root: the data root.
        sources: archives or folders of images, or the pickles of mini-ImageNet.
        on_event: receives notices and progress.

    Raises:
        DataError: files are missing, damaged or not the data set's, or the pack cannot be written. No partial
            pack is left.
    """
    if not sources:
        message = f"{listed.title} cannot be downloaded: the terms of ImageNet forbid redistribution"
        raise DataError(message, hint=listed.hint)
    writing = writing_pack(_path(listed, root), listed.name, on_event)
    if listed is MINI and (pickles := _pickles(sources)):
        with writing:
            _pack_pickles(_path(listed, root), pickles, on_event)
        return
    with writing, ExitStack() as stack:
        opened = [stack.enter_context(open_members(path)) for path in _candidates(sources)]
        by_class = _by_class(listed, opened)
        _verify(listed, by_class, sources)
        files = [image for name in sorted(by_class) for image in by_class[name]]
        shape, pairs = ImageShape(SIDE, 3, "bilinear"), list[tuple[str, str]]()
        images = twins(decoded(files, shape, what=listed.name, on_event=on_event), pairs)
        stream_pack(_path(listed, root), shape.chw, images, lambda: {"twins": pairs})
    _announce_twins(listed, pairs, on_event)


def _announce_twins(listed: ListedSet, pairs: Sequence[tuple[str, str]], on_event: OnEvent) -> None:
    if pairs:
        apart = sum(one != other for one, other in pairs)
        fact = f"{len(pairs)} pairs of images are identical, {apart} of them across classes"
        on_event(Notice(f"{listed.name}: {fact} (a known flaw of the data set, left unchanged)"))


def _pickles(sources: Sequence[Path]) -> list[Path]:
    """The pickles of mini-ImageNet, among the sources or inside a single one."""
    paths = [source.resolve() for source in sources]
    if all(path.suffix in PICKLES for path in paths):
        return paths
    return cache_files(paths[0]) if len(paths) == 1 and paths[0].is_dir() else []


def _pack_pickles(path: Path, pickles: Sequence[Path], on_event: OnEvent) -> None:
    """Pack the classes in the order of the files, since each is large, and then in that of their names."""
    classes = read_mini_cache(pickles, per_class=PER_CLASS)

    def images() -> Iterator[tuple[str, NDArray[np.uint8]]]:
        for number, (name, images_NHWC) in enumerate(classes, 1):
            for image_HWC in images_NHWC:
                yield name, image_HWC.transpose(2, 0, 1)
            on_event(Progress(f"{MINI.name}: read classes", number, sum(MINI.classes)))

    pairs: list[tuple[str, str]] = []
    stream_pack(path, (3, SIDE, SIDE), twins(images(), pairs), lambda: {"twins": pairs})
    _pack_in_order(path, load_pack(path, MINI.name), on_event)
    _announce_twins(MINI, pairs, on_event)


def _pack_in_order(path: Path, packed: PackedImages, on_event: OnEvent) -> None:
    """Pack mini-ImageNet again with its classes in the order of their names, as from archives."""

    def images() -> Iterator[tuple[str, NDArray[np.uint8]]]:
        for number, (name, images_MCHW) in enumerate(packed.of_classes(sorted(packed.names)), 1):
            for image_CHW in images_MCHW:
                yield name, image_CHW
            on_event(Progress(f"{MINI.name}: sort classes", number, len(packed.names)))

    pairs = sorted(tuple(sorted(pair)) for pair in packed.facts.get("twins", ()))
    facts = {"twins": pairs, "older_digests": [packed.digest]}
    stream_pack(path, packed.images_MCHW.shape[1:], images(), lambda: facts)


def _open_mini(path: Path, on_event: OnEvent) -> PackedImages:
    """Open mini-ImageNet with its classes in the order of their names and its older digests.

    Older versions packed pickles in the order of the published list. The tasks are the same, since the
    classes of each split have the same order in both.
    """
    if not _has_older_digests(path):
        # The data root may be read-only; damage is reported below.
        with suppress(DataError), writing_pack(path, MINI.name, on_event):
            if not _has_older_digests(path):  # another process may have written them
                _add_older_digests(path, on_event)
    return load_pack(path, MINI.name)


def _has_older_digests(path: Path) -> bool:
    facts = read_object(path.with_suffix(".json")).get("facts")
    return isinstance(facts, dict) and bool(facts.get("older_digests"))


def _add_older_digests(path: Path, on_event: OnEvent) -> None:
    packed = load_pack(path, MINI.name)
    if list(packed.names) == sorted(packed.names):
        listed = [name for name in listed_split(MINI.name) if name in packed.names]
        add_facts(path, {"older_digests": [packed.digest_in_order(listed)]})
    else:
        on_event(Notice(f"{path} is from an older version: sorting its classes by name"))
        _pack_in_order(path, packed, on_event)


def is_here(listed: ListedSet, root: Path) -> bool:
    """Whether the data set is in the data root."""
    return is_packed(_path(listed, root))


def open_pack(listed: ListedSet, root: Path, resize: str = "none", *, on_event: OnEvent) -> PackedImages:
    """Return all images, 84x84 in colour, memory-mapped.

    Args:
        listed: the data set.
        root: the data root.
        resize: not used, since the packs have one size.
        on_event: receives progress and notices if the pack is from an older version.

    Raises:
        DataError: the data set is missing or damaged.
    """
    if not is_here(listed, root):
        raise DataError(f"{listed.name} is not in {root}", hint=listed.hint)
    path = _path(listed, root)
    return _open_mini(path, on_event) if listed is MINI else load_pack(path, listed.name)


def split_by_folders(packed: PackedImages, scheme: str, seed: int) -> dict[str, NDArray[np.int64]]:
    """Return the classes of train, val and test by their folders.

    Args:
        packed: the images, whose class names begin with the name of a split.
        scheme: not used, since there is one scheme.
        seed: not used, since nothing is drawn.
    """
    splits = np.array([name.partition("/")[0] for name in packed.names])
    return {split: np.flatnonzero(splits == split) for split in SPLITS}


def _path(listed: ListedSet, root: Path) -> Path:
    return root / listed.name / f"{SIDE}x{SIDE}.npy"


def _candidates(sources: Sequence[Path]) -> list[Path]:
    """The archives inside each source, or the source itself if it contains none."""
    paths = []
    for source in sources:
        path = source.resolve()
        inside = (
            sorted(file for file in path.iterdir() if file.name.endswith(ARCHIVES)) if path.is_dir() else []
        )
        paths += inside or [path]
    return paths


def _by_class(listed: ListedSet, opened: Sequence[Members]) -> dict[str, list[ImageFile]]:
    """The images of every class, sorted by file name; for tieredImageNet, keys are split/class."""
    by_label: dict[str, dict[str, ImageFile]] = {}
    for members in opened:
        for name in members.names:
            path = PurePosixPath(name)
            if not IMAGE.search(path.name) or path.name.startswith("."):
                continue
            synset = SYNSET.fullmatch(path.parent.name) or SYNSET.match(path.name)
            if synset is None:
                continue
            label = synset.group()
            if listed is TIERED:
                parts = (*path.parts, members.path.name.partition(".")[0])
                split = next((split for split in SPLITS if split in parts), "")
                label = f"{split}/{label}"
            by_label.setdefault(label, {})[path.name] = ImageFile(label, name, partial(members.read, name))
    return {label: [files[name] for name in sorted(files)] for label, files in by_label.items()}


def _verify(listed: ListedSet, by_class: dict[str, list[ImageFile]], sources: Sequence[Path]) -> None:
    """Raise DataError, which names the first class or split with a wrong count."""
    places = ", ".join(str(source) for source in sources)
    if not by_class:
        message = f"{places} contains no images with file or folder names like n01532829"
        raise DataError(message, hint=listed.hint)
    for problem in _count_problems(listed, by_class):
        raise DataError(f"{places} is not the complete {listed.title}: {problem}", hint=listed.hint)


def _count_problems(listed: ListedSet, by_class: dict[str, list[ImageFile]]) -> Iterator[str]:
    if listed is MINI:
        expected = listed_split(MINI.name)
        missing, more = sorted(expected.keys() - by_class.keys()), sorted(by_class.keys() - expected.keys())
        if missing:
            yield f"it lacks {len(missing)} of the {len(expected)} classes, for example {missing[0]}"
        if more:
            yield f"it has {len(by_class)} classes, not {len(expected)}, and {more[0]} is not one of those"
        for label, files in sorted(by_class.items()):
            if len(files) != PER_CLASS:
                yield f"{label} has {len(files):,} {plural(len(files), 'image')} instead of {PER_CLASS}"
        return
    for split, classes, images in zip(SPLITS, listed.classes, listed.images, strict=True):
        of_split = [files for label, files in by_class.items() if label.startswith(f"{split}/")]
        count = sum(map(len, of_split))
        if (len(of_split), count) != (classes, images):
            counts = f"{split} has {len(of_split)} {plural(len(of_split), 'class')} and "
            counts += f"{count:,} {plural(count, 'image')}"
            yield f"{counts} instead of {classes} and {images:,}"
