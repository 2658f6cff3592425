"""What a download has brought so far, and from where, kept from one fetch to the next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamlctl.core.files import read_object, write_json


@dataclass(frozen=True)
class Part:
    """Bytes at `path`, and beside them a .json with their address, its version tag and the length."""

    path: Path

    @property
    def size(self) -> int:
        """How much is there."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    @property
    def total(self) -> int | None:
        """How long the whole will be, as its server told."""
        total = self._facts().get("total")
        return total if isinstance(total, int) else None

    def is_whole(self, expected: int | None) -> bool:
        """Whether nothing is missing, as after a stop between the last byte and the checksum."""
        return self.size > 0 and self.size == (self.total if expected is None else expected)

    def validator(self, url: str) -> str | None:
        """What the server at `url` calls the version that the part is of; None if it is another one's."""
        facts = self._facts()
        validator = facts.get("validator") if facts.get("url") == url else None
        return validator if isinstance(validator, str) else None

    def begin(self, size: int, url: str, validator: str | None, total: int | None) -> None:
        """Keep the first `size` bytes, and note where the rest comes from."""
        if size == 0:
            self.drop()
        write_json(self._sidecar, {"url": url, "validator": validator, "total": total})

    def append(self, chunks: Iterable[bytes], on_progress: Callable[[int], None]) -> None:
        """Write what comes, telling how much is there; a disk that fills up gets back what it gave."""
        before = size = self.size
        try:
            with self.path.open("ab") as file:
                for chunk in chunks:
                    size += file.write(chunk)
                    on_progress(size)
        except OSError:
            if before:
                os.truncate(self.path, before)
            else:
                self.drop()
            raise

    def drop(self) -> None:
        """Forget all of it."""
        self.path.unlink(missing_ok=True)
        self._sidecar.unlink(missing_ok=True)

    def finish(self, target: Path) -> None:
        """Move the verified whole into place."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        self.path.replace(target)
        self._sidecar.unlink(missing_ok=True)

    @property
    def _sidecar(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def _facts(self) -> dict[str, Any]:
        return read_object(self._sidecar)
