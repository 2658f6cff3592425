"""`fetch`: data sets downloaded or taken over, verified and packed; listed; verified again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import Notice, OnEvent, Progress
from mamlctl.data.fetching.responses import check_mirrors
from mamlctl.data.reading.packs import data_root as folder_of
from mamlctl.data.reading.packs import load_pack, packs_of, verified_at, verify_pack
from mamlctl.data.sets.registry import DATA_SETS, DataSet, fetch_or_open, find_data_set


def fetch_all(
    names: Sequence[str],
    *,
    source: Sequence[Path] | None,
    mirrors: Sequence[str] = (),
    data_root: str | None,
    force: bool,
    offline: bool,
    on_event: OnEvent,
) -> list[dict[str, Any]]:
    """Fetch each data set -> its name, numbers of classes and images, digest and folder.

    Args:
        source: archives or folders to use instead of a download.
        mirrors: addresses to try first.
        force: fetch again what is there.

    Raises:
        SettingsError: a name is unknown, or an option has no effect.
        DataError: data are missing or damaged.
    """
    _check(names, source, mirrors, offline)
    root = folder_of(data_root)
    fetched = []
    for name in dict.fromkeys(names):
        packed = fetch_or_open(
            find_data_set(name),
            root,
            source=source,
            mirrors=mirrors,
            offline=offline,
            force=force,
            on_event=on_event,
        )
        counts = {"classes": len(packed.names), "images": len(packed.images_MCHW)}
        fetched.append({"name": name, **counts, "digest": packed.digest, "folder": str(root)})
    return fetched


def _check(
    names: Sequence[str], source: Sequence[Path] | None, mirrors: Sequence[str], offline: bool
) -> None:
    if not names:
        hint = "mamlctl fetch --list shows them"
        raise SettingsError([("fetch needs the name of a data set", hint)])
    sets = [find_data_set(name) for name in names]
    if source and len(sets) > 1:
        raise SettingsError([(f"--from is given for {len(sets)} data sets", "fetch them one at a time")])
    for switch, value in (("--from", source), ("--offline", offline)):
        if value and mirrors:
            fact = f"--mirror has no effect with {switch}, which downloads nothing"
            raise SettingsError([(fact, "leave out one of them")])
    check_mirrors(mirrors)
    for path in source or ():
        if not path.exists():
            raise DataError(f"there is no {path}", hint="give --from a folder or archives that exist")


def list_all(names: Sequence[str], *, data_root: str | None) -> list[dict[str, Any]]:
    """Every data set, or those of `names`: what it is, where it comes from, whether it is here and whole."""
    root = folder_of(data_root)
    sets = [find_data_set(name) for name in names] or list(DATA_SETS.values())
    return [_listed_set(data_set, root) for data_set in dict.fromkeys(sets)]


def _listed_set(data_set: DataSet, root: Path) -> dict[str, Any]:
    packs = packs_of(data_set.home(root))
    # The oldest counts; none where a pack was changed since.
    times = [time for path in packs if (time := verified_at(path)) is not None]
    verified = min(times) if packs and len(times) == len(packs) else None
    damage = next(filter(None, (_damage(path, data_set.name) for path in packs)), None)
    return {
        "name": data_set.name,
        "what": data_set.summary,
        "download_bytes": data_set.download_bytes,
        "licence": data_set.licence,
        "origin": data_set.origin,
        "here": data_set.is_here(root),
        "verified": verified.isoformat(timespec="seconds") if verified and not damage else None,
        "damage": damage,
        "folder": str(root),
    }


def _damage(path: Path, name: str, *, whole: bool = False) -> str | None:
    """What is wrong with a pack; without `whole`, large ones are looked at by their shape alone."""
    try:
        if whole:
            verify_pack(path, name)
        else:
            load_pack(path, name)
    except DataError as error:
        return error.message
    return None


def verify_all(names: Sequence[str], *, data_root: str | None, on_event: OnEvent) -> list[dict[str, Any]]:
    """Recompute the digest of every pack of the data sets, by default of all that are here.

    Raises SettingsError for an unknown name, DataError for a data set that is not here.
    """
    root = folder_of(data_root)
    for name in names:
        if not find_data_set(name).is_here(root):
            raise DataError(f"{name} is not in {root}", hint=f"mamlctl fetch {name}")
    packs = {name: packs_of(find_data_set(name).home(root)) for name in dict.fromkeys(names or DATA_SETS)}
    sizes = {path: path.stat().st_size for paths in packs.values() for path in paths if path.is_file()}
    total, done = sum(sizes.values()), 0
    if not total and not names:
        on_event(Notice(f"nothing is in {root}"))
    checked = []
    for name, paths in packs.items():
        damages = []
        for path in paths:
            damages.append(_damage(path, name, whole=True))
            done += sizes.get(path, 0)
            on_event(Progress(f"verify {name}", done, total, "B"))
        if paths or names:
            damage = "; ".join(filter(None, damages)) or None
            checked.append({"name": name, "packs": len(paths), "damage": damage, "folder": str(root)})
    return checked


def refuse_damage(checked: Sequence[dict[str, Any]]) -> None:
    """Raises DataError that names what `verify_all` found damaged."""
    if damaged := [entry for entry in checked if entry["damage"]]:
        names = " ".join(entry["name"] for entry in damaged)
        message = "; ".join(entry["damage"] for entry in damaged)
        raise DataError(message, hint=f"mamlctl fetch {names} --force")
