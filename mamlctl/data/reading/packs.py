"""All images of a data set as one uint8 array, ordered by class, and its cache on disk."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError
from mamlctl.core.files import replacing

FORMAT = 1

# Larger packs are verified by their shape alone: hashing takes 1 s per 1.8 GB of one server core.
DIGEST_CHECKED_BELOW = 64 * 1024**2
HASHED_AT_A_TIME = 8 * 1024**2  # bytes


@dataclass(frozen=True)
class PackedImages:
    """Every image of every class: all of class 0, then all of class 1, and so on."""

    images_MCHW: NDArray[np.uint8]
    starts: NDArray[np.int64]  # where each class begins, and where the last one ends
    names: tuple[str, ...]  # one per class
    digest: str  # sha256 over shape, names, starts and pixels
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else whoever packed them wrote down

    @property
    def counts(self) -> NDArray[np.int64]:
        """Images in each class."""
        return np.diff(self.starts)


def pack(images_MCHW: NDArray[np.uint8], counts: NDArray[np.int64], names: tuple[str, ...]) -> PackedImages:
    """Join images that are already ordered by class with the facts about them."""
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
    """The folder of prepared data sets, as an absolute path; None: in the platform's cache folder."""
    import platformdirs

    return Path(folder).expanduser().absolute() if folder else platformdirs.user_cache_path("mamlctl")


def is_packed(path: Path) -> bool:
    """Whether a complete pack lies at `path`: its sidecar is written last."""
    return path.with_suffix(".json").is_file()


def save_pack(path: Path, packed: PackedImages) -> None:
    """Write `path` (.npy) and its .json sidecar. Raises DataError if the folder cannot be written."""
    with _replacing_both(path) as (pixels, words):
        np.save(pixels, packed.images_MCHW, allow_pickle=False)
        words.write(
            _sidecar(packed.images_MCHW.shape, packed.starts, packed.names, packed.digest, packed.facts)
        )


def stream_pack(
    path: Path,
    shape_CHW: tuple[int, int, int],
    images: Iterable[tuple[str, NDArray[np.uint8]]],
    facts: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Write images one by one, so that a set larger than memory can be packed.

    `images`: class name and image, all of a class together. `facts`: what else to write down, asked for at
    the end. Raises DataError if the folder cannot be written.
    """
    counts: dict[str, int] = {}
    with _replacing_both(path) as (pixels, words):
        start = _write_header(pixels, (1, *shape_CHW))
        for name, image_CHW in images:
            assert name not in counts or name == next(reversed(counts)), f"{name} comes twice"
            pixels.write(image_CHW.tobytes())
            counts[name] = counts.get(name, 0) + 1
        names, starts = tuple(counts), np.cumsum([0, *counts.values()], dtype=np.int64)
        shape = (int(starts[-1]), *shape_CHW)
        # numpy leaves room in its header for a larger first dimension.
        if _write_header(pixels, shape) != start:
            raise DataError(f"{path} cannot hold {shape[0]:,} images", hint="pack fewer")
        pixels.flush()
        digest = _digest_of_facts(shape, starts, names)
        while block := os.pread(pixels.fileno(), HASHED_AT_A_TIME, start):
            digest.update(block)
            start += len(block)
        words.write(_sidecar(shape, starts, names, digest.hexdigest(), facts()))


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> int:
    """numpy's header of a uint8 array, at the file's start -> where the pixels begin; stays at the end."""
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
) -> bytes:
    """What stands beside the pixels."""
    document = {"format": FORMAT, "shape": list(shape), "starts": starts.tolist(), "names": list(names)}
    return json.dumps(document | {"digest": digest, "facts": dict(facts)}).encode()


@contextmanager
def _replacing_both(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Files for pixels and sidecar, which take their places if the block ends well. Raises DataError."""
    sidecar = path.with_suffix(".json")
    try:
        # Both are written before either takes its place, so that a full disk leaves the old pack whole.
        with replacing(sidecar) as words, replacing(path) as pixels:
            yield pixels, words
            for file in (pixels, words):  # the sidecar is never the older one: see `verified_at`
                file.flush()
                os.fsync(file.fileno())
            # A crash between the two files must not leave an old sidecar beside new pixels.
            sidecar.unlink(missing_ok=True)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}"
        raise DataError(message, hint="make room or choose another --data-root") from error


def packs_of(home: Path) -> list[Path]:
    """Every complete pack in a data set's folder."""
    return sorted(sidecar.with_suffix(".npy") for sidecar in home.glob("*.json"))


def verified_at(path: Path) -> datetime | None:
    """When a pack was last found whole: when it was written or `verify_pack` saw it, if not changed since."""
    try:
        verified = path.with_suffix(".json").stat().st_mtime
        return datetime.fromtimestamp(verified).astimezone() if path.stat().st_mtime <= verified else None
    except OSError:
        return None


def verify_pack(path: Path, name: str) -> PackedImages:
    """Load a pack and recompute its digest, however large it is. Raises DataError if it is damaged."""
    packed = load_pack(path, name, whole=True)
    with suppress(OSError):  # a root that is shared and cannot be written
        os.utime(path.with_suffix(".json"))
    return packed


def load_pack(path: Path, name: str, *, whole: bool = False) -> PackedImages:
    """Memory-map what `save_pack` wrote for data set `name`. Raises DataError if any of it is damaged.

    `whole`: recompute the digest of a large pack too.
    """
    hint = f"mamlctl fetch {name} --force"
    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        packed = _from_facts(facts, path)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataError(f"{path} or its .json is damaged: {error}", hint=hint) from error
    small = packed.images_MCHW.nbytes < DIGEST_CHECKED_BELOW
    if (small or whole) and _digest(packed.images_MCHW, packed.starts, packed.names) != packed.digest:
        message = f"{path} is damaged: its pixels or names differ from digest {packed.digest:.12}"
        raise DataError(message, hint=hint)
    return packed


def _from_facts(facts: dict[str, Any], path: Path) -> PackedImages:
    """Raises ValueError, KeyError or TypeError where sidecar and array do not fit together."""
    if facts["format"] != FORMAT:
        raise ValueError(f"its format is {facts['format']!r}, this version reads {FORMAT}")
    # Copy-on-write, since torch.from_numpy warns about arrays that it must not write to.
    images_MCHW = np.load(path, mmap_mode="c", allow_pickle=False)
    starts, names = np.array(facts["starts"], dtype=np.int64), tuple(map(str, facts["names"]))
    if images_MCHW.dtype != np.uint8 or list(images_MCHW.shape) != facts["shape"] or images_MCHW.ndim != 4:
        raise ValueError(f"it holds {images_MCHW.dtype} {images_MCHW.shape}, not uint8 {facts['shape']}")
    if len(starts) != len(names) + 1 or starts[-1] != len(images_MCHW) or (np.diff(starts) < 1).any():
        raise ValueError(f"{len(names)} classes do not fit {len(images_MCHW)} images")
    return PackedImages(images_MCHW, starts, names, str(facts["digest"]), facts.get("facts", {}))
