"""Downloads that bear what networks, servers and disks do: mirrors in turn, resumed after a cut, verified."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from mamlctl import __version__
from mamlctl.core.errors import DataError
from mamlctl.core.events import Notice, OnEvent, Progress
from mamlctl.core.formatting import amount
from mamlctl.data.fetching.locks import locked
from mamlctl.data.fetching.partial_files import Part
from mamlctl.data.fetching.responses import (
    PATIENCE,
    Dropped,
    MirrorUnusable,
    Patience,
    extent,
    network_failures_as_reasons,
    validator_of,
    without_password,
)
from mamlctl.data.reading.archives import html_page

if TYPE_CHECKING:
    from requests import Response, Session

DOWNLOADS = "downloads"  # the folder below the data root that holds what is under way
CHUNK = 64 * 1024
BEGINNING = 512  # enough to tell a page from an archive
EVENT_EVERY_S = 0.1  # more often no display draws
DOES_NOT_FIT = "does not go on with what an earlier try left"
SPEED_OVER_S = 5.0  # shorter jumps about, longer hides a stall


@dataclass(frozen=True)
class Archive:
    """One upstream archive."""

    file: str
    urls: tuple[str, ...]  # every mirror, the best first
    md5: str
    bytes: int | None = None  # None where upstream does not tell


@dataclass(frozen=True)
class _Job:
    """One archive to get."""

    source: Archive
    part: Part
    session: Session
    on_event: OnEvent
    patience: Patience


@contextmanager
def downloaded(
    sources: Sequence[Archive],
    folder: Path,
    *,
    mirrors: Sequence[str] = (),
    hint: str,
    on_event: OnEvent,
    patience: Patience = PATIENCE,
) -> Iterator[list[Path]]:
    """The verified archives in `folder`, which are deleted when the block ends well.

    A block that fails leaves them for the next fetch. One process at a time downloads an archive.

    `mirrors` are addresses of folders that are asked first; `hint` is for where no mirror has an archive.
    Raises DataError with what each mirror answered, or for a full disk.
    """
    with ExitStack() as stack:
        for source in sources:
            stack.enter_context(locked(folder / f"{source.file}.lock", source.file, on_event))
        paths = [_download(source, folder, mirrors, hint, on_event, patience) for source in sources]
        yield paths
        for path in paths:
            path.unlink(missing_ok=True)


def _download(
    source: Archive, folder: Path, mirrors: Sequence[str], hint: str, on_event: OnEvent, patience: Patience
) -> Path:
    from requests import Session

    target = folder / source.file
    with _disk_failures_as_data_errors(folder):
        if target.is_file() and _md5(target) == source.md5:
            return target  # of a fetch that failed later
        with Session() as session:
            job = _Job(source, Part(folder / f"{source.file}.part"), session, on_event, patience)
            try:
                _from_any(
                    job, [*(f"{m.rstrip('/')}/{quote(source.file)}" for m in mirrors), *source.urls], hint
                )
            except (KeyboardInterrupt, SystemExit):
                if job.part.size:
                    kept = amount(job.part.size, 0, "B")
                    on_event(Notice(f"{kept} of {source.file} are kept: the same command goes on from there"))
                raise
        job.part.finish(target)
    return target


@contextmanager
def _disk_failures_as_data_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # the network's failures have become other types by now
        message = f"cannot write {folder}: {error.strerror or error}"
        hint = "make room or choose another --data-root; what was there before is untouched"
        raise DataError(message, hint=hint) from error


def _from_any(job: _Job, urls: Sequence[str], hint: str) -> None:
    """Complete the part from the first mirror that has the file."""
    reasons: list[str] = []
    for url in dict.fromkeys(urls):
        if reasons:
            job.on_event(Notice(f"{reasons[-1]}; trying {without_password(url)}"))
        try:
            _from_one(job, url)
            return
        except MirrorUnusable as refusal:
            reasons.append(f"{without_password(url)} {refusal}")
    raise DataError(f"cannot download {job.source.file}: {'; '.join(reasons)}", hint=hint)


def _from_one(job: _Job, url: str) -> None:
    """Try one mirror again and again, each time from where the last try ended.

    Not by urllib3's Retry: it repeats only what fails before the first byte of the body, without a notice and
    the first time at once; and it waits for as long as a server asks, where we take the next mirror.
    """
    patience, failures, furthest = job.patience, 0, job.part.size
    while True:
        try:
            _try(job, url)
            return
        except Dropped as dropped:
            if job.part.size > furthest:
                failures, furthest = 0, job.part.size
            failures += 1
            pause = max(dropped.pause_s, patience.pause_s * 2 ** (failures - 1))
            if failures >= patience.tries or dropped.pause_s > patience.longest_pause_s:
                raise MirrorUnusable(str(dropped)) from dropped
            job.on_event(Notice(f"{without_password(url)} {dropped}; trying again in {pause:.3g} s"))
            time.sleep(pause)


def _try(job: _Job, url: str) -> None:
    """Ask once for what is missing, and verify the whole.

    Raises Dropped, MirrorUnusable or the disk's OSError.
    """
    source, part = job.source, job.part
    begin = start = part.size
    if not part.is_whole(source.bytes):
        with network_failures_as_reasons(job.patience), _answer(job, url, start) as answer:
            begin = _receive(job, url, answer, start)
    if _md5(part.path) != source.md5:
        part.drop()
        if begin:  # the rest may be of another version than the beginning: the next try is of one piece
            raise Dropped(DOES_NOT_FIT)
        raise MirrorUnusable(f"does not have the md5 {source.md5}")


@contextmanager
def _answer(job: _Job, url: str, start: int) -> Iterator[Response]:
    # Not compressed on the way, since the part holds the bytes as they came.
    headers = {"Accept-Encoding": "identity", "User-Agent": f"mamlctl/{__version__}"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator := job.part.validator(without_password(url)):
            headers["If-Range"] = validator  # a file that has changed comes whole
    with job.session.get(url, headers=headers, stream=True, timeout=job.patience.timeout_s) as answer:
        yield answer


def _receive(job: _Job, url: str, answer: Response, start: int) -> int:
    """Bring the part to its end -> where in the file the answer began, 0 if the server does not go on."""
    source, part = job.source, job.part
    begin, total = extent(answer, start)
    other = begin > 0 and None not in (total, part.total) and total != part.total
    if begin not in (0, start) or other:
        part.drop()
        raise Dropped(DOES_NOT_FIT)
    first = answer.raw.read(BEGINNING, decode_content=False)
    # What has arrived, without waiting for more: a connection that stalls takes none of it along.
    chunks = iter(lambda: answer.raw.read1(CHUNK, decode_content=False), b"")
    # Before the length and the checksum, which would only say that they differ; and before the first byte is
    # written, so that a page for people costs nothing of what an earlier try left.
    if page := html_page(first):
        raise MirrorUnusable(f"is {page}, not an archive")
    if source.bytes is not None and total not in (None, source.bytes):
        raise MirrorUnusable(f"has {total:,} bytes instead of {source.bytes:,}")
    whole = total or source.bytes
    _refuse_full(part.path.parent, source.file, (whole or 0) - begin)
    part.begin(begin, without_password(url), validator_of(answer), whole)
    meter = _Meter(f"download {source.file}", begin, whole or 0, job.on_event)
    part.append(itertools.chain([first], chunks), meter.at)
    meter.at(part.size, last=True)
    if whole is not None and part.size < whole:
        raise Dropped(f"sent {part.size:,} of {whole:,} bytes")
    return begin


def _refuse_full(folder: Path, file: str, missing: int) -> None:
    """Raises DataError for a disk that is too small, before the first byte is written to it."""
    free = shutil.disk_usage(folder).free
    if missing > free:
        message = f"{file} needs {amount(missing, 0, 'B')}, but {folder} has {amount(free, 0, 'B')} left"
        raise DataError(message, hint="make room or choose another --data-root")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        # As upstream tells it; no safeguard against anyone who forges an archive.
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


class _Meter:
    """Bytes and speed as events."""

    def __init__(self, what: str, begin: int, total: int, on_event: OnEvent) -> None:
        self._what, self._total, self._on_event = what, total, on_event
        self._seen = deque([(time.monotonic(), begin)])

    def at(self, done: int, *, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self._seen[-1][0] < EVENT_EVERY_S:
            return
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] > SPEED_OVER_S:
            self._seen.popleft()
        then, before = self._seen[0]
        speed = (done - before) / (now - then) if now > then else None
        self._on_event(Progress(self._what, done, self._total, "B", speed))
