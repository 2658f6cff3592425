"""Tars are read by several threads at once, and refused if they contain anything suspicious."""

import errno
import gzip
import io
import os
import random
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.shared import ignore

from mamlctl.core.errors import DataError
from mamlctl.data.reading import archives
from mamlctl.data.reading.archives import open_members
from mamlctl.data.sets.registry import DATA_SETS, fetch_or_open
from mamlctl.experiments.fetch import fetch_all

FILES = {f"train/n{c:04d}/{i:05d}.jpg": bytes([c, i]) * (c * i + 1) for c in range(20) for i in range(50)}

READ_WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from mamlctl.core.errors import DataError
from mamlctl.data.reading.archives import open_members
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    with open_members(Path(sys.argv[1])) as members:
        members.read("0.png")
except DataError as error:
    print(error, file=sys.stderr)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    sys.exit(error.exit_code)
"""


def entry(name, data=b"", **facts):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for fact, value in facts.items():
        setattr(member, fact, value)
    return member, io.BytesIO(data)


def write_tar(path, *extra, kind="", files=FILES, **options):
    """Write a tar with a folder entry, `files`, and `extra` members."""
    with tarfile.open(path, f"w:{kind}", **options) as archive:
        archive.addfile(*entry("train", type=tarfile.DIRTYPE))
        for name, data in files.items():
            archive.addfile(*entry(name, data))
        for member in extra:
            archive.addfile(*member)
    return path


def write_zip(path, files=FILES):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def refused(path, match):
    with pytest.raises(DataError, match=match) as raised, open_members(path) as members:
        for name in members.names:
            members.read(name)
    assert "\n" not in raised.value.message
    return raised.value


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz"])
def test_every_kind_of_tar_gives_the_same_files(tmp_path, kind):
    # Recognised by its first bytes, not by its name.
    path = write_tar(tmp_path / "images.bin", kind=kind)
    with open_members(path) as members:
        assert members.names == tuple(FILES)
        assert {name: members.read(name) for name in members.names} == FILES
    assert [file.name for file in tmp_path.iterdir()] == ["images.bin"], "nothing is unpacked"


@pytest.mark.parametrize(("make", "name"), [(write_tar, "a.tar"), (write_zip, "a.zip")])
def test_threads_read_at_once(tmp_path, make, name):
    names = list(FILES) * 5
    random.Random(0).shuffle(names)
    with open_members(make(tmp_path / name)) as members, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(members.read, names)) == [FILES[name] for name in names]


def test_names_lose_their_leading_dot_and_the_last_of_two_wins(tmp_path):
    path = write_tar(tmp_path / "a.tar", entry("./a.png", b"old"), entry("./a.png", b"new"), files={})
    with open_members(path) as members:
        assert members.names == ("a.png",)
        assert members.read("a.png") == b"new"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_in_every_format(tmp_path, format):
    name = "/".join(["x" * 60, "y" * 60, "z" * 60 + ".png"])
    with open_members(write_tar(tmp_path / "a.tar", files={name: b"1"}, format=format)) as members:
        assert members.names == (name,)


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "C:\\evil", "..\\evil"])
def test_unsafe_names_are_refused(tmp_path, name):
    refused(write_tar(tmp_path / "a.tar", entry(name, b"evil")), "contains a file with the unsafe name")
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", entry("train/x", type=kind, linkname="/etc/passwd"))
    refused(path, "contains 'train/x', which is a link or a device, not a file")


def test_a_link_in_a_zip_is_refused(tmp_path):
    link = zipfile.ZipInfo("train/x")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    refused(tmp_path / "a.zip", "which is a link")


def test_a_member_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MEMBER_BYTES", 100)
    path = write_tar(tmp_path / "a.tar", entry("train/x", bytes(101)))
    refused(path, "is refused: '.*' has 10. bytes, more than the limit of 100")


@pytest.mark.parametrize("kind", ["zip", "gz"])
def test_bomb_is_not_expanded(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(archives, "EXPANSION_FLOOR", 10_000)
    path = tmp_path / "a"
    files = {f"{number}": bytes(10**6) for number in range(5)}
    if kind == "zip":
        write_zip(path, files)
    else:
        write_tar(path, kind="gz", files=files)
    refused(path, r"is refused: it expands to more than [0-9,]+ bytes \(decompression bomb\?\)")


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz"])
def test_a_tar_that_is_cut_off_is_refused(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", entry("last", bytes(range(256)) * 100), kind=kind)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(bytes(range(250, 256))) - 9000 if not kind else len(data) // 2])
    refused(path, "cut off")


def test_damaged_compression_is_reported(tmp_path):
    path = write_tar(tmp_path / "a.tgz", kind="gz")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20] = bytes(20)
    path.write_bytes(data)
    refused(path, "is damaged or cut off")


def test_a_compressed_file_that_is_not_a_tar_is_refused(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"filename,label\n" * 100))
    refused(tmp_path / "a.csv.gz", "is not a tar or is cut off")


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"Rar!\x1a\x07\x01\x00", "a RAR archive"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ],
)
def test_other_archives_must_be_unpacked(tmp_path, start, what):
    (tmp_path / "a").write_bytes(start + bytes(1000))
    assert refused(tmp_path / "a", what).hint == "unpack it and use --from FOLDER"


@pytest.mark.parametrize("data", [b"", b"\x00" * 2000, b"hello " * 100, np.random.default_rng(0).bytes(5000)])
def test_a_file_that_is_not_an_archive_is_refused(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    refused(tmp_path / "a", "is neither a zip nor a tar")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_reported_when_a_tar_is_expanded(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tgz", kind="gz")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda buffering: io.FileIO("/dev/full", "r+"))
    assert "TMPDIR" in refused(path, "cannot expand .*: No space left on device").hint


def test_large_tar_is_read_in_any_order(tmp_path):
    files = {f"n{number // 600:08d}/{number:08d}.jpg": number.to_bytes(4, "big") for number in range(20_000)}
    path = write_tar(tmp_path / "large.tar", files=files)
    with open_members(path) as members:
        assert len(members.names) == 20_000
        # Backwards, so that the result cannot depend on the order.
        assert all(members.read(name) == files[name] for name in reversed(members.names))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [2**87, 2**63, 2**40, -512, -(2**87)])
def test_an_impossible_size_in_a_tar_is_refused(tmp_path, size, kind):
    member, _ = entry("huge.png", size=size, type=kind)
    last = entry("last.png", size=0)[0].tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + last + bytes(1024))
    assert refused(tmp_path / "a.tar", "is cut off at 'huge.png'|is not a tar or is cut off").exit_code == 3


def test_thousands_of_headers_before_one_file_are_refused(tmp_path):
    header = entry("././@LongLink", size=1, type=tarfile.GNUTYPE_LONGNAME)[0].tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes((header + b"x".ljust(512, b"\0")) * 5000)
    refused(tmp_path / "a.tar", "is not a tar or is cut off")


@pytest.mark.process
@pytest.mark.parametrize(
    ("method", "size_mib", "limit_mib"),
    [(zipfile.ZIP_DEFLATED, 300, 20), (zipfile.ZIP_BZIP2, 300, 20), (zipfile.ZIP_LZMA, 100, 60)],
)
def test_a_zip_that_expands_far_beyond_its_declared_size_is_refused(tmp_path, method, size_mib, limit_mib):
    size = size_mib * 1024**2
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("0.png", "w") as member:
        for _ in range(size_mib):
            member.write(bytes(1024**2))
    data = path.read_bytes()
    assert data.count(size.to_bytes(4, "little")) == 2  # in the member's header and in the directory
    path.write_bytes(data.replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little")))
    words = [sys.executable, "-c", READ_WITH_LITTLE_MEMORY, str(path)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 3, result.stderr
    assert "is damaged at 0.png: Bad CRC-32" in result.stderr
    assert int(result.stdout) < limit_mib * 1024**2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "train.tar")
    for path in (tmp_path / "train.tar", Path("/dev/zero"), Path("/dev/stdin")):
        refused(path, f"{path} is a named pipe or a device, not a file or a folder")
    for name in ("omniglot", "cifar-fs", "mini-imagenet"):
        options = {"data_root": str(tmp_path / "root"), "force": False, "offline": False, "on_event": ignore}
        with pytest.raises(DataError, match="is a named pipe or a device"):
            fetch_all([name], source=[tmp_path / "train.tar"], **options)
    with pytest.raises(DataError, match="is a named pipe or a device"):
        fetch_all(["mini-imagenet"], source=[tmp_path], **options)


def test_a_folder_in_place_of_a_file_is_refused_and_closed(tmp_path):
    opened = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(DataError, match="Is a directory"):
        archives.open_regular(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_a_small_file_takes_little_memory(tmp_path):
    (tmp_path / "0.png").write_bytes(b"small")
    tracemalloc.start()
    try:
        assert archives.read_regular(tmp_path / "0.png") == b"small"
        assert tracemalloc.get_traced_memory()[1] < 1024**2
    finally:
        tracemalloc.stop()


def test_a_lack_of_memory_is_not_called_damage(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    with open_members(write_zip(tmp_path / "a.zip")) as members:
        monkeypatch.setattr(zipfile.ZipFile, "open", fail)
        with pytest.raises(DataError, match="not enough memory to read") as raised:
            members.read(members.names[0])
    assert raised.value.hint.startswith("end other programs")


def test_unreadable_archive_is_not_called_another_file(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip")

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile, "ZipFile", fail)
    assert refused(path, "cannot read .*a.zip: Input/output error").hint == archives.CHECK_FROM


def test_unreadable_folder_of_a_source_is_named(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(DataError, match=f"cannot read {tmp_path}: Permission denied") as raised:
        fetch_or_open(DATA_SETS["tiered-imagenet"], tmp_path / "root", source=[tmp_path], on_event=ignore)
    assert raised.value.exit_code == 3
