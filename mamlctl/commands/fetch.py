"""`fetch`: data sets downloaded or taken over, verified, and packed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamlctl.data.images import data_root as folder_of
from mamlctl.data.sets import find
from mamlctl.errors import DataError, SettingsError
from mamlctl.records import OnEvent


def fetch_all(
    names: Sequence[str],
    *,
    source: Sequence[Path] | None,
    data_root: str | None,
    force: bool,
    offline: bool,
    on_event: OnEvent,
) -> list[dict[str, Any]]:
    """Fetch each data set -> what is there now.

    Raises SettingsError for an unknown name, DataError for data that is absent or bad.
    """
    sets = [find(name) for name in names]
    if source and len(sets) > 1:
        raise SettingsError([(f"--from is given for {len(sets)} data sets", "fetch them one at a time")])
    for path in source or ():
        if not path.exists():
            raise DataError(f"there is no {path}", hint="give --from a folder or archives that exist")
    root = folder_of(data_root)
    fetched = []
    for data_set in sets:
        packed = data_set.fetch(root, source=source, offline=offline, force=force, on_event=on_event)
        fetched.append(
            {
                "name": data_set.name,
                "classes": len(packed.names),
                "images": len(packed.images_MCHW),
                "digest": packed.digest,
                "folder": str(root),
            }
        )
    return fetched
