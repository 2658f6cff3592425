"""A web server on this machine that answers as badly as real ones do."""

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

    status: int = 0  # in place of the right one
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body
    chunked: bool = False  # its length is not told
    bits: int = 1  # that the body is sent in
    pause_s: float = 0.0  # before each of them
    held_after: int | None = None  # bytes of the body, until `Server.released` is set


@dataclass
class Page:
    """A file on the server."""

    data: bytes
    etag: str = '"first"'
    ranges: bool = True
    twists: list[Twist] = field(default_factory=list)  # of the first answers, in turn


@dataclass
class Asked:
    """A request, and how many bytes of the body were sent."""

    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.pages`, with ranges and version tags."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        asked = Asked(self.path, dict(self.headers))
        self.server.asked.append(asked)
        page = self.server.pages.get(self.path, Page(b"not here", twists=[Twist(404)]))
        twist = page.twists.pop(0) if page.twists else Twist()
        begin = self.begin_of(page)
        asked.status = twist.status or (416 if begin >= len(page.data) else 206 if begin else 200)
        body = b"sorry" if asked.status >= 400 else page.data[begin:]
        self.send_response(asked.status)
        for name, value in twist.headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        if twist.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", page.etag)
        if asked.status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{len(page.data) - 1}/{len(page.data)}")
        self.end_headers()
        first = body[: twist.cut_after][: twist.held_after]
        if twist.chunked:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(first), first))
            self.wfile.write(b"" if twist.cut_after else b"0\r\n\r\n")
            return
        size = -(-len(first) // twist.bits) or 1
        for place in range(0, len(first), size):
            self.server.released.wait(twist.pause_s)  # not time.sleep, which tests replace
            asked.sent += self.wfile.write(first[place : place + size])
        if twist.held_after is not None:
            self.server.held.set()
            self.server.released.wait(30)
            asked.sent += self.wfile.write(body[: twist.cut_after][len(first) :])

    def begin_of(self, page):
        told = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        changed = self.headers.get("If-Range", page.etag) != page.etag
        return int(told[1]) if told and page.ranges and not changed else 0

    def log_message(self, *words):
        """Tests have no log."""


class Server(http.server.ThreadingHTTPServer):
    """Pages by path, what was asked for, and whether an answer is being held."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.asked = {}, []
        self.held, self.released = threading.Event(), threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that leaves early is what some tests are about."""

    def source(self, data, *paths, bytes=None):
        """An archive that is to be at `paths`."""
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        urls = tuple(self.address + path for path in paths)
        return Archive(paths[0].rpartition("/")[2], urls, md5, bytes)


class Kept(Exception):
    """Ends a block so that the archives stay."""


def download(source, folder, **options):
    """Download one archive and keep it -> its path."""
    with suppress(Kept), downloaded([source], folder, **options) as (path,):
        raise Kept
    return path


@contextmanager
def serving():
    """A server for the block."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
