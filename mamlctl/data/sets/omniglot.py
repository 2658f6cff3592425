"""Omniglot (Lake, Salakhutdinov & Tenenbaum 2015): 1,623 characters of 50 alphabets, each drawn by 20 people.

The originals are stored once, with one bit per pixel; each resize filter has its own pack of 28x28 images.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mamlctl.core.errors import DataError
from mamlctl.core.events import OnEvent, Progress
from mamlctl.core.literals import RESIZES
from mamlctl.data.counter_rng import shuffled
from mamlctl.data.fetching.downloads import Archive
from mamlctl.data.reading.archives import DOWNLOAD_AGAIN, Members, open_members
from mamlctl.data.reading.image_files import FILTERS, open_image
from mamlctl.data.reading.packs import PackedImages, is_packed, load_pack, pack, save_pack

NAME = "omniglot"
SIDE = 105
SMALL = 28

# The first of `RESIZES` is the default, since it gives the best raw pixels: a nearest neighbour's accuracy on
# 1,000 20-way 1-shot tasks of the test split is 28.3, 26.2, 25.7, 24.9 and 18.7 %, in their order. `nearest`
# drops 13 of 14 pixels; it is what the MAML++ code gets, since Pillow has no other filter for 1-bit images.
EVENT_EVERY = 1000  # images


@dataclass(frozen=True)
class OmniglotPart:
    """One of the two archives, and what it must contain."""

    folder: str
    alphabets: int
    characters: int
    images: int
    digest: str  # the result of `content_digest`

    @property
    def name(self) -> str:
        """The first part of class names."""
        return self.folder.removeprefix("images_")


# Counts: Lake et al. 2015. Digests: from a complete copy; 2,720 of its images were compared with upstream's
# `images_background_small1.zip` and are equal byte for byte.
PARTS = (
    OmniglotPart(
        "images_background",
        30,
        964,
        19_280,
        "5b7f1a2648ec9d3e2b69cd56dbad29acfe5c980f54296bce04d5841ebeefa46b",
    ),
    OmniglotPart(
        "images_evaluation",
        20,
        659,
        13_180,
        "f6b46bcf40cb2705362c93c5d3d9728b0c10ef362989f73993a3aa24e490ecd5",
    ),
)

# Vinyals et al. 2016 do not name the alphabets. These are from the published lists of Prototypical Networks
# (jakesnell/prototypical-networks, data/omniglot/splits/vinyals): five background alphabets are for val, the
# last 423 characters for test.
VINYALS_VAL = ("Hebrew", "Mkhedruli_(Georgian)", "Armenian", "Early_Aramaic", "Bengali")
VINYALS_TRAIN_AND_VAL = 1200

# The fractions of the MAML++ code, of 1,623 classes; 423 are left for test.
MAMLPP_TRAIN = 1150
MAMLPP_VAL = 50
LAKE_VAL_ALPHABETS = 5  # of 30; Lake et al. have no validation split, and Vinyals et al. use five alphabets

# md5 -> bytes of the archives, from TensorFlow Datasets (url_checksums/omniglot.txt).
SIZES = {"68d2efa1b9178cc56df9314c21c6e718": 9_464_212, "6b91aef0f799c5bb55b94e3f2daec811": 6_462_886}
ORIGIN = "github.com/brendenlake/omniglot"


def archives() -> tuple[Archive, ...]:
    """The two zips, with the addresses from torchvision, whose releases keep them up to date."""
    from torchvision.datasets import Omniglot  # imported here, since it imports torch

    return tuple(
        Archive(
            f"{name}.zip",
            (f"{Omniglot.download_url_prefix}/{name}.zip", f"https://{ORIGIN}/raw/master/python/{name}.zip"),
            md5,
            SIZES.get(md5),
        )
        for name, md5 in Omniglot.zips_md5.items()
    )


def prepare(
    root: Path, sources: Sequence[Path], on_event: OnEvent, parts: tuple[OmniglotPart, ...] = PARTS
) -> None:
    """Verify and pack Omniglot.

    Args:
        root: the data root.
        sources: the zips, the unpacked folders, or folders that contain either.
        on_event: receives progress.
        parts: what the two archives must contain.

    Raises:
        DataError: a file is missing, damaged or not Omniglot's, or the pack cannot be written.
    """
    save_pack(_originals(root), _read_verified(sources, parts, on_event))
    for resize in RESIZES:
        _small(root, resize).with_suffix(".json").unlink(missing_ok=True)


def is_here(root: Path) -> bool:
    """Whether Omniglot is in the data root."""
    return is_packed(_originals(root))


def open_pack(root: Path, resize: str = RESIZES[0], *, on_event: OnEvent) -> PackedImages:
    """Return all images: 28x28, ink 0, paper 255; each filter is packed on first use.

    Args:
        root: the data root.
        resize: a key of `FILTERS`.
        on_event: receives progress.

    Raises:
        DataError: Omniglot is missing or damaged.
    """
    path = _small(root, resize)
    if not is_packed(path):
        if not is_here(root):
            raise DataError(f"{NAME} is not in {root}", hint=f"run mamlctl fetch {NAME}")
        originals = load_pack(_originals(root), NAME)
        small_MCHW = _shrunk(originals.images_MCHW, resize, on_event)
        save_pack(path, pack(small_MCHW, originals.counts, originals.names))
    return load_pack(path, NAME)


def split_classes(packed: PackedImages, scheme: str, seed: int) -> dict[str, NDArray[np.int64]]:
    """Return the classes of train, val and test.

    Args:
        packed: all images.
        scheme: `maml++` (random classes), `vinyals` (fixed), or `lake` (fixed test classes, random alphabets
            for val).
        seed: the seed of the random choices.
    """
    names = packed.names
    if scheme == "maml++":
        order = shuffled(len(names), seed, "class split")
        train, val, test = np.split(order, [MAMLPP_TRAIN, MAMLPP_TRAIN + MAMLPP_VAL])
        return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}
    alphabets = np.array([name.split("/")[1] for name in names])
    if scheme == "vinyals":
        is_test = np.arange(len(names)) >= VINYALS_TRAIN_AND_VAL
        val_alphabets = list(VINYALS_VAL)
    else:
        is_test = np.array([name.startswith("evaluation/") for name in names])
        background = np.unique(alphabets[~is_test])
        val_alphabets = list(background[shuffled(len(background), seed, "class split")[:LAKE_VAL_ALPHABETS]])
    is_val = ~is_test & np.isin(alphabets, val_alphabets)
    return {
        "train": np.flatnonzero(~is_test & ~is_val),
        "val": np.flatnonzero(is_val),
        "test": np.flatnonzero(is_test),
    }


def _originals(root: Path) -> Path:
    return root / NAME / f"originals-{SIDE}.npy"


def _small(root: Path, resize: str) -> Path:
    return root / NAME / f"{SMALL}x{SMALL}-{resize}.npy"


def _shrunk(bits_MCHW: NDArray[np.uint8], resize: str, on_event: OnEvent) -> NDArray[np.uint8]:
    small_MCHW = np.empty((len(bits_MCHW), 1, SMALL, SMALL), dtype=np.uint8)
    for number, rows in enumerate(bits_MCHW[:, 0]):
        grey = Image.fromarray(np.unpackbits(rows, axis=-1, count=SIDE) * np.uint8(255))
        small_MCHW[number, 0] = np.asarray(grey.resize((SMALL, SMALL), FILTERS[resize]))
        if number % EVENT_EVERY == EVENT_EVERY - 1:
            on_event(Progress(f"{NAME}: shrink images", number + 1, len(bits_MCHW)))
    return small_MCHW


def _read_verified(
    sources: Sequence[Path], parts: tuple[OmniglotPart, ...], on_event: OnEvent
) -> PackedImages:
    """Both parts' images, one bit per pixel (rows padded to whole bytes), in the order of their paths."""
    bits, counts, names = [], [], []
    total, done = sum(part.images for part in parts), 0
    with ExitStack() as stack:
        opened = [stack.enter_context(open_members(path)) for path in _candidates(sources, parts)]
        # All counts are checked before the first pixel is decoded, so a missing file is reported at once.
        selected = [_select(part, opened, sources) for part in parts]
        for part, (members, images) in zip(parts, selected, strict=True):
            bits.append(_decode(members, images, on_event, done, total))
            done += len(images)
            if content_digest(images, bits[-1]) != part.digest:
                message = f"{members.path} has Omniglot's files, but not its pixels: digest "
                message += f"{content_digest(images, bits[-1]):.12} instead of {part.digest:.12}"
                raise DataError(message, hint=DOWNLOAD_AGAIN)
            classes = [f"{part.name}/{name.split('/')[1]}/{name.split('/')[2]}" for name in images]
            per_class = Counter(classes)  # in the order of the images
            names += list(per_class)
            counts += list(per_class.values())
    bits_MCHW = np.concatenate(bits)[:, None]
    return pack(bits_MCHW, np.array(counts, dtype=np.int64), tuple(names))


