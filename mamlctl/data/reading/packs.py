"""Packs: all images of a data set in a uint8 array, ordered by class, and the files that store it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import OnEvent
from mamlctl.core.files import expanded, read_at, read_object, replacing
from mamlctl.data.fetching.locks import locked
from mamlctl.settings.variables import origin

FORMAT = 1

# Of larger packs, only a sample of blocks is verified at opening: hashing takes 1 s per 1.8 GB on one
# server core.
DIGEST_CHECKED_BELOW = 64 * 1024**2  # bytes
BLOCK = 1024**2  # bytes; each has a CRC-32, which takes half the time of a digest
SAMPLED = 64  # blocks
# What reading a damaged sidecar or array raises.
WRONG = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
DAMAGE = (*WRONG, OSError, EOFError, SyntaxError, TokenError)
# The lists in a pack's facts, and the type of their items: text, or a list of texts.
FACTS = {"older_digests": str, "left_out": str, "twins": list}


@dataclass(frozen=True)
class PackedImages:
    """All images: first those of class 0, then those of class 1, and so on."""

    images_MCHW: NDArray[np.uint8]
    starts: NDArray[np.int64]  # position of each class's first image, and at the end the number of images
    names: tuple[str, ...]  # one per class
    digest: str  # sha256 of shape, names, starts and pixels
    facts: Mapping[str, Any] = field(default_factory=dict)  # further facts of the data set

    @property
    def counts(self) -> NDArray[np.int64]:
        """Images per class."""
        return np.diff(self.starts)

    @property
    def older_digests(self) -> tuple[str, ...]:
        """The digests of packs of the same images that had their classes in another order."""
        return tuple(self.facts.get("older_digests", ()))

    def of_classes(self, names: Sequence[str]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """Yield each of these classes and its images_MCHW."""
        numbers = {name: number for number, name in enumerate(self.names)}
        for name in names:
            yield name, self.images_MCHW[self.starts[numbers[name]] : self.starts[numbers[name] + 1]]

    def digest_in_order(self, names: Sequence[str]) -> str:
        """Return the digest of a pack of the same images with its classes in this order."""
        counts = dict(zip(self.names, self.counts.tolist(), strict=True))
        starts = np.cumsum([0, *(counts[name] for name in names)], dtype=np.int64)
        digest = _digest_of_facts(self.images_MCHW.shape, starts, tuple(names))
        for _, images_MCHW in self.of_classes(names):
            digest.update(np.ascontiguousarray(images_MCHW).data)
        return digest.hexdigest()


def pack(images_MCHW: NDArray[np.uint8], counts: NDArray[np.int64], names: tuple[str, ...]) -> PackedImages:
    """Make a pack in memory.

    Args:
        images_MCHW: the images, ordered by class.
        counts: images per class.
        names: the names of the classes.
    """
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return PackedImages(images_MCHW, starts, names, _digest(images_MCHW, starts, names))


def _digest(images_MCHW: NDArray[np.uint8], starts: NDArray[np.int64], names: tuple[str, ...]) -> str:
    digest = _digest_of_facts(images_MCHW.shape, starts, names)
    digest.update(np.ascontiguousarray(images_MCHW).data)
    return digest.hexdigest()


def _digest_of_facts(
    shape: tuple[int, ...], starts: NDArray[np.int64], names: tuple[str, ...]
) -> hashlib._Hash:
    facts = {"shape": shape, "names": names, "starts": starts.tolist()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode())


def data_root(folder: str | None) -> Path:
    """Return the folder of prepared data sets as an absolute path; None: the platform's cache folder.

    Raises SettingsError if it is a file.
    """
    import platformdirs

    root = expanded(folder).absolute() if folder else platformdirs.user_cache_path("mamlctl")
    if folder and root.is_file():
        fact = f"{origin('data_root', folder)} is {folder}, which is a file, not a folder"
        raise SettingsError([(fact, "name a folder")])
    return root


def is_packed(path: Path) -> bool:
    """Whether there is a complete pack at `path`; its sidecar is written last."""
    return path.with_suffix(".json").is_file()


def save_pack(path: Path, packed: PackedImages) -> None:
    """Write `path` (.npy) and its .json sidecar. Raises DataError if the folder cannot be written."""
    with _replacing_both(path) as (pixels, words):
        np.save(pixels, packed.images_MCHW, allow_pickle=False)
        pixels.flush()
        sums = [zlib.crc32(block) for block in _blocks(pixels, packed.images_MCHW.nbytes)]
        facts = packed.starts, packed.names, packed.digest, packed.facts
        words.write(_sidecar(packed.images_MCHW.shape, *facts, sums))


def stream_pack(
    path: Path,
    shape_CHW: tuple[int, int, int],
    images: Iterable[tuple[str, NDArray[np.uint8]]],
    facts: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Write a pack image by image, so that it may be larger than memory.

    Args:
        path: the .npy file.
        shape_CHW: the shape of every image.
        images: class names and images, with the images of each class together.
        facts: called at the end, returns further facts to store.

    Raises:
        DataError: the folder cannot be written.
    """
    counts: dict[str, int] = {}
    with _replacing_both(path) as (pixels, words):
        start = _write_header(pixels, (1, *shape_CHW))
        for name, image_CHW in images:
            assert name not in counts or name == next(reversed(counts)), f"images of {name} are not together"
            pixels.write(image_CHW.tobytes())
            counts[name] = counts.get(name, 0) + 1
        names, starts = tuple(counts), np.cumsum([0, *counts.values()], dtype=np.int64)
        shape = (int(starts[-1]), *shape_CHW)
        # numpy reserves space in its header for a larger first dimension.
        if _write_header(pixels, shape) != start:
            raise DataError(f"{path} cannot store {shape[0]:,} images", hint="use fewer images")
        pixels.flush()
        digest, sums = _digest_and_sums(pixels, shape, starts, names)
        words.write(_sidecar(shape, starts, names, digest, facts(), sums))


