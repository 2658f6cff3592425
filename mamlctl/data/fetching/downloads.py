"""Downloads that survive network, server and disk failures: resumed, verified, with mirrors."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
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
    https_session,
    in_time,
    network_failures_as_reasons,
    validator_of,
    without_password,
)
from mamlctl.data.reading.archives import html_page

if TYPE_CHECKING:
    from requests import Response, Session

DOWNLOADS = "downloads"  # the folder in the data root for unfinished downloads
CHUNK = 64 * 1024  # bytes
MOST_BYTES = 2 * 1024**3  # of an archive; the largest, CIFAR-100, has 161 MiB
BEGINNING = 512  # bytes; enough to distinguish a web page from an archive
EVENT_EVERY_S = 0.1  # displays do not draw more often
DOES_NOT_FIT = "does not match the part that an earlier try downloaded"
SPEED_OVER_S = 5.0  # a shorter window fluctuates, a longer one hides a stall


@dataclass(frozen=True)
class Archive:
    """One upstream archive."""

    file: str
    urls: tuple[str, ...]  # every mirror, the best first
    md5: str
    bytes: int | None = None  # None if upstream does not publish it


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
    """Download and verify archives; delete them after the block, or keep them for a retry if it fails.

    Only one process at a time downloads an archive; others wait.

    Args:
        sources: the archives.
        folder: where to put them.
        mirrors: URLs of folders to try before the archives' own.
        hint: the hint if no mirror has an archive.
        on_event: receives notices and progress.
        patience: how often and how long to try each mirror.

    Yields:
        The paths of the verified archives.

    Raises:
        DataError: no mirror has an archive (the message has the reason of each), or the disk is full.
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
    target = folder / source.file
    with _disk_failures_as_data_errors(folder):
        if target.is_file() and _md5(target) == source.md5:
            return target  # from a fetch that failed later
        with https_session() as session:
            job = _Job(source, Part(folder / f"{source.file}.part"), session, on_event, patience)
            try:
                _from_any(
                    job, [*(f"{m.rstrip('/')}/{quote(source.file)}" for m in mirrors), *source.urls], hint
                )
            except (KeyboardInterrupt, SystemExit):
                if job.part.size:
                    kept = amount(job.part.size, 0, "B")
                    on_event(Notice(f"kept {kept} of {source.file}: rerun the same command to resume"))
                raise
        job.part.finish(target)
    return target


@contextmanager
def _disk_failures_as_data_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # network failures were converted to other types before
        message = f"cannot write {folder}: {error.strerror or error}"
        hint = "free disk space or choose another --data-root; existing data are unchanged"
        raise DataError(message, hint=hint) from error


def _from_any(job: _Job, urls: Sequence[str], hint: str) -> None:
    """Complete the partial file from the first mirror that has the archive."""
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
    """Retry one mirror, each time from the byte where the last try ended.

    urllib3's Retry is not used: it retries only failures before the first byte of the body, sends no notice,
    does not wait before its first retry, and waits as long as a server requests instead of trying the next
    mirror.
    """
    patience, failures, furthest = job.patience, 0, job.part.size
    while True:
        try:
            _try(job, url)
            return
        except Dropped as dropped:
            if job.part.size >= furthest + patience.least_bytes:
                failures, furthest = 0, job.part.size
            failures += 1
            pause = max(dropped.pause_s, patience.pause_s * 2 ** (failures - 1))
            if failures >= patience.tries or dropped.pause_s > patience.longest_pause_s:
                raise MirrorUnusable(str(dropped)) from dropped
            job.on_event(Notice(f"{without_password(url)} {dropped}; retrying in {pause:.3g} s"))
            time.sleep(pause)