def _candidates(sources: Sequence[Path], parts: tuple[OmniglotPart, ...]) -> list[Path]:
    """The zips and unpacked parts among the sources and in their folders."""
    paths = []
    for source in sources:
        path = source.resolve()
        if path.is_dir() and path.name not in {part.folder for part in parts}:
            inside = [path / name for part in parts for name in (f"{part.folder}.zip", part.folder)]
            paths += [place for place in inside if place.exists()]
        else:
            paths.append(path)
    return paths


def _select(
    part: OmniglotPart, opened: Sequence[Members], sources: Sequence[Path]
) -> tuple[Members, list[str]]:
    """The first source with this part's files, and their sorted names; DataError for a wrong count."""
    pattern = re.compile(rf"{part.folder}/[^/]+/character\d+/\d+_\d+\.png")
    for members in opened:
        images = sorted(
            (name for name in members.names if pattern.fullmatch(name)), key=lambda name: name.split("/")
        )
        if images:
            break
    else:
        if named := [members.path for members in opened if members.path.stem == part.folder]:
            example = f"{part.folder}/Greek/character01/0001_01.png"
            raise DataError(f"{named[0]} has no images with names like {example}", hint=DOWNLOAD_AGAIN)
        places = ", ".join(str(source) for source in sources)
        hint = "give --from the folder that contains images_background and images_evaluation, zipped or not"
        raise DataError(f"{places} contains neither {part.folder}.zip nor a folder {part.folder}", hint=hint)
    alphabets = len({name.split("/")[1] for name in images})
    characters = len({name.rpartition("/")[0] for name in images})
    if (alphabets, characters, len(images)) != (part.alphabets, part.characters, part.images):
        message = (
            f"{members.path} contains {alphabets} alphabets, {characters} characters and {len(images):,} "
        )
        message += f"images, but Omniglot's has {part.alphabets}, {part.characters} and {part.images:,}"
        raise DataError(message, hint=DOWNLOAD_AGAIN)
    return members, images