def _digest_and_sums(
    file: BinaryIO, shape: tuple[int, ...], starts: NDArray[np.int64], names: tuple[str, ...]
) -> tuple[str, list[int]]:
    """The digest of a pack and the checksum of each of its blocks; reads the file once."""
    digest, sums = _digest_of_facts(shape, starts, names), []
    for block in _blocks(file, math.prod(shape)):
        digest.update(block)
        sums.append(zlib.crc32(block))
    return digest.hexdigest(), sums


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The last `size` bytes of a file, which are the pixels, in blocks."""
    end = os.fstat(file.fileno()).st_size
    for start in range(end - size, end, BLOCK):
        yield read_at(file, min(BLOCK, end - start), start)


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> int:
    """Write numpy's header of a uint8 array -> its length in bytes; then the file is at its end."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    file.seek(0)
    file.write(header.getvalue())
    file.seek(0, io.SEEK_END)
    return len(header.getvalue())


def _sidecar(
    shape: tuple[int, ...],
    starts: NDArray[np.int64],
    names: tuple[str, ...],
    digest: str,
    facts: Mapping[str, Any],
    sums: Sequence[int],
) -> bytes:
    """The contents of a sidecar, the .json file next to the pixels."""
    document = {"format": FORMAT, "shape": list(shape), "starts": starts.tolist(), "names": list(names)}
    document |= {"digest": digest, "facts": dict(facts), "crc32": list(sums)}
    return json.dumps(document).encode()


