"""Answers from servers and failures of the network, each with a short reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from threading import Thread
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urljoin, urlsplit

from mamlctl.core.errors import SettingsError

if TYPE_CHECKING:
    from requests import Response, Session

T = TypeVar("T")
BYTES = "[0-9]{1,15}"  # in a header
THIS_MACHINE = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class Patience:
    """How long to try a mirror before the next one."""

    tries: int = 4  # without a new byte; dropped connections are common, but not four in a row
    pause_s: float = 1.0  # before the second try; doubled before each later one
    longest_pause_s: float = 60.0  # a server that requests a longer one is given up
    timeout_s: float = 30.0  # without a single byte
    least_rate: float = 1024.0  # bytes per second in every `timeout_s`; at less, CIFAR-100 takes two days

    @property
    def least_bytes(self) -> float:
        """The bytes that must arrive in `timeout_s`, and that a try must bring to count as progress."""
        return self.least_rate * self.timeout_s


PATIENCE = Patience()


class MirrorUnusable(Exception):
    """The reason why a mirror cannot be used."""


class Dropped(Exception):
    """The reason why one try failed, and how long the server requests to wait before the next."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


def check_mirrors(mirrors: Sequence[str]) -> None:
    """Raise SettingsError for mirrors that are not web addresses."""
    hint = "give the http(s) URL of a folder with the archives, or use --from for files on this machine"
    wrong = [(f"--mirror {mirror} is not a web address", hint) for mirror in mirrors if not _is_web(mirror)]
    if wrong:
        raise SettingsError(wrong)


def _is_web(address: str) -> bool:
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def https_session() -> Session:
    """Return a session in which a redirect to anything but https raises MirrorUnusable.

    Redirects within this machine are allowed.
    """
    from requests import Session  # imported here, since it takes as long as importing the command line

    class HttpsSession(Session):
        def get_redirect_target(self, resp: Response) -> str | None:
            try:
                target: str | None = super().get_redirect_target(resp)
                refusal = None if target is None else _refusal(resp.url, urljoin(resp.url, target))
            except ValueError:  # for example, half an IPv6 address
                refusal = "redirects to an invalid address"
            if refusal:
                resp.close()
                raise MirrorUnusable(refusal)
            return target

    return HttpsSession()


def _refusal(url: str, target: str) -> str | None:
    """Why a redirect is not followed, or None. Raises ValueError for an invalid address."""
    is_local = {urlsplit(url).hostname, urlsplit(target).hostname} <= THIS_MACHINE
    if urlsplit(target).scheme == "https" or (is_local and _is_web(target)):
        return None
    return f"redirects to {without_password(target)}, which is not https"


def in_time(call: Callable[[], T], patience: Patience) -> T:
    """Wait for a call that uses the network, but not longer than twice the timeout.

    The timeout of a socket begins again with every byte, also with each byte of a header.

    Raises:
        MirrorUnusable: it takes longer; the call continues in a thread that does not keep the process alive.
    """
    from urllib3.exceptions import HTTPError

    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except (OSError, ValueError, HTTPError, HTTPException, MirrorUnusable) as error:
            outcome.set_exception(error)
        finally:
            outcome.cancel()  # only has an effect if a bug ends the thread

    Thread(target=run, daemon=True).start()
    try:
        return outcome.result(2 * patience.timeout_s)
    except TimeoutError as error:
        raise MirrorUnusable(f"sent no data for {2 * patience.timeout_s:.3g} s") from error


def without_password(url: str) -> str:
    """Return the URL without user name and password."""
    host = urlsplit(url).netloc
    return url.replace(host, host.rpartition("@")[2], 1)


def extent(answer: Response, requested: int) -> tuple[int, int | None]:
    """Return the position of the answer's first byte in the file, and the length of the file.

    Args:
        answer: the answer of the server.
        requested: the first byte that was requested.

    Returns:
        The position in bytes (-1 for an invalid range), and the length in bytes (None if unknown).

    Raises:
        Dropped: the server is busy or has failed; it may succeed later.
        MirrorUnusable: the server does not have the file.
    """
    status = answer.status_code
    if status == 206:
        content_range = re.fullmatch(
            rf"bytes ({BYTES})-{BYTES}/({BYTES}|\*)", answer.headers.get("Content-Range", "")
        )
        if content_range is None:
            return -1, None
        return int(content_range[1]), None if content_range[2] == "*" else int(content_range[2])
    if status == 200:  # also from a server that does not support ranges
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if re.fullmatch(BYTES, length) else None
    if status == 416 and requested:  # the file is shorter than the part, which must come from another file
        return -1, None
    if status in (408, 425, 429) or status >= 500:
        pause = _retry_after(answer)
        wait = f" and requests a pause of {pause:.0f} s" if pause else ""
        raise Dropped(f"returned status {status}{wait}", pause)
    raise MirrorUnusable(f"returned status {status}")


def _retry_after(answer: Response) -> float:
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    with suppress(InvalidHeader, ValueError, OverflowError):  # the last two for numbers that are too large
        return float(Retry().parse_retry_after(answer.headers.get("Retry-After", "0")))
    return 0.0


def validator_of(answer: Response) -> str | None:
    """Return the version tag of the file, or its date, since equal weak tags do not imply equal bytes."""
    tag = answer.headers.get("ETag", "W/")
    validator: str | None = answer.headers.get("Last-Modified") if tag.startswith("W/") else tag
    return validator


@contextmanager
def network_failures_as_reasons(patience: Patience) -> Iterator[None]:
    """Raise every failure of network and server as Dropped or MirrorUnusable."""
    from requests import exceptions
    from urllib3.exceptions import HTTPError, IncompleteRead, NameResolutionError, ReadTimeoutError

    try:
        yield
    except (exceptions.Timeout, ReadTimeoutError) as error:
        raise Dropped(f"sent nothing for {patience.timeout_s:.3g} s") from error
    except (exceptions.RequestException, HTTPError) as error:
        *_, inner = _causes(error)
        # Without what repeats the address or means nothing to a user, such as [Errno 111].
        words = re.sub(r"\[Errno -?\d+\] ", "", str(inner).split(": ")[-1]).splitlines() or [
            type(inner).__name__
        ]
        reason = f"failed: {words[0]}"
        final = (exceptions.SSLError, exceptions.InvalidURL, exceptions.TooManyRedirects)
        if isinstance(error, final) or any(isinstance(c, NameResolutionError) for c in _causes(error)):
            raise MirrorUnusable(reason) from error
        if isinstance(inner, IncompleteRead):
            reason = f"closed the connection {inner.expected or 0:,} bytes before the end"
        raise Dropped(reason) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and the errors that it wraps; outer ones repeat the URL and name Python objects."""
    inner: object = error
    while isinstance(inner, BaseException):
        yield inner
        wrapped = (part for part in inner.args if isinstance(part, BaseException))
        inner = getattr(inner, "reason", None) or next(wrapped, None)