def _decode(
    members: Members, images: Sequence[str], on_event: OnEvent, done: int, total: int
) -> NDArray[np.uint8]:
    bits = np.empty((len(images), SIDE, (SIDE + 7) // 8), dtype=np.uint8)
    for number, name in enumerate(images):
        bits[number] = np.packbits(_pixels(members, name), axis=-1)
        if number % EVENT_EVERY == EVENT_EVERY - 1:
            on_event(Progress(f"{NAME}: read images", done + number + 1, total))
    return bits


def _pixels(members: Members, name: str) -> NDArray[np.bool_]:
    expected = f"mode 1, {SIDE}x{SIDE} pixels"
    display_name = f"{name} in {members.path}"
    with open_image(members.read(name), display_name, ("PNG",), hint=DOWNLOAD_AGAIN) as image:
        facts = f"mode {image.mode}, {image.width}x{image.height} pixels"
        if facts == expected:  # before any pixel is decoded, so a bomb does not expand
            return np.asarray(image)
    message = f"image {display_name} has {facts}, but Omniglot's have {expected}"
    raise DataError(message, hint=DOWNLOAD_AGAIN)


def content_digest(names: Sequence[str], bits: NDArray[np.uint8]) -> str:
    """Return the sha256 of the paths and packed pixels of images, in order; `PARTS` has the expected ones."""
    digest = hashlib.sha256()
    for name, rows in zip(names, bits, strict=True):
        digest.update(name.encode() + b"\0" + rows.tobytes())
    return digest.hexdigest()
