"""Downloads from a local server that fails in every way that real ones do."""

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.server_cases import HTML, Page, Twist, download, serving
from helpers.shared import SHARED, ignore

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import Notice, Progress
from mamlctl.data.fetching.downloads import Archive, downloaded
from mamlctl.data.fetching.partial_files import Part
from mamlctl.data.fetching.responses import Patience, check_mirrors, extent
from mamlctl.data.reading.packs import load_pack
from mamlctl.data.sets import omniglot
from mamlctl.data.sets.registry import DATA_SETS, fetch_or_open, find_data_set

QUICK = Patience(tries=3, pause_s=0.001, longest_pause_s=1.0, timeout_s=10.0)
HINT = "mamlctl fetch it --from FOLDER"
PATH = "/images_evaluation.zip"
MIRROR = "/mirror/images_evaluation.zip"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def archive():
    """The real archive if it is available, otherwise random bytes."""
    path = SHARED / "omniglot" / "images_evaluation.zip"
    return path.read_bytes() if path.is_file() else np.random.default_rng(0).bytes(500_000)


@pytest.fixture
def get(server, archive, tmp_path):
    """Download the archive from `paths` of the server, and return its bytes."""

    def call(*paths, patience=QUICK, on_event=ignore, **options):
        source = server.source(archive, *(paths or (PATH,)))
        path = download(source, tmp_path / "root", hint=HINT, patience=patience, on_event=on_event, **options)
        assert left(tmp_path) == [path.name]
        return path.read_bytes()

    return call


def left(tmp_path):
    """The files in the root."""
    return sorted(path.name for path in (tmp_path / "root").rglob("*"))


def statuses(server):
    return [request.status for request in server.requests]


def notices(events):
    return [event.text for event in events if isinstance(event, Notice)]


def refused(get, *paths, match, **options):
    """The download raises a DataError with one line and a hint."""
    with pytest.raises(DataError, match=match) as raised:
        get(*paths, **options)
    assert raised.value.exit_code == 3
    assert "\n" not in raised.value.message + raised.value.hint
    assert raised.value.hint
    return raised.value


def test_complete_download_reports_bytes_and_speed(server, get, archive, capfd):
    server.pages[PATH] = Page(archive)
    events = []
    assert get(on_event=events.append) == archive
    last = events[-1]
    assert last == Progress(
        "download images_evaluation.zip", len(archive), len(archive), "B", last.per_second
    )
    assert last.per_second > 0
    assert capfd.readouterr() == ("", "")


def test_verified_file_is_not_downloaded_again(server, get, archive, tmp_path):
    server.pages[PATH] = Page(archive)
    assert get() == get() == archive
    assert len(server.requests) == 1
    (tmp_path / "root" / PATH[1:]).write_bytes(archive[:-1])
    assert get() == archive
    assert len(server.requests) == 2


def test_interrupted_download_resumes_with_the_missing_bytes(server, get, archive):
    half = len(archive) // 2
    server.pages[PATH] = Page(archive, twists=[Twist(cut_after=half)])
    events = []
    assert get(on_event=events.append) == archive
    assert statuses(server) == [200, 206]
    assert [request.sent for request in server.requests] == [half, len(archive) - half]
    assert server.requests[1].headers["If-Range"] == '"first"'
    assert "closed the connection" in notices(events)[0]
    done = [event.done for event in events if isinstance(event, Progress)]
    assert done == sorted(done)


def test_next_fetch_resumes_a_failed_one(server, get, archive, tmp_path):
    third = len(archive) // 3
    server.pages[PATH] = Page(archive, twists=[Twist(cut_after=third), *[Twist(503)] * 2])
    refused(get, match=r"cannot download .*: http.* returned status 503")
    assert left(tmp_path) == ["images_evaluation.zip.part", "images_evaluation.zip.part.json"]
    server.requests.clear()
    assert get() == archive
    assert [request.sent for request in server.requests] == [len(archive) - third]