def _try(job: _Job, url: str) -> None:
    """Request the missing bytes once, and verify the complete file.

    Raises:
        Dropped: the same mirror may succeed on the next try.
        MirrorUnusable: the mirror does not have the archive.
        OSError: the disk cannot be written.
    """
    source, part = job.source, job.part
    begin = start = part.size
    if not part.is_whole(source.bytes):
        with network_failures_as_reasons(job.patience), _answer(job, url, start) as answer:
            begin = _receive(job, url, answer, start)
    if _md5(part.path) != source.md5:
        part.drop()
        if begin:  # the two parts may come from different versions: the next try starts at the first byte
            raise Dropped(DOES_NOT_FIT)
        raise MirrorUnusable(f"does not have md5 {source.md5}")


@contextmanager
def _answer(job: _Job, url: str, start: int) -> Iterator[Response]:
    # No compression in transit, since the partial file has the bytes as received.
    headers = {"Accept-Encoding": "identity", "User-Agent": f"mamlctl/{__version__}"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator := job.part.validator(without_password(url)):
            headers["If-Range"] = validator  # the server sends a changed file from the start
    get = partial(job.session.get, url, headers=headers, stream=True, timeout=job.patience.timeout_s)
    with in_time(get, job.patience) as answer:
        yield answer


def _receive(job: _Job, url: str, answer: Response, start: int) -> int:
    """Append the answer to the partial file -> its first byte in the archive, 0 without a range."""
    source, part = job.source, job.part
    begin, total = extent(answer, start)
    other = begin > 0 and None not in (total, part.total) and total != part.total
    if begin not in (0, start) or other:
        part.drop()
        raise Dropped(DOES_NOT_FIT)
    chunks = _chunks(answer, job.patience)
    first = b""
    while len(first) < BEGINNING and (chunk := next(chunks, b"")):
        first += chunk
    # A page is reported as such, not as a wrong length or checksum, and before the first byte is written, so
    # that the partial file of an earlier try is kept.
    if page := html_page(first):
        raise MirrorUnusable(f"is {page}, not an archive")
    if source.bytes is not None and total not in (None, source.bytes):
        raise MirrorUnusable(f"has {total:,} bytes instead of {source.bytes:,}")
    whole = total or source.bytes
    most = whole or MOST_BYTES
    if most > MOST_BYTES:
        raise MirrorUnusable(f"has {most:,} bytes, more than the limit of {MOST_BYTES:,}")
    _refuse_full(part.path.parent, source.file, (whole or 0) - begin)
    part.begin(begin, without_password(url), validator_of(answer), whole)
    meter = _Meter(f"download {source.file}", begin, whole or 0, job.on_event)
    if not part.append(itertools.chain([first], chunks), most, meter.at):
        part.drop()
        raise MirrorUnusable(f"sends more than {most:,} bytes")
    meter.at(part.size, last=True)
    if whole is not None and part.size < whole:
        raise Dropped(f"sent {part.size:,} of {whole:,} bytes")
    return begin


def _chunks(answer: Response, patience: Patience) -> Iterator[bytes]:
    """The body as it arrives. Raises MirrorUnusable if it arrives too slowly."""
    # read1 returns what has arrived without waiting for more, so a stalled connection loses no bytes.
    read = partial(answer.raw.read1, CHUNK, decode_content=False)
    begin, size = time.monotonic(), 0
    while chunk := in_time(read, patience):
        yield chunk
        size += len(chunk)
        elapsed_s = time.monotonic() - begin
        if elapsed_s >= patience.timeout_s:
            if size < patience.least_bytes:
                raise MirrorUnusable(f"sent only {size:,} bytes in {elapsed_s:.3g} s")
            begin, size = time.monotonic(), 0


def _refuse_full(folder: Path, file: str, missing: int) -> None:
    """Raise DataError if the disk is too small, before the first byte is written."""
    free = shutil.disk_usage(folder).free
    if missing > free:
        message = f"{file} needs {amount(missing, 0, 'B')}, but {folder} has only {amount(free, 0, 'B')} free"
        raise DataError(message, hint="free disk space or choose another --data-root")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        # The digest that upstream publishes; it does not protect against forged archives.
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


class _Meter:
    """Reports bytes and speed as events."""

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
