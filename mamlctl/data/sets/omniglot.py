"""Omniglot (Lake, Salakhutdinov & Tenenbaum 2015): 1,623 characters of 50 alphabets, each drawn by 20 people.

The originals are kept once, a bit per pixel; images of 28x28 are packed from them for each resize filter.
"""

from __future__ import annotations

import hashlib
import io
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
from mamlctl.data.counter_rng import shuffled
from mamlctl.data.fetching.downloads import Archive
from mamlctl.data.reading.archives import Members, open_members
from mamlctl.data.reading.image_files import FILTERS
from mamlctl.data.reading.packs import PackedImages, is_packed, load_pack, pack, save_pack

NAME = "omniglot"
SIDE = 105
SMALL = 28

# Of `FILTERS` the first is the default, for the best raw pixels: a nearest neighbour's accuracy on 1,000
# 20-way 1-shot tasks of the test split is 28.3, 26.2, 25.7, 24.9 and 18.7 % in their order. `nearest` drops
# 13 of 14 pixels, and is what the MAML++ code gets: Pillow shrinks 1-bit images by no other.
RESIZES = tuple(FILTERS)
SPLIT_SCHEMES = ("maml++", "vinyals", "lake")
EVENT_EVERY = 1000  # images


@dataclass(frozen=True)
class OmniglotPart:
    """One of the two archives, and what it must hold."""

    folder: str
    alphabets: int
    characters: int
    images: int
    digest: str  # of `Decoded.digest`

    @property
    def name(self) -> str:
        """How class names begin."""
        return self.folder.removeprefix("images_")


# Counts: Lake et al. 2015. Digests: of a complete copy, of which 2,720 images were compared with upstream's
# `images_background_small1.zip` and found equal, byte for byte.
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

# Vinyals et al. 2016 name no alphabets; these are the published lists of Prototypical Networks' code
# (jakesnell/prototypical-networks, data/omniglot/splits/vinyals): five background alphabets validate, the
# last 423 characters test.
VINYALS_VAL = ("Hebrew", "Mkhedruli_(Georgian)", "Armenian", "Early_Aramaic", "Bengali")
VINYALS_TRAIN_AND_VAL = 1200

# Of 1,623 classes, the MAML++ code's fractions; 423 are left for test.
MAMLPP_TRAIN = 1150
MAMLPP_VAL = 50
LAKE_VAL_ALPHABETS = 5  # of 30; Lake et al. have no validation split, this is as many alphabets as Vinyals's

# Bytes of the archives by their md5, as TensorFlow Datasets lists them (url_checksums/omniglot.txt).
SIZES = {"68d2efa1b9178cc56df9314c21c6e718": 9_464_212, "6b91aef0f799c5bb55b94e3f2daec811": 6_462_886}
ORIGIN = "github.com/brendenlake/omniglot"


def archives() -> tuple[Archive, ...]:
    """The two zips as torchvision names them, so that its corrections reach us with its releases."""
    from torchvision.datasets import Omniglot  # here, since it imports torch

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
    """Verify zips, unpacked folders, or folders of either, and pack them. Raises DataError for others."""
    save_pack(_originals(root), _read_verified(sources, parts, on_event))
    for resize in RESIZES:
        _small(root, resize).with_suffix(".json").unlink(missing_ok=True)


def is_here(root: Path) -> bool:
    """Whether Omniglot was fetched."""
    return is_packed(_originals(root))


def open_pack(root: Path, resize: str = RESIZES[0], *, on_event: OnEvent) -> PackedImages:
    """All images at 28x28, ink 0, paper 255; packed on first use. Raises DataError if absent or damaged."""
    path = _small(root, resize)
    if not is_packed(path):
        if not is_here(root):
            raise DataError(f"{NAME} is not at {root}", hint=f"mamlctl fetch {NAME}")
        originals = load_pack(_originals(root), NAME)
        small_MCHW = _shrunk(originals.images_MCHW, resize, on_event)
        save_pack(path, pack(small_MCHW, originals.counts, originals.names))
    return load_pack(path, NAME)