def test_download_resumes_at_another_mirror(server, get, archive):
    half = len(archive) // 2
    server.pages[PATH] = Page(archive, twists=[Twist(cut_after=half), *[Twist(500)] * 2])
    server.pages[MIRROR] = Page(archive, etag='"another server\'s"')
    assert get(PATH, MIRROR) == archive
    assert (server.requests[-1].path, server.requests[-1].sent) == (MIRROR, len(archive) - half)
    assert "If-Range" not in server.requests[-1].headers


def test_retries_are_not_limited_while_each_brings_new_bytes(server, get, archive):
    server.pages[PATH] = Page(archive, twists=[Twist(cut_after=len(archive) // 10)] * 8)
    assert get() == archive
    assert len(server.requests) == 9


def test_answer_without_a_length(server, get, archive):
    server.pages[PATH] = Page(archive, twists=[Twist(chunked=True, cut_after=1000)])
    assert get() == archive
    assert statuses(server) == [200, 206]
    server.pages[MIRROR] = Page(archive, twists=[Twist(chunked=True)])
    assert get(MIRROR) == archive


def test_server_without_ranges_sends_the_file_again(server, get, archive):
    server.pages[PATH] = Page(archive, ranges=False, twists=[Twist(cut_after=1000)])
    assert get() == archive
    assert statuses(server) == [200, 200]
    assert server.requests[1].headers["Range"] == "bytes=1000-"


def test_refused_range_restarts_the_download(server, get, archive):
    server.pages[PATH] = Page(archive, twists=[Twist(cut_after=1000), Twist(416)])
    assert get() == archive
    assert statuses(server) == [200, 416, 200]
    assert "Range" not in server.requests[2].headers


def test_file_that_has_changed_is_downloaded_from_the_start(server, get, archive, tmp_path):
    page = server.pages[PATH] = Page(
        bytes(len(archive)), etag='"old"', twists=[Twist(cut_after=1000), *[Twist(500)] * 2]
    )
    refused(get, match="returned status 500")
    page.data, page.etag = archive, '"new"'
    assert get() == archive
    assert (server.requests[-1].status, server.requests[-1].headers["If-Range"]) == (200, '"old"')


def test_part_of_another_file_fails_the_checksum_and_is_dropped(server, get, archive):
    other = bytes(len(archive))
    server.pages[PATH] = Page(other, twists=[Twist(cut_after=1000), *[Twist(500)] * 2])
    server.pages[MIRROR] = Page(archive)
    assert get(PATH, MIRROR) == archive
    assert statuses(server)[-2:] == [206, 200]


def test_interrupt_between_the_last_byte_and_the_checksum(server, get, archive, tmp_path):
    server.pages[PATH] = Page(archive, twists=[Twist(cut_after=1000), *[Twist(500)] * 2])
    refused(get, match="returned status 500")
    (tmp_path / "root" / "images_evaluation.zip.part").write_bytes(archive)
    server.requests.clear()
    assert get() == archive
    assert server.requests == []


def test_slow_server_is_not_given_up(server, get, archive):
    server.pages[PATH] = Page(archive, twists=[Twist(pieces=10, pause_s=0.06)])
    events = []
    # The download takes longer than the time without a byte after which a server is given up.
    assert get(patience=Patience(tries=1, timeout_s=0.4), on_event=events.append) == archive
    bars = [event for event in events if isinstance(event, Progress)]
    assert len(bars) >= 4
    assert bars[-1].per_second < len(archive) / 0.45


def test_stalled_server_is_given_up(server, get, archive):
    server.pages[PATH] = Page(archive, twists=[Twist(held_after=1000), Twist(held_after=0)])
    server.pages[MIRROR] = Page(archive)
    events = []
    patience = Patience(tries=2, pause_s=0.001, timeout_s=0.2)
    assert get(PATH, MIRROR, patience=patience, on_event=events.append) == archive
    assert any("sent nothing for 0.2 s; trying" in text for text in notices(events))
    # The mirror sends only the missing bytes.
    assert server.requests[-1].path == MIRROR
    assert server.requests[-1].status == 206


def test_server_below_the_least_rate_is_given_up(server, get, archive):
    server.pages[PATH] = Page(archive, twists=[Twist(cut_after=2000, pieces=2000, pause_s=0.05)])
    server.pages[MIRROR] = Page(archive)
    events = []
    patience = Patience(tries=2, pause_s=0.001, timeout_s=0.3)
    assert get(PATH, MIRROR, patience=patience, on_event=events.append) == archive
    assert any(re.search(r"sent only \d+ bytes in 0\.\d+ s; trying", text) for text in notices(events))
    assert [request.path for request in server.requests] == [PATH, MIRROR]


def test_tries_that_bring_a_few_bytes_are_limited(server, get, archive):
    server.pages[PATH] = Page(archive, twists=[Twist(cut_after=100)] * 50)
    refused(get, match="closed the connection")
    assert len(server.requests) == QUICK.tries


def test_headers_that_arrive_byte_by_byte_are_given_up(get):
    is_over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while not is_over.wait(0.02):
                    connection.send(b"x")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        mirror = f"http://127.0.0.1:{listener.getsockname()[1]}"
        patience = Patience(tries=2, pause_s=0.001, timeout_s=0.2)
        began = time.monotonic()
        refused(get, match=r"sent no data for 0\.4 s", mirrors=[mirror], patience=patience)
        assert time.monotonic() - began < 10
        is_over.set()
        thread.join()


def test_body_beyond_the_known_length_is_not_downloaded(server, archive, tmp_path):
    server.pages[PATH] = Page(archive * 3, twists=[Twist(chunked=True)])
    source = server.source(archive, PATH, bytes=len(archive))
    with pytest.raises(DataError, match=f"sends more than {len(archive):,} bytes"):
        download(source, tmp_path / "root", hint=HINT, patience=QUICK, on_event=ignore)
    assert left(tmp_path) == []


def test_archive_of_unknown_length_is_limited(server, get, archive, tmp_path, monkeypatch):
    monkeypatch.setattr("mamlctl.data.fetching.downloads.MOST_BYTES", len(archive) - 1)
    server.pages[PATH] = Page(archive, twists=[Twist(chunked=True)])
    refused(get, match=f"sends more than {len(archive) - 1:,} bytes")
    server.pages[PATH] = Page(archive)
    refused(get, match=f"has {len(archive):,} bytes, more than the limit of {len(archive) - 1:,}")
    assert left(tmp_path) == []


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "many"])
def test_impossible_length_is_ignored(server, get, archive, length):
    answer = namedtuple("answer", "status_code headers")(200, {"Content-Length": length})
    assert extent(answer, 0) == (0, None)


@pytest.mark.parametrize(
    "target", ["http://mirror.invalid/a.zip", "ftp://127.0.0.1/a.zip", "file:///etc/passwd"]
)
def test_redirect_to_anything_but_https_ends_the_mirror_at_once(server, get, archive, target):
    server.pages[PATH] = Page(archive, twists=[Twist(302, {"Location": target})] * 9)
    server.pages[MIRROR] = Page(archive)
    events = []
    assert get(PATH, MIRROR, on_event=events.append) == archive
    assert statuses(server) == [302, 200]
    assert f"redirects to {target}, which is not https; trying" in notices(events)[0]


@pytest.mark.parametrize("target", ["http://[", "//[::", "\xe9\xff"])
def test_redirect_to_an_invalid_address_ends_the_mirror_at_once(server, get, archive, target):
    server.pages[PATH] = Page(archive, twists=[Twist(302, {"Location": target})] * 9)
    server.pages[MIRROR] = Page(archive)
    events = []
    assert get(PATH, MIRROR, on_event=events.append) == archive
    assert statuses(server) == [302, 200]
    assert "redirects to an invalid address; trying" in notices(events)[0]


def test_redirect_within_this_machine_is_followed(server, get, archive):
    server.pages[PATH] = Page(archive, twists=[Twist(302, {"Location": MIRROR})])
    server.pages[MIRROR] = Page(archive)
    assert get() == archive
    assert statuses(server) == [302, 200]


def test_wrong_bytes_are_not_downloaded_twice(server, get, archive, tmp_path):
    server.pages[PATH] = Page(archive[:-1] + b"?")
    refused(get, match=rf"{PATH[1:]} does not have md5 [0-9a-f]{{32}}$")
    assert len(server.requests) == 1
    assert left(tmp_path) == []


def test_wrong_length_is_reported_before_the_first_byte(server, archive, tmp_path):
    server.pages[PATH] = Page(archive[:-7])
    source = server.source(archive, PATH, bytes=len(archive))
    with pytest.raises(DataError, match=f"has {len(archive) - 7:,} bytes instead of {len(archive):,}"):
        download(source, tmp_path / "root", hint=HINT, patience=QUICK, on_event=ignore)
    assert left(tmp_path) == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_mirror_without_the_file_is_given_up_at_once(server, get, archive, status):
    server.pages[PATH] = Page(archive, twists=[Twist(status)])
    server.pages[MIRROR] = Page(archive)
    events = []
    assert get(PATH, MIRROR, on_event=events.append) == archive
    assert statuses(server) == [status, 200]
    assert f"returned status {status}; trying {server.address}{MIRROR}" in notices(events)[0]


def test_mirrors_of_the_user_come_first(server, get, archive):
    server.pages |= {PATH: Page(archive), MIRROR: Page(archive)}
    assert get(mirrors=[f"{server.address}/nothing/", f"{server.address}/mirror/"]) == archive
    assert [request.path for request in server.requests] == [f"/nothing{PATH}", MIRROR]


def test_quota_page_is_reported_with_its_title(server, get, archive, tmp_path):
    server.pages[PATH] = Page(HTML)
    refused(get, match=r"is an HTML page \(Quota exceeded\), not an archive")
    assert len(server.requests) == 1
    assert left(tmp_path) == []


def test_quota_page_keeps_the_partial_file(server, get, archive):
    page = server.pages[PATH] = Page(archive, twists=[Twist(cut_after=1000), *[Twist(500)] * 2])
    refused(get, match="returned status 500")
    page.data, page.ranges = HTML, False
    refused(get, match="is an HTML page")
    page.data, page.ranges = archive, True
    assert get() == archive
    assert server.requests[-1].sent == len(archive) - 1000


def test_busy_server_is_retried_after_the_requested_pause(server, get, archive, monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    server.pages[PATH] = Page(
        archive, twists=[Twist(503), Twist(429, {"Retry-After": "1"}), Twist(cut_after=100_000)]
    )
    assert get() == archive
    assert statuses(server) == [503, 429, 200, 206]
    assert pauses[:2] == [0.001, 1.0]


@pytest.mark.parametrize("pause", ["soon", "9" * 5000, "Fri, 31 Dec 9999999 23:59:59 GMT"])
def test_impossible_pause_is_ignored(server, get, archive, pause):
    server.pages[PATH] = Page(archive, twists=[Twist(503, {"Retry-After": pause})])
    assert get() == archive
    assert statuses(server) == [503, 200]


def test_server_that_requests_a_pause_of_an_hour_is_given_up(server, get, archive):
    server.pages[PATH] = Page(archive, twists=[Twist(429, {"Retry-After": "3600"})])
    server.pages[MIRROR] = Page(archive)
    assert get(PATH, MIRROR) == archive
    assert statuses(server) == [429, 200]


def test_pauses_grow(server, get, archive, monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    server.pages[PATH] = Page(archive, twists=[Twist(500)] * 9)
    refused(get, match="returned status 500", patience=Patience(tries=4))
    assert pauses == [1.0, 2.0, 4.0]


def test_every_mirror_is_named_with_its_reason(server, archive, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/a.zip"
    server.pages |= {"/wrong/a.zip": Page(b"wrong"), "/page/a.zip": Page(HTML)}
    urls = [f"http://me:secret@{server.address[7:]}/none/a.zip", closed, "http://nowhere.invalid/a.zip"]
    urls += [f"{server.address}/{name}/a.zip" for name in ("wrong", "page")]
    with pytest.raises(DataError) as raised:
        download(
            Archive("a.zip", tuple(urls), "0" * 32),
            tmp_path / "root",
            hint=HINT,
            patience=QUICK,
            on_event=ignore,
        )
    reasons = raised.value.message.removeprefix("cannot download a.zip: ").split("; ")
    assert [reason.split(" ")[0] for reason in reasons] == [url.replace("me:secret@", "") for url in urls]
    words = ["returned status 404", "refused", "failed: ", "does not have md5", "is an HTML page"]
    assert all(word in reason for word, reason in zip(words, reasons, strict=True)), reasons
    assert raised.value.hint == HINT


def test_two_processes_download_once(server, archive, tmp_path):
    server.pages[PATH] = Page(archive, twists=[Twist(held_after=1000)])
    events, got = [], []

    def get(on_event):
        source = server.source(archive, PATH)
        path = download(source, tmp_path / "root", hint=HINT, patience=QUICK, on_event=on_event)
        got.append(path.read_bytes())

    def on_event(event):
        events.append(event)
        server.released.set()  # only when the second download waits

    first = threading.Thread(target=get, args=[ignore])
    first.start()
    assert server.held.wait(10)
    get(on_event)
    first.join()
    assert got == [archive, archive]
    assert len(server.requests) == 1
    assert notices(events) == [f"waiting for process {os.getpid()}, which is preparing images_evaluation.zip"]
    assert left(tmp_path) == ["images_evaluation.zip"]


def test_full_disk_is_reported_before_the_first_byte(server, get, archive, tmp_path, monkeypatch):
    server.pages[PATH] = Page(archive)
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 4096, 4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    error = refused(get, match=r"images_evaluation.zip needs .*, but .* has only 4.0 KiB free")
    assert "free disk space" in error.hint
    assert left(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_partial_file_is_deleted_if_the_disk_fills_up(server, get, archive, tmp_path, monkeypatch):
    server.pages[PATH] = Page(archive)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "older.zip").write_bytes(b"older")
    begin = Part.begin

    def begin_on_a_full_disk(part, *facts):
        begin(part, *facts)
        part.path.symlink_to("/dev/full")

    monkeypatch.setattr(Part, "begin", begin_on_a_full_disk)
    error = refused(get, match=r"cannot write .*: No space left on device")
    assert "free disk space" in error.hint
    assert left(tmp_path) == ["older.zip"]


def test_partial_file_of_an_earlier_try_is_kept_if_the_disk_fills_up(tmp_path):
    part = Part(tmp_path / "a.zip.part")
    part.path.write_bytes(b"earlier")

    def chunks():
        yield b"more"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        part.append(chunks(), 100, ignore)
    assert part.path.read_bytes() == b"earlier"


def test_archives_are_deleted_only_if_the_block_succeeds(server, archive, tmp_path):
    server.pages[PATH] = Page(archive)
    options = {"hint": HINT, "patience": QUICK, "on_event": ignore}
    sources = [server.source(archive, PATH)]
    with pytest.raises(DataError), downloaded(sources, tmp_path / "root", **options):
        raise DataError("cannot pack")
    assert left(tmp_path) == ["images_evaluation.zip"]
    with downloaded(sources, tmp_path / "root", **options) as paths:
        assert [path.read_bytes() for path in paths] == [archive]
    assert not (tmp_path / "root").exists()
    assert len(server.requests) == 1


@pytest.mark.parametrize("mirror", ["ftp://x/y", "folder", "http://", "http://[x", ""])
def test_mirror_that_is_not_a_web_address_is_refused(mirror):
    with pytest.raises(SettingsError, match="is not a web address") as raised:
        check_mirrors(["https://fine.example/data", mirror])
    assert "--from" in raised.value.hint


INTERRUPTED = """
import sys
from mamlctl.data.fetching import downloads
from dataclasses import replace
from mamlctl.data.sets import registry
source = downloads.Archive("images_evaluation.zip", (sys.argv.pop(1),), sys.argv.pop(1))
registry.DATA_SETS["omniglot"] = replace(
    registry.DATA_SETS["omniglot"],
    archives=lambda: (source,),
    prepare=lambda root, paths, on_event: sys.exit(f"got {paths[0].stat().st_size}"),
)
from mamlctl.__main__ import run
run()
"""


@pytest.mark.process
def test_ctrl_c_keeps_the_partial_file_and_the_same_command_resumes(server, archive, tmp_path):
    third = len(archive) // 3
    server.pages[PATH] = Page(archive, twists=[Twist(held_after=third)])
    source = server.source(archive, PATH)
    words = [sys.executable, "-c", INTERRUPTED, source.urls[0], source.md5]
    words += ["fetch", "omniglot", "--data-root", str(tmp_path / "root")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert server.held.wait(60)
        part = tmp_path / "root" / "downloads" / "images_evaluation.zip.part"
        while not part.exists() or part.stat().st_size == 0:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "of images_evaluation.zip: rerun the same command to resume" in err
    kept = part.stat().st_size
    assert 0 < kept <= third
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert f"got {len(archive)}" in done.stderr
    assert (server.requests[1].status, server.requests[1].sent) == (206, len(archive) - kept)


def serve_omniglot(monkeypatch, *archives):
    data_set = replace(DATA_SETS["omniglot"], archives=lambda: archives)
    monkeypatch.setitem(DATA_SETS, "omniglot", data_set)


@pytest.mark.realdata
def test_real_omniglot_from_a_server(server, omniglot_zips, omniglot_root, tmp_path, monkeypatch):
    archives = ("images_background.zip", "images_evaluation.zip")
    archives = {name: (omniglot_zips / name).read_bytes() for name in archives}
    sources = []
    for name, data in archives.items():
        server.pages[f"/{name}"] = Page(data, twists=[Twist(cut_after=len(data) // 2)])
        sources.append(server.source(data, f"/missing/{name}", f"/{name}", bytes=len(data)))
    serve_omniglot(monkeypatch, *sources)
    monkeypatch.setattr("time.sleep", ignore)
    originals = load_pack(omniglot_root / "omniglot" / "originals-105.npy", "omniglot")

    def read_verified(paths, *words):
        """The images of the fixture, which were read from the same bytes: reading them takes seconds."""
        downloaded = [path for folder in paths for path in (folder, *folder.glob("*")) if path.is_file()]
        assert {path.name: path.read_bytes() for path in downloaded} == archives
        return originals

    monkeypatch.setattr(omniglot, "_read_verified", read_verified)
    packed = fetch_or_open(find_data_set("omniglot"), tmp_path, on_event=ignore)
    assert (len(packed.names), len(packed.images_MCHW)) == (1623, 32460)
    assert statuses(server) == [404, 200, 206] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["omniglot"]


@pytest.mark.realdata
def test_forced_fetch_that_fails_keeps_the_old_pack(server, omniglot_root, tmp_path, monkeypatch):
    shutil.copytree(omniglot_root / "omniglot", tmp_path / "omniglot")
    before = {path.name: path.read_bytes() for path in (tmp_path / "omniglot").iterdir()}
    originals = load_pack(tmp_path / "omniglot" / "originals-105.npy", "omniglot")
    # Reuse the images of the fixture, since reading the same archives takes seconds.
    monkeypatch.setattr(omniglot, "_read_verified", lambda *words: originals)

    def full(*words, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match="No space left on device"):
        fetch_or_open(
            find_data_set("omniglot"), tmp_path, source=[SHARED / "omniglot"], force=True, on_event=ignore
        )
    serve_omniglot(monkeypatch, server.source(b"", "/gone.zip"))
    with pytest.raises(DataError, match="returned status 404"):
        fetch_or_open(find_data_set("omniglot"), tmp_path, force=True, on_event=ignore)
    assert {path.name: path.read_bytes() for path in (tmp_path / "omniglot").iterdir()} == before