@contextmanager
def _replacing_both(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Files for pixels and sidecar, moved into place if the block succeeds. Raises DataError."""
    sidecar = path.with_suffix(".json")
    try:
        # Both are written before either is moved into place, so a full disk leaves the old pack intact.
        with replacing(sidecar) as words, replacing(path) as pixels:
            yield pixels, words
            for file in (pixels, words):  # the sidecar is never older than the pixels: see `verified_at`
                file.flush()
                os.fsync(file.fileno())
            # A crash between the two moves must not leave an old sidecar with new pixels.
            sidecar.unlink(missing_ok=True)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}"
        raise DataError(message, hint="free disk space or choose another --data-root") from error


def writing_pack(path: Path, name: str, on_event: OnEvent) -> AbstractContextManager[None]:
    """Lock a pack for the block, which changes it; arguments and exceptions as in `locked`."""
    return locked(path.with_suffix(".lock"), name, on_event)


def packs_of(home: Path) -> list[Path]:
    """Return every complete pack in a data set's folder."""
    return sorted(sidecar.with_suffix(".npy") for sidecar in home.glob("*.json"))


def verified_at(path: Path) -> datetime | None:
    """Return when a pack was written or last verified, or None if it has changed since."""
    try:
        verified = path.with_suffix(".json").stat().st_mtime
        return datetime.fromtimestamp(verified).astimezone() if path.stat().st_mtime <= verified else None
    except OSError:
        return None


def verify_pack(path: Path, name: str, on_event: OnEvent) -> PackedImages:
    """Load a pack of any size and recompute its digest.

    Args:
        path: the .npy file.
        name: the data set.
        on_event: receives a notice if another process is changing the pack.

    Raises:
        DataError: the pack is damaged.
    """
    packed, stored_sums = _open(path, name)
    with path.open("rb") as pixels:
        digest, sums = _digest_and_sums(pixels, packed.images_MCHW.shape, packed.starts, packed.names)
    if digest != packed.digest:
        raise _damage(path, name, packed)
    sidecar = path.with_suffix(".json")
    with suppress(OSError, DataError):  # the data root may be shared and read-only
        if stored_sums == sums:
            os.utime(sidecar)
        else:  # an older pack has none
            with writing_pack(path, name, on_event):
                document = read_object(sidecar)
                if document.get("digest") == packed.digest:  # otherwise another process has replaced the pack
                    with replacing(sidecar) as words:
                        words.write(json.dumps(document | {"crc32": sums}).encode())
    return packed


def add_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Add facts to those of a pack, in a block of `writing_pack`, unless the data root is read-only."""
    sidecar = path.with_suffix(".json")
    with suppress(OSError):
        document, status = read_object(sidecar), sidecar.stat()
        document["facts"] = document.get("facts", {}) | facts
        with replacing(sidecar) as words:
            words.write(json.dumps(document).encode())
        os.utime(sidecar, ns=(status.st_atime_ns, status.st_mtime_ns))  # it was not verified again


def load_pack(path: Path, name: str) -> PackedImages:
    """Memory-map a pack. Raises DataError if the pack of data set `name` is missing or damaged."""
    packed, sums = _open(path, name)
    if packed.images_MCHW.nbytes < DIGEST_CHECKED_BELOW:
        is_sound = _digest(packed.images_MCHW, packed.starts, packed.names) == packed.digest
    else:
        is_sound = _sample_is_sound(path, packed.images_MCHW.nbytes, sums)
    if not is_sound:
        raise _damage(path, name, packed)
    return packed


def _open(path: Path, name: str) -> tuple[PackedImages, list[int]]:
    """A pack whose pixels are not verified, and the checksums of its blocks."""
    try:
        document = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return _from_sidecar(document, path), document.get("crc32", [])
    except DAMAGE as error:
        fact = f"{path} or its .json is damaged: {str(error).partition(chr(10))[0]}"
        raise DataError(fact, hint=f"run mamlctl fetch {name} --force") from error


def _damage(path: Path, name: str, packed: PackedImages) -> DataError:
    fact = f"{path} is damaged: its pixels or names differ from digest {packed.digest:.12}"
    return DataError(fact, hint=f"run mamlctl fetch {name} --force")


def _sample_is_sound(path: Path, size: int, sums: Sequence[int]) -> bool:
    """Check blocks at random, so that the next start checks others."""
    numbers = random.SystemRandom().sample(range(len(sums)), min(len(sums), SAMPLED))
    with path.open("rb") as file:
        begin = os.fstat(file.fileno()).st_size - size
        return all(
            zlib.crc32(read_at(file, min(BLOCK, size - number * BLOCK), begin + number * BLOCK))
            == sums[number]
            for number in numbers
        )


def _from_sidecar(document: dict[str, Any], path: Path) -> PackedImages:
    """A pack. Raises an error of `DAMAGE` if sidecar and array do not match."""
    if document["format"] != FORMAT:
        raise ValueError(f"its format is {document['format']!r}, but this version reads {FORMAT}")
    # Copy-on-write, since torch.from_numpy warns about read-only arrays.
    images_MCHW = np.load(path, mmap_mode="c", allow_pickle=False)
    starts, names = np.array(document["starts"], dtype=np.int64), tuple(map(str, document["names"]))
    if images_MCHW.dtype != np.uint8 or list(images_MCHW.shape) != document["shape"] or images_MCHW.ndim != 4:
        raise ValueError(
            f"it contains {images_MCHW.dtype} {images_MCHW.shape}, not uint8 {document['shape']}"
        )
    fit = starts.shape == (len(names) + 1,) and [starts[0], starts[-1]] == [0, len(images_MCHW)]
    if not fit or (np.diff(starts) < 1).any():
        raise ValueError(f"{len(names)} classes do not match {len(images_MCHW)} images")
    sums = document.get("crc32", [])  # older packs have none
    if not isinstance(sums, list) or len(sums) not in (0, math.ceil(images_MCHW.nbytes / BLOCK)):
        raise ValueError(f"{len(sums)} checksums do not match {images_MCHW.nbytes:,} bytes")
    facts = document.get("facts", {})
    if not isinstance(facts, dict):
        raise ValueError(f"its facts are {facts!r:.40}")
    for name, kind in FACTS.items():
        values = facts.get(name, [])
        texts = isinstance(values, list) and all({*map(type, value)} == {str} for value in values)
        if not texts or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"its {name} are {values!r:.40}")
    return PackedImages(images_MCHW, starts, names, str(document["digest"]), facts)
