"""Image sets that nobody may pass on, packed from what the user has: mini-ImageNet and tieredImageNet.

mini-ImageNet's classes: Ravi & Larochelle 2017 (twitter-research/meta-learning-lstm).
tieredImageNet's counts: Ren et al. 2018, section 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError
from mamlctl.core.events import Notice, OnEvent, Progress
from mamlctl.data.reading.archives import Members, open_members
from mamlctl.data.reading.decoding import ImageFile, ImageShape, decoded, of_members, twins
from mamlctl.data.reading.packs import PackedImages, is_packed, load_pack, stream_pack
from mamlctl.data.sets.class_splits import SPLITS, listed_split
from mamlctl.data.sets.mini_imagenet_pickles import cache_files, read_mini_cache

SIDE = 84
IMAGE = re.compile(r"\.(jpe?g|png|bmp|webp)$", re.IGNORECASE)
SYNSET = re.compile(r"n\d{8}")  # a class of ImageNet; file names begin with theirs
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
PICKLES = (".pkl", ".pickle")


@dataclass(frozen=True)
class ListedSet:
    """A set whose files the user brings, and what it must hold."""

    name: str
    title: str
    classes: tuple[int, int, int]  # train, val, test
    images: tuple[int, int, int]
    split_schemes: tuple[str, ...]
    where: str  # where people get it

    @property
    def hint(self) -> str:
        """The way out where it is absent."""
        return f"{self.where}; then: mamlctl fetch {self.name} --from FOLDER_OR_ARCHIVES"


MINI = ListedSet(
    "mini-imagenet",
    "mini-ImageNet",
    (64, 16, 20),
    (38_400, 9_600, 12_000),
    ("ravi",),
    "make it from ImageNet with github.com/yaoyao-liu/mini-imagenet-tools, or get a copy",
)
TIERED = ListedSet(
    "tiered-imagenet",
    "tieredImageNet",
    (351, 97, 160),
    (448_695, 124_261, 206_209),
    ("ren",),
    "make it from ImageNet with github.com/yaoyao-liu/tiered-imagenet-tools, or get a copy",
)

PER_CLASS = 600  # mini-ImageNet's images of every class


def prepare(listed: ListedSet, root: Path, sources: Sequence[Path], on_event: OnEvent) -> None:
    """Verify what the user has, and pack it. Raises DataError, with nothing left behind."""
    if not sources:
        message = f"{listed.title} cannot be downloaded: ImageNet's terms let nobody pass it on"
        raise DataError(message, hint=listed.hint)
    if listed is MINI and (pickles := _pickles(sources)):
        _pack_pickles(_path(listed, root), pickles, on_event)
        return
    with ExitStack() as stack:
        opened = [stack.enter_context(open_members(path, hint=listed.hint)) for path in _candidates(sources)]
        by_class = _by_class(listed, opened)
        _verify(listed, by_class, sources)
        files = [image for name in sorted(by_class) for image in by_class[name]]
        shape, pairs = ImageShape(SIDE, 3, "bilinear"), list[tuple[str, str]]()
        images = twins(decoded(files, shape, what=listed.name, on_event=on_event), pairs)
        stream_pack(_path(listed, root), shape.chw, images, lambda: {"twins": pairs})
    if pairs:
        apart = [pair for pair in pairs if pair[0] != pair[1]]
        fact = (
            f"{len(pairs)} pairs of images are the same to the last bit, {len(apart)} of them in two classes"
        )
        on_event(Notice(f"{listed.name}: {fact}: a known flaw of the set, left as it is"))


def _pickles(sources: Sequence[Path]) -> list[Path]:
    """The pickles of mini-ImageNet among the sources or in them."""
    paths = [source.expanduser().resolve() for source in sources]
    if all(path.suffix in PICKLES for path in paths):
        return paths
    return cache_files(paths[0]) if len(paths) == 1 and paths[0].is_dir() else []


def _pack_pickles(path: Path, pickles: Sequence[Path], on_event: OnEvent) -> None:
    """Pack them class by class: within a split in the order of the names, as the images are packed."""
    classes = read_mini_cache(pickles, per_class=PER_CLASS)

    def images() -> Iterator[tuple[str, NDArray[np.uint8]]]:
        for number, (name, images_NHWC) in enumerate(classes, 1):
            for image_HWC in images_NHWC:
                yield name, image_HWC.transpose(2, 0, 1)
            on_event(Progress(f"{MINI.name}: read classes", number, sum(MINI.classes)))

    stream_pack(path, (3, SIDE, SIDE), images())


def is_here(listed: ListedSet, root: Path) -> bool:
    """Whether it was fetched."""
    return is_packed(_path(listed, root))


def open_pack(listed: ListedSet, root: Path, resize: str = "none", *, on_event: OnEvent) -> PackedImages:
    """All images at 84x84 in colour, memory-mapped. Raises DataError if absent or damaged."""
    if not is_here(listed, root):
        raise DataError(f"{listed.name} is not at {root}", hint=listed.hint)
    return load_pack(_path(listed, root), listed.name)


def split_by_folders(packed: PackedImages, scheme: str, seed: int) -> dict[str, NDArray[np.int64]]:
    """The classes of train, val and test by the folders that they lay in; `seed` chooses nothing."""
    splits = np.array([name.partition("/")[0] for name in packed.names])
    return {split: np.flatnonzero(splits == split) for split in SPLITS}


def _path(listed: ListedSet, root: Path) -> Path:
    return root / listed.name / f"{SIDE}x{SIDE}.npy"


def _candidates(sources: Sequence[Path]) -> list[Path]:
    """A source itself, or the archives that lie in it if there are any."""
    paths = []
    for source in sources:
        path = source.expanduser().resolve()
        inside = (
            sorted(file for file in path.iterdir() if file.name.endswith(ARCHIVES)) if path.is_dir() else []
        )
        paths += inside or [path]
    return paths


def _by_class(listed: ListedSet, opened: Sequence[Members]) -> dict[str, list[ImageFile]]:
    """The images of every class, sorted by file name; of tieredImageNet with the split before the class."""
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
            by_label.setdefault(label, {})[path.name] = of_members(members, name, label)
    return {label: [files[name] for name in sorted(files)] for label, files in by_label.items()}


def _verify(listed: ListedSet, by_class: dict[str, list[ImageFile]], sources: Sequence[Path]) -> None:
    """Raises DataError, which names what is missing or too much."""
    places = ", ".join(str(source) for source in sources)
    if not by_class:
        message = f"{places} holds no images in folders like n01532829, and none with such names"
        raise DataError(message, hint=listed.hint)
    for problem in _count_problems(listed, by_class):
        raise DataError(f"{places} is not the whole of {listed.title}: {problem}", hint=listed.hint)


def _count_problems(listed: ListedSet, by_class: dict[str, list[ImageFile]]) -> Iterator[str]:
    if listed is MINI:
        expected = listed_split(MINI.name)
        missing, more = sorted(expected.keys() - by_class.keys()), sorted(by_class.keys() - expected.keys())
        if missing:
            yield f"{len(missing)} of its 100 classes are missing, such as {missing[0]}"
        if more:
            yield f"{len(more)} classes do not belong to it, such as {more[0]}"
        for label, files in sorted(by_class.items()):
            if len(files) != PER_CLASS:
                yield f"{label} has {len(files):,} images instead of {PER_CLASS}"
        return
    for split, classes, images in zip(SPLITS, listed.classes, listed.images, strict=True):
        of_split = [files for label, files in by_class.items() if label.startswith(f"{split}/")]
        count = sum(map(len, of_split))
        if (len(of_split), count) != (classes, images):
            counts = f"{split} has {len(of_split)} classes and {count:,} images"
            yield f"{counts} instead of {classes} and {images:,}"
