"""The partial file of a download and where it came from, kept until the next fetch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamlctl.core.files import read_object, write_json


@dataclass(frozen=True)
class Part:
    """The first bytes of a file at `path`, and a .json with its URL, version tag and full length."""

    path: Path

    @property
    def size(self) -> int:
        """Bytes so far."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    @property
    def total(self) -> int | None:
        """Bytes of the complete file according to its server, or None."""
        total = self._facts().get("total")
        return total if isinstance(total, int) else None

    def is_whole(self, expected: int | None) -> bool:
        """Whether no byte is missing, for example after an interrupt before the checksum."""
        return self.size > 0 and self.size == (self.total if expected is None else expected)

    def validator(self, url: str) -> str | None:
        """The version tag of the file, or None if the part came from another URL."""
        facts = self._facts()
        validator = facts.get("validator") if facts.get("url") == url else None
        return validator if isinstance(validator, str) else None

    def begin(self, size: int, url: str, validator: str | None, total: int | None) -> None:
        """Record where the rest comes from.

        Args:
            size: the byte at which the download starts; 0 drops the part.
            url: the URL, without a password.
            validator: the version tag of the file, or None.
            total: bytes of the complete file, or None.
        """
        if size == 0:
            self.drop()
        write_json(self._sidecar, {"url": url, "validator": validator, "total": total})

    def append(self, chunks: Iterable[bytes], most: int, on_progress: Callable[[int], None]) -> bool:
        """Append chunks up to a size of `most` bytes and report the size after each -> whether all fit.

        Undo all of it if the disk is full.

        Args:
            chunks: the bytes to append.
            most: the largest size of the part, in bytes.
            on_progress: receives the size in bytes after each chunk.
        """
        before = size = self.size
        try:
            with self.path.open("ab") as file:
                for chunk in chunks:
                    if size + len(chunk) > most:
                        return False
                    size += file.write(chunk)
                    on_progress(size)
                return True
        except OSError:
            if before:
                os.truncate(self.path, before)
            else:
                self.drop()
            raise

    def drop(self) -> None:
        """Delete the part and its .json."""
        self.path.unlink(missing_ok=True)
        self._sidecar.unlink(missing_ok=True)

    def finish(self, target: Path) -> None:
        """Move the verified file to `target`."""
        with self.path.open("r+b") as file:  # Windows does not sync a file that is open for reading
            os.fsync(file.fileno())
        self.path.replace(target)
        self._sidecar.unlink(missing_ok=True)

    @property
    def _sidecar(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def _facts(self) -> dict[str, Any]:
        return read_object(self._sidecar)
