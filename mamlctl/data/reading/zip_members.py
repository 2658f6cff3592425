"""Members of zip archives, read without expanding more than the zip declares."""

from __future__ import annotations

import bz2
import zipfile
from functools import partial
from typing import IO, Any, cast

# Bytes of a member that are read at once. zipfile decompresses as much as is requested, also beyond the size
# that the zip declares.
CHUNK = 64 * 1024
# zipfile cannot limit what LZMA expands, only what it feeds it: at least 4 KiB, which become up to 30 MiB.
CHUNK_LZMA = 4096


class _LimitedBzip2:
    """A decompressor for zipfile that stops after the declared size: 4 KiB of bzip2 may become 4 GiB."""

    def __init__(self, size: int) -> None:
        self._inner = bz2.BZ2Decompressor()
        self._left = size + 1  # with one more byte, a wrong size is noticed

    @property
    def eof(self) -> bool:
        return self._inner.eof or not self._left

    def decompress(self, data: bytes) -> bytes:
        expanded = self._inner.decompress(data, self._left)
        self._left -= len(expanded)
        return expanded


def open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> IO[bytes]:
    """Open a member for reading."""
    file = archive.open(member)
    if member.compress_type == zipfile.ZIP_BZIP2:
        cast(Any, file)._decompressor = _LimitedBzip2(member.file_size)
    return file


def rest_of_member(file: IO[bytes], member: zipfile.ZipInfo) -> bytes:
    """The rest of a member that `open_member` has opened, at most as many bytes as the zip declares."""
    chunk = CHUNK_LZMA if member.compress_type == zipfile.ZIP_LZMA else CHUNK
    return b"".join(iter(partial(file.read, chunk), b""))
