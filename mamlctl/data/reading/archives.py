"""Files read directly from folders and archives (zip, tar, compressed tar), without unpacking them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, BinaryIO

from mamlctl.core.errors import DataError
from mamlctl.core.files import read_at
from mamlctl.data.reading.zip_members import open_member, rest_of_member

CHECK_FROM = "give --from a folder or archives that can be read"
DOWNLOAD_AGAIN = "download the archive again"
DISTRUST = "download it from its authors, or unpack it and use --from FOLDER if you trust it"

FILE_BYTES = 512 * 1024**2  # of a file in a folder: more than 40 megapixels of 16 bits and 4 channels
MEMBER_BYTES = 16 * 1024**2  # larger than any image of any data set, but smaller than a zip bomb's member

# The largest ratio of the members' size to the archive's: images are already compressed (Omniglot's tar
# shrinks 8-fold, mostly padding), and a bomb expands a thousandfold.
EXPANSION = 100
EXPANSION_FLOOR = 1024**3  # bytes to which any archive may expand
CHUNK = 1024**2  # bytes
COMPRESSED: Mapping[bytes, Callable[[Path], io.BufferedIOBase]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
FOREIGN = {
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\x1f\x9d": "compressed by compress (.Z)",
}

# What the standard library raises for damaged archives, and for forged ones: NotImplementedError for a zip's
# compression method that it lacks, ValueError and OverflowError for sizes beyond 64 bits, RecursionError for
# a thousand headers before a file.
DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    ValueError,
    OverflowError,
    RecursionError,
)


@dataclass(frozen=True)
class Members:
    """The files of an archive or of an unpacked folder: their names, and a function that reads one.

    Several threads may call `read` at once.
    """

    path: Path
    names: tuple[str, ...]
    read: Callable[[str], bytes]


@contextmanager
def open_members(path: Path, *, member_bytes: int | None = None) -> Iterator[Members]:
    """Open a zip, a tar (plain, gzip, bzip2, xz), or a folder, whose name is the first part of member names.

    A compressed tar is expanded once into an unnamed temporary file, since reading a member requires
    decompressing everything before it.

    Args:
        path: the archive or the folder.
        member_bytes: the largest allowed member; None: the limit for images.

    Raises:
        DataError: the file is not such an archive, is cut off, or has unsafe names, links, devices or
            implausible sizes.
    """
    member_bytes = MEMBER_BYTES if member_bytes is None else member_bytes
    if path.is_dir():
        inside = (file.relative_to(path.parent) for file in path.rglob("*") if file.is_file())
        yield Members(path, tuple(name.as_posix() for name in inside), _folder_reader(path))
        return
    start = _start(path)
    compressed = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), None)
    if compressed:
        with tempfile.TemporaryFile(buffering=0) as expanded:  # unbuffered, so closing it cannot fail
            _expand(path, compressed, expanded)
            yield _tar_members(path, expanded, member_bytes)
    elif start[257:262] == b"ustar" or path.suffix == ".tar":  # very old tars have no magic number
        with path.open("rb") as file:
            yield _tar_members(path, file, member_bytes)
    else:
        try:
            archive = zipfile.ZipFile(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        except DAMAGE as error:
            what = "a zip that is cut off" if start.startswith(b"PK") else "neither a zip nor a tar"
            raise DataError(f"{path} is {what}", hint=DOWNLOAD_AGAIN) from error
        with archive:
            yield _zip_members(path, archive, member_bytes)


def open_regular(path: Path, hint: str = CHECK_FROM) -> BinaryIO:
    """Open a file for reading.

    Args:
        path: the file.
        hint: the hint of every error.

    Raises:
        DataError: it cannot be read, or is a pipe or a device, from which reading may never end.
    """
    try:
        file = io.BufferedReader(io.FileIO(path, opener=_open_without_waiting))
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}", hint=hint) from error
    except OSError as error:
        raise _unreadable(path, error, hint) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DataError(f"{path} is a named pipe or a device, not a file or a folder", hint=hint)
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; without O_NONBLOCK, opening a named pipe waits until another process opens it too."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such pipes


def read_regular(path: Path, hint: str = CHECK_FROM) -> bytes:
    """Return the bytes of a file. Raises DataError if it cannot be read or is larger than any image."""
    with open_regular(path, hint) as file:
        size = os.fstat(file.fileno()).st_size
        if size > FILE_BYTES:
            fact = f"{path} has {size:,} bytes, more than the limit of {FILE_BYTES:,}"
            raise DataError(fact, hint=hint)
        try:
            return file.read(size)  # allocates that many bytes before it reads
        except OSError as error:
            raise _unreadable(path, error, hint) from error


def check_source(path: Path) -> None:
    """Raise DataError unless `path` is a folder, or a file that can be read."""
    with suppress(OSError):
        if path.is_dir():
            return
    open_regular(path).close()


def _unreadable(path: Path, error: OSError, hint: str = CHECK_FROM) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror or error}", hint=hint)


def html_page(start: bytes) -> str | None:
    """Return "an HTML page (its title)" if a file starts like one, for example a login or quota page."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<?xml", b"<!--")):
        return None
    title = re.search(rb"<title[^>]*>(.*?)</title>", start, re.IGNORECASE | re.DOTALL)
    words = " ".join(title[1].decode(errors="replace").split())[:60] if title else ""
    return f"an HTML page ({words})" if words else "an HTML page"


