"""All images of a data set as one uint8 array, ordered by class, and its cache on disk."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mamlctl.errors import DataError
from mamlctl.runs import replacing, write_json

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


def default_data_root() -> Path:
    """Where prepared data sets lie unless told otherwise: the platform's cache folder."""
    import platformdirs

    return platformdirs.user_cache_path("mamlctl")


def data_root(given: str | None) -> Path:
    """The folder of prepared data sets, as an absolute path."""
    return Path(given).expanduser().absolute() if given else default_data_root()


def is_packed(path: Path) -> bool:
    """Whether a complete pack lies at `path`: its sidecar is written last."""
    return path.with_suffix(".json").is_file()


def save_pack(path: Path, packed: PackedImages) -> None:
    """Write `path` (.npy) and its .json sidecar. Raises DataError if the folder cannot be written."""
    with _writing(path) as file:
        np.save(file, packed.images_MCHW, allow_pickle=False)
    _save_facts(path, packed.images_MCHW.shape, packed.starts, packed.names, packed.digest, packed.facts)


def stream_pack(
    path: Path,
    shape_CHW: tuple[int, int, int],
    names: Sequence[str],
    images: Iterable[tuple[int, NDArray[np.uint8]]],
    facts: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Write images one by one, so that a set larger than memory can be packed.

    `images`: class number and image, class after class; classes that get none are left out. `facts`: what
    else to write down, asked for at the end. Raises DataError if the folder cannot be written.
    """
    counts = np.zeros(len(names), dtype=np.int64)
    with _writing(path) as file:
        start = _write_header(file, (len(names), *shape_CHW))
        for number, image_CHW in images:
            file.write(image_CHW.tobytes())
            counts[number] += 1
        there = counts > 0
        kept = tuple(name for name, here in zip(names, there, strict=True) if here)
        starts = np.concatenate([[0], np.cumsum(counts[there])]).astype(np.int64)
        shape = (int(counts.sum()), *shape_CHW)
        # numpy leaves room in its header for a larger first dimension.
        if _write_header(file, shape) != start:
            raise DataError(f"{path} cannot hold {shape[0]:,} images", hint="pack fewer")
    digest = _digest_of_facts(shape, starts, kept)
    with path.open("rb") as written:
        written.seek(start)
        while block := written.read(HASHED_AT_A_TIME):
            digest.update(block)
    _save_facts(path, shape, starts, kept, digest.hexdigest(), facts())


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> int:
    """numpy's header of a uint8 array, at the file's start -> where the pixels begin; stays at the end."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    file.seek(0)
    file.write(header.getvalue())
    file.seek(0, io.SEEK_END)
    return len(header.getvalue())


@contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block has ended well. Raises DataError if it cannot."""
    try:
        with replacing(path) as file:
            yield file
            # A crash between the two files must not leave an old sidecar beside new pixels.
            path.with_suffix(".json").unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> DataError:
    message = f"cannot write {path}: {error.strerror or error}"
    return DataError(message, hint="make room or choose another --data-root")


def _save_facts(
    path: Path,
    shape: tuple[int, ...],
    starts: NDArray[np.int64],
    names: tuple[str, ...],
    digest: str,
    facts: Mapping[str, Any],
) -> None:
    """The sidecar, which completes a pack."""
    document = {"format": FORMAT, "shape": list(shape), "starts": starts.tolist(), "names": list(names)}
    try:
        write_json(path.with_suffix(".json"), document | {"digest": digest, "facts": dict(facts)})
    except OSError as error:
        raise _cannot_write(path, error) from error


def load_pack(path: Path, name: str) -> PackedImages:
    """Memory-map what `save_pack` wrote for data set `name`. Raises DataError if any of it is damaged."""
    hint = f"mamlctl fetch {name} --force"
    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        packed = _from_facts(facts, path)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataError(f"{path} or its .json is damaged: {error}", hint=hint) from error
    small = packed.images_MCHW.nbytes < DIGEST_CHECKED_BELOW
    if small and _digest(packed.images_MCHW, packed.starts, packed.names) != packed.digest:
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
