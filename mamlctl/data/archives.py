"""Upstream archives: where they lie, how they are downloaded and verified, and how they are read safely."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mamlctl.errors import DataError
from mamlctl.records import OnEvent, Progress

RETRIES = 2  # a dropped connection is usual, a third one in a row is not
TIMEOUT_SECONDS = 30  # without a single byte
MEMBER_BYTES = 16 * 1024**2  # no image of any data set is as large; a zip bomb's member is


@dataclass(frozen=True)
class Source:
    """One upstream archive."""

    file: str
    url: str
    md5: str
    licence: str


def omniglot_sources() -> tuple[Source, ...]:
    """The two zips as torchvision names them, so that its corrections reach us with its releases."""
    from torchvision.datasets import Omniglot  # here, since it imports torch

    return tuple(
        Source(f"{name}.zip", f"{Omniglot.download_url_prefix}/{name}.zip", md5, "MIT")
        for name, md5 in Omniglot.zips_md5.items()
    )


class _Meter:
    """The progress bar that pooch expects, as events."""

    def __init__(self, what: str, on_event: OnEvent) -> None:
        self.total, self._what, self._on_event, self._done = 0, what, on_event, 0

    def update(self, step: int) -> None:
        self._done = min(self._done + step, self.total) if self.total else self._done + step
        self._on_event(Progress(self._what, self._done, max(self.total, self._done)))

    def reset(self) -> None:
        self._done = 0

    def close(self) -> None:
        """Nothing is held open."""


def download(source: Source, folder: Path, *, hint: str, on_event: OnEvent) -> Path:
    """Download into `folder` and verify; on failure nothing is left there, and DataError says why."""
    import pooch
    from requests import Response

    pooch.get_logger().setLevel("ERROR")  # it would write to stderr, which is the display's
    answers: list[Response] = []
    fetcher = pooch.HTTPDownloader(
        progressbar=_Meter(f"download {source.file}", on_event),
        timeout=TIMEOUT_SECONDS,
        chunk_size=64 * 1024,
        hooks={"response": lambda answer, **_: answers.append(answer)},
    )

    def fetch_archive(url: str, target: str, caller: Any) -> None:
        try:
            fetcher(url, target, caller)
        finally:
            while answers:
                answers.pop().close()  # pooch leaves the connection of a failed answer open
        _refuse_html(Path(target), url, hint)  # before the checksum, which would only say that it differs

    store = pooch.create(
        folder,
        base_url="",
        registry={source.file: f"md5:{source.md5}"},
        urls={source.file: source.url},
        retry_if_failed=RETRIES,
    )
    with _failures_told(source, folder, hint):
        return Path(store.fetch(source.file, downloader=fetch_archive))


@contextmanager
def _failures_told(source: Source, folder: Path, hint: str) -> Iterator[None]:
    """Everything that network, server or disk can do to a download, as a DataError."""
    from requests import exceptions

    try:
        yield
    except exceptions.HTTPError as error:
        status = error.response.status_code if error.response is not None else "with an error"
        raise DataError(f"{source.url} answers {status}", hint=hint) from error
    except exceptions.Timeout as error:
        raise DataError(f"{source.url} did not answer in {TIMEOUT_SECONDS} s", hint=hint) from error
    except exceptions.RequestException as error:
        raise DataError(f"cannot download {source.url}: {_reason(error)}", hint=hint) from error
    except ValueError as error:  # pooch's word for a checksum that differs
        raise DataError(f"{source.url} does not have the md5 {source.md5}", hint=hint) from error
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}", hint="make room") from error


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: the outer ones repeat the address and name Python objects."""
    while True:
        inner = getattr(error, "reason", None) or next(
            (part for part in error.args if isinstance(part, BaseException)), None
        )
        if not isinstance(inner, BaseException):
            return str(error).split(": ")[-1].splitlines()[0] or type(error).__name__
        error = inner


def _refuse_html(path: Path, told: object, hint: str) -> None:
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        raise DataError(f"{told} is an HTML page, not a zip", hint=hint)


@dataclass(frozen=True)
class Members:
    """The files of a zip or of an unpacked folder: their names, and a way to read one."""

    path: Path
    names: tuple[str, ...]
    read: Callable[[str], bytes]


@contextmanager
def open_members(path: Path, *, hint: str) -> Iterator[Members]:
    """Read a zip, without ever unpacking it, or a folder, whose own name starts the members' names.

    Raises DataError for what is not a zip, is cut off, or has names or sizes that no honest archive has.
    """
    if path.is_dir():
        inside = (file.relative_to(path.parent) for file in path.rglob("*") if file.is_file())
        yield Members(path, tuple(name.as_posix() for name in inside), _folder_reader(path, hint))
        return
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}", hint=hint) from error
    except (zipfile.BadZipFile, OSError) as error:
        if path.is_file():
            _refuse_html(path, path, hint)
        raise DataError(f"{path} is not a zip or is cut off: {error}", hint=hint) from error
    with archive:
        files = [member for member in archive.infolist() if not member.is_dir()]
        for member in files:
            _refuse_unsafe(member, path, hint)
        yield Members(path, tuple(member.filename for member in files), _zip_reader(archive, path, hint))


def _folder_reader(path: Path, hint: str) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        try:
            return (path.parent / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path.parent / name}: {error.strerror}", hint=hint) from error

    return read


def _zip_reader(archive: zipfile.ZipFile, path: Path, hint: str) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
            raise DataError(f"{path} is damaged at {name}: {error}", hint=hint) from error

    return read


def _refuse_unsafe(member: zipfile.ZipInfo, path: Path, hint: str) -> None:
    name = member.filename
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise DataError(f"{path} holds a file with the unsafe name {name!r}", hint=hint)
    if member.flag_bits & 0x1:  # bit 0 of the zip format's general purpose flags: encrypted
        raise DataError(f"{path} holds the encrypted file {name!r}", hint=hint)
    if member.file_size > MEMBER_BYTES:
        message = f"{path} holds {name!r} of {member.file_size:,} bytes; at most {MEMBER_BYTES:,} are sane"
        raise DataError(message, hint=hint)
