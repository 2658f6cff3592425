"""What servers and networks answer to a request for a file, in a few words each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mamlctl.core.errors import SettingsError

if TYPE_CHECKING:
    from requests import Response


@dataclass(frozen=True)
class Patience:
    """How long a mirror is asked before the next one is."""

    tries: int = 4  # without a new byte: a dropped connection is usual, a fourth one in a row is not
    pause_s: float = 1.0  # before the second try; doubled before each later one
    longest_pause_s: float = 60.0  # a server that asks for a longer one is left
    timeout_s: float = 30.0  # without a single byte


PATIENCE = Patience()


class MirrorUnusable(Exception):
    """Why a mirror will not do, in a few words."""


class Dropped(Exception):
    """Why a try failed that the same mirror may well mend, and how long it asks us to wait."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


def check_mirrors(mirrors: Sequence[str]) -> None:
    """Raises SettingsError for mirrors that are no web addresses."""
    hint = "give the http(s) address of a folder with the archives; for files on this machine use --from"
    wrong = [(f"--mirror {mirror} is not a web address", hint) for mirror in mirrors if not _is_web(mirror)]
    if wrong:
        raise SettingsError(wrong)


def _is_web(address: str) -> bool:
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def without_password(url: str) -> str:
    """The address without a password."""
    host = urlsplit(url).netloc
    return url.replace(host, host.rpartition("@")[2], 1)


def extent(answer: Response, requested: int) -> tuple[int, int | None]:
    """Where in the file the answer begins (-1: nowhere), and how long the file is, if it tells."""
    status = answer.status_code
    if status == 206:
        content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if content_range is None:
            return -1, None
        return int(content_range[1]), None if content_range[2] == "*" else int(content_range[2])
    if status == 200:  # also from a server that refuses ranges
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    if status == 416 and requested:  # the file ends before: no part of this one
        return -1, None
    if status in (408, 425, 429) or status >= 500:
        pause = _retry_after(answer)
        asks = f" and asks to wait {pause:.0f} s" if pause else ""
        raise Dropped(f"answers {status}{asks}", pause)
    raise MirrorUnusable(f"answers {status}")


def _retry_after(answer: Response) -> float:
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    with suppress(InvalidHeader):
        return float(Retry().parse_retry_after(answer.headers.get("Retry-After", "0")))
    return 0.0


def validator_of(answer: Response) -> str | None:
    """What tells one version of the file from another; a weak tag does not tell bytes apart."""
    tag = answer.headers.get("ETag", "W/")
    validator: str | None = answer.headers.get("Last-Modified") if tag.startswith("W/") else tag
    return validator


@contextmanager
def network_failures_as_reasons(patience: Patience) -> Iterator[None]:
    """Everything that network and server can do to a try."""
    from requests import exceptions
    from urllib3.exceptions import HTTPError, IncompleteRead, NameResolutionError, ReadTimeoutError

    try:
        yield
    except (exceptions.Timeout, ReadTimeoutError) as error:
        raise Dropped(f"sent nothing for {patience.timeout_s:.3g} s") from error
    except (exceptions.RequestException, HTTPError) as error:
        *_, inner = _causes(error)
        reason = f"cannot be read: {str(inner).split(': ')[-1].splitlines()[0] or type(inner).__name__}"
        final = (exceptions.SSLError, exceptions.InvalidURL, exceptions.TooManyRedirects)
        if isinstance(error, final) or any(isinstance(c, NameResolutionError) for c in _causes(error)):
            raise MirrorUnusable(reason) from error
        if isinstance(inner, IncompleteRead):
            reason = f"broke off {inner.expected or 0:,} bytes before the end"
        raise Dropped(reason) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it wraps: the outer ones repeat the address and name Python objects."""
    inner: object = error
    while isinstance(inner, BaseException):
        yield inner
        wrapped = (part for part in inner.args if isinstance(part, BaseException))
        inner = getattr(inner, "reason", None) or next(wrapped, None)