def split_classes(packed: PackedImages, scheme: str, seed: int) -> dict[str, NDArray[np.int64]]:
    """The classes of train, val and test: `maml++` (by `seed`), `vinyals`, or `lake` (val by `seed`)."""
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
    """Every part's images, a bit per pixel (rows padded to whole bytes), classes in the published order."""
    hint = "name the folder that holds images_background and images_evaluation, zipped or not"
    bits, counts, names = [], [], []
    total, done = sum(part.images for part in parts), 0
    with ExitStack() as stack:
        opened = [stack.enter_context(open_members(path, hint=hint)) for path in _candidates(sources, parts)]
        # All counts before the first pixel: a missing file is told at once.
        selected = [_select(part, opened, sources, hint) for part in parts]
        for part, (members, images) in zip(parts, selected, strict=True):
            bits.append(_decode(members, images, hint, on_event, done, total))
            done += len(images)
            if content_digest(images, bits[-1]) != part.digest:
                message = f"{members.path} has Omniglot's files, but not its pixels: digest "
                message += f"{content_digest(images, bits[-1]):.12} instead of {part.digest:.12}"
                raise DataError(message, hint="get the archive anew")
            classes = [f"{part.name}/{name.split('/')[1]}/{name.split('/')[2]}" for name in images]
            per_class = Counter(classes)  # in the order of the images
            names += list(per_class)
            counts += list(per_class.values())
    bits_MCHW = np.concatenate(bits)[:, None]
    return pack(bits_MCHW, np.array(counts, dtype=np.int64), tuple(names))


def _candidates(sources: Sequence[Path], parts: tuple[OmniglotPart, ...]) -> list[Path]:
    """A source itself if it is a zip or an unpacked part, else what the folder holds of the parts."""
    paths = []
    for source in sources:
        path = source.expanduser().resolve()
        if path.is_dir() and path.name not in {part.folder for part in parts}:
            inside = [path / name for part in parts for name in (f"{part.folder}.zip", part.folder)]
            paths += [place for place in inside if place.exists()]
        else:
            paths.append(path)
    return paths


def _select(
    part: OmniglotPart, opened: Sequence[Members], sources: Sequence[Path], hint: str
) -> tuple[Members, list[str]]:
    """The first source with this part's files, and their names in order; DataError for a wrong count."""
    pattern = re.compile(rf"{part.folder}/[^/]+/character\d+/\d+_\d+\.png")
    for members in opened:
        images = sorted(
            (name for name in members.names if pattern.fullmatch(name)), key=lambda name: name.split("/")
        )
        if images:
            break
    else:
        places = ", ".join(str(source) for source in sources)
        raise DataError(f"{places} holds neither {part.folder}.zip nor a folder {part.folder}", hint=hint)
    alphabets = len({name.split("/")[1] for name in images})
    characters = len({name.rpartition("/")[0] for name in images})
    if (alphabets, characters, len(images)) != (part.alphabets, part.characters, part.images):
        message = f"{members.path} holds {alphabets} alphabets, {characters} characters and {len(images):,} "
        message += f"images, but Omniglot has {part.alphabets}, {part.characters} and {part.images:,} there"
        raise DataError(message, hint="get the archive anew")
    return members, images


def _decode(
    members: Members, images: Sequence[str], hint: str, on_event: OnEvent, done: int, total: int
) -> NDArray[np.uint8]:
    bits = np.empty((len(images), SIDE, (SIDE + 7) // 8), dtype=np.uint8)
    for number, name in enumerate(images):
        bits[number] = np.packbits(_pixels(members, name), axis=-1)
        if number % EVENT_EVERY == EVENT_EVERY - 1:
            on_event(Progress(f"{NAME}: read images", done + number + 1, total))
    return bits


def _pixels(members: Members, name: str) -> NDArray[np.bool_]:
    data = members.read(name)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            facts = f"{image.mode} {image.width}x{image.height}"
            if facts == f"1 {SIDE}x{SIDE}":  # before any pixel is decoded: a bomb's size is told here
                return np.asarray(image)
    # Pillow's words for a file that is no image, cut off or broken, or absurdly large.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        message = f"cannot read image {name} in {members.path}"
        raise DataError(message, hint="get the archive anew") from error
    message = f"image {name} in {members.path} is {facts}, but Omniglot's are 1-bit {SIDE}x{SIDE}"
    raise DataError(message, hint="get the archive anew")


def content_digest(names: Sequence[str], bits: NDArray[np.uint8]) -> str:
    """sha256 over every image's path and decoded pixels, in order: what the pins of `PARTS` are of."""
    digest = hashlib.sha256()
    for name, rows in zip(names, bits, strict=True):
        digest.update(name.encode() + b"\0" + rows.tobytes())
    return digest.hexdigest()
