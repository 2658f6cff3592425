"""A local web server that misbehaves like real ones."""

import hashlib
import http.server
import re
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from mamlctl.data.fetching.downloads import Archive, downloaded

HTML = b"<!DOCTYPE html>\n<html><head><title>Quota exceeded</title></head><body>Sorry.</body></html>"


@dataclass
class Twist:
    """What goes wrong with one answer."""

    status: int = 0  # replaces the correct one
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body
    chunked: bool = False  # without Content-Length
    pieces: int = 1  # in which the body is sent
    pause_s: float = 0.0  # before each piece
    held_after: int | None = None  # bytes of the body, until `Server.released` is set


@dataclass
class Page:
    """A file on the server."""

    data: bytes
    etag: str = '"first"'
    ranges: bool = True
    twists: list[Twist] = field(default_factory=list)  # of the first answers, in order


@dataclass
class Request:
    """A request, and how many bytes of the body were sent."""

    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.pages`, with ranges and version tags."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        request = Request(self.path, dict(self.headers))
        self.server.requests.append(request)
        page = self.server.pages.get(self.path, Page(b"not here", twists=[Twist(404)]))
        twist = page.twists.pop(0) if page.twists else Twist()
        begin = self.begin_of(page)
        request.status = twist.status or (416 if begin >= len(page.data) else 206 if begin else 200)
        body = b"sorry" if request.status >= 400 else page.data[begin:]
        self.send_response(request.status)
        for name, value in twist.headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        if twist.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", page.etag)
        if request.status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{len(page.data) - 1}/{len(page.data)}")
        self.end_headers()
        first = body[: twist.cut_after][: twist.held_after]
        if twist.chunked:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(first), first))
            self.wfile.write(b"" if twist.cut_after else b"0\r\n\r\n")
            return
        size = -(-len(first) // twist.pieces) or 1
        for place in range(0, len(first), size):
            self.server.released.wait(twist.pause_s)  # not `time`, which tests replace
            request.sent += self.wfile.write(first[place : place + size])
        if twist.held_after is not None:
            self.server.held.set()
            self.server.released.wait(30)
            request.sent += self.wfile.write(body[: twist.cut_after][len(first) :])

    def begin_of(self, page):
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        changed = self.headers.get("If-Range", page.etag) != page.etag
        return int(requested[1]) if requested and page.ranges and not changed else 0

    def log_message(self, *words):
        """Print nothing."""


class Server(http.server.ThreadingHTTPServer):
    """Pages by path, the requests so far, and events that hold an answer."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.requests = {}, []
        self.held, self.released = threading.Event(), threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Print nothing when a client disconnects early, as some tests intend."""

    def source(self, data, *paths, bytes=None):
        """An archive with its addresses at `paths`."""
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        urls = tuple(self.address + path for path in paths)
        return Archive(paths[0].rpartition("/")[2], urls, md5, bytes)


class Kept(Exception):
    """Ends a block of `downloaded` so that the archives are kept."""


def download(source, folder, **options):
    """Download one archive, keep it, and return its path."""
    with suppress(Kept), downloaded([source], folder, **options) as (path,):
        raise Kept
    return path


@contextmanager
def serving():
    """A running server during the block."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