def _start(path: Path) -> bytes:
    """The first bytes. Raises DataError if the file cannot be read or has another known format."""
    with open_regular(path) as file:
        try:
            start = file.read(4096)
        except OSError as error:
            raise _unreadable(path, error) from error
    if page := html_page(start):
        raise DataError(f"{path} is {page}, not an archive", hint=DOWNLOAD_AGAIN)
    for magic, what in FOREIGN.items():
        if start.startswith(magic):
            raise DataError(
                f"{path} is {what}, which is not supported", hint="unpack it and use --from FOLDER"
            )
    return start


@contextmanager
def _damage_as_data_error(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:  # a forged size may be larger than any memory
        fact = f"{path} {what}, or there is not enough memory to read it"
        raise DataError(fact, hint=f"end other programs, or {DOWNLOAD_AGAIN}") from error
    except (*DAMAGE, OSError) as error:  # gzip and bz2 raise OSError for damage too
        raise DataError(f"{path} {what}: {error}", hint=DOWNLOAD_AGAIN) from error


def _folder_reader(path: Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        return read_regular(path.parent / name)

    return read


def _zip_members(path: Path, archive: zipfile.ZipFile, member_bytes: int) -> Members:
    files = {_safe_name(m.filename, path): m for m in archive.infolist() if m.filename and not m.is_dir()}
    for name, member in files.items():
        if member.flag_bits & 0x1:  # bit 0 of the zip format's general purpose flags: encrypted
            raise DataError(f"{path} contains the encrypted file {name!r}", hint=DISTRUST)
        if stat.S_ISLNK(member.external_attr >> 16):  # the Unix mode in a zip
            raise _not_a_file(path, name)
    _refuse_bomb(path, {name: member.file_size for name, member in files.items()}, member_bytes)
    one_at_a_time = threading.Lock()  # zipfile protects its reads, but not its count of open members

    def read(name: str) -> bytes:
        with _damage_as_data_error(path, f"is damaged at {name}"):
            with one_at_a_time:
                file = open_member(archive, files[name])
            try:
                return rest_of_member(file, files[name])
            finally:
                with one_at_a_time:
                    file.close()

    return Members(path, tuple(files), read)


def _tar_members(path: Path, file: IO[bytes], member_bytes: int) -> Members:
    """The members of `file`, an uncompressed tar."""
    with (
        _damage_as_data_error(path, "is not a tar or is cut off"),
        tarfile.open(fileobj=file, mode="r:") as archive,
    ):
        length = os.fstat(file.fileno()).st_size
        members = []
        for member in archive:
            # Before tarfile seeks there; a negative size would lead it in circles.
            if not 0 <= member.size <= length - member.offset_data:
                raise DataError(f"{path} is cut off at {member.name!a:.80}", hint=DOWNLOAD_AGAIN)
            if not member.isdir():
                members.append(member)
    places: dict[str, tuple[int, int]] = {}
    for member in members:
        name = _safe_name(member.name, path)
        if not member.isreg() or member.issparse():
            raise _not_a_file(path, name)
        places[name] = member.offset_data, member.size
    _refuse_bomb(path, {name: size for name, (_, size) in places.items()}, member_bytes)

    def read(name: str) -> bytes:
        begin, size = places[name]
        with _damage_as_data_error(path, f"cannot be read at {name}"):
            data = read_at(file, size, begin)
        if len(data) < size:
            raise DataError(f"{path} is cut off at {name}", hint=DOWNLOAD_AGAIN)
        return data

    return Members(path, tuple(places), read)


def _expand(path: Path, opener: Callable[[Path], io.BufferedIOBase], target: IO[bytes]) -> None:
    """Decompress a file. Raises DataError for damage, a bomb, or a full disk."""
    most, size = _largest_expansion(path), 0
    with _damage_as_data_error(path, "is damaged or cut off"), opener(path) as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            if size > most:
                raise _bomb(path, most)
            _write(target, chunk, path)
    target.seek(0)


def _write(target: IO[bytes], chunk: bytes, path: Path) -> None:
    unwritten = memoryview(chunk)
    try:
        while unwritten:
            unwritten = unwritten[target.write(unwritten) :]
    except OSError as error:
        message = f"cannot expand {path} in {tempfile.gettempdir()}: {error.strerror or error}"
        hint = "free space there, set TMPDIR to a folder with more space, or unpack it and use --from FOLDER"
        raise DataError(message, hint=hint) from error


def _safe_name(name: str, path: Path) -> str:
    """The member's name without a leading ./, which tar often writes."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise DataError(f"{path} contains a file with the unsafe name {name!r}", hint=DISTRUST)
    return posix.as_posix()


def _not_a_file(path: Path, name: str) -> DataError:
    return DataError(f"{path} contains {name!r}, which is a link or a device, not a file", hint=DISTRUST)


def _refuse_bomb(path: Path, sizes: Mapping[str, int], member_bytes: int) -> None:
    for name, size in sizes.items():
        if size > member_bytes:
            message = (
                f"{path} is refused: {name!r} has {size:,} bytes, more than the limit of {member_bytes:,}"
            )
            raise DataError(message, hint=DISTRUST)
    if sum(sizes.values()) > _largest_expansion(path):
        raise _bomb(path, _largest_expansion(path))


def _largest_expansion(path: Path) -> int:
    return max(EXPANSION * path.stat().st_size, EXPANSION_FLOOR)


def _bomb(path: Path, most: int) -> DataError:
    message = f"{path} is refused: it expands to more than {most:,} bytes (decompression bomb?)"
    return DataError(message, hint=DISTRUST)
