"""Downloading, importing, listing and verifying data sets (`fetch`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import Notice, OnEvent, Progress
from mamlctl.core.results import FetchedSet, ListedSet, VerifiedSet
from mamlctl.data import samples
from mamlctl.data.fetching.responses import check_mirrors
from mamlctl.data.reading.archives import check_source
from mamlctl.data.reading.packs import data_root as folder_of
from mamlctl.data.reading.packs import load_pack, packs_of, verified_at, verify_pack
from mamlctl.data.sets.facts import DataSet
from mamlctl.data.sets.registry import DATA_SETS, fetch_or_open, find_data_set


def fetch_all(
    names: Sequence[str],
    *,
    source: Sequence[Path] | None,
    mirrors: Sequence[str] = (),
    data_root: str | None,
    force: bool,
    offline: bool,
    on_event: OnEvent,
) -> list[FetchedSet]:
    """Download or import data sets and pack them, and draw sample images.

    Args:
        names: the data sets, and "samples".
        source: archives or folders to use instead of a download.
        mirrors: URLs to try first.
        data_root: the folder of prepared data sets; None for the default.
        force: prepare data sets again that are already present.
        offline: never download.
        on_event: receives progress and notices.

    Raises:
        SettingsError: a name is unknown, or an option has no effect.
        DataError: data are missing or damaged.
    """
    _check(names, source, mirrors, offline)
    root = folder_of(data_root)
    fetched = []
    for name in dict.fromkeys(names):
        if name == samples.NAME:
            fetched.append(samples.write_samples(force, on_event))
            continue
        packed = fetch_or_open(
            find_data_set(name),
            root,
            source=source,
            mirrors=mirrors,
            offline=offline,
            force=force,
            on_event=on_event,
        )
        counts = len(packed.names), len(packed.images_MCHW)
        fetched.append(FetchedSet(name, *counts, packed.digest, str(root)))
    return fetched


def _check(
    names: Sequence[str], source: Sequence[Path] | None, mirrors: Sequence[str], offline: bool
) -> None:
    if not names:
        hint = "list them with mamlctl fetch --list"
        raise SettingsError([("fetch needs the name of a data set", hint)])
    sets = [find_data_set(name) for name in names if name != samples.NAME]
    if not sets and (source or mirrors):
        option = "--from" if source else "--mirror"
        raise SettingsError([(f"{option} has no effect with samples, which are drawn", "leave it out")])
    if source and len(sets) > 1:
        raise SettingsError([(f"--from is given for {len(sets)} data sets", "fetch them one at a time")])
    for switch, value in (("--from", source), ("--offline", offline)):
        if value and mirrors:
            fact = f"--mirror has no effect with {switch}, which downloads nothing"
            raise SettingsError([(fact, "leave out one of them")])
    check_mirrors(mirrors)
    for path in source or ():
        check_source(path)


def list_all(names: Sequence[str], *, data_root: str | None) -> list[ListedSet]:
    """Describe the data sets in `names`, or all. Raises SettingsError for an unknown name."""
    root = folder_of(data_root)
    sets = [find_data_set(name) for name in names] or list(DATA_SETS.values())
    return [_listed_set(data_set, root) for data_set in dict.fromkeys(sets)]


def _listed_set(data_set: DataSet, root: Path) -> ListedSet:
    packs = packs_of(data_set.home(root))
    # The oldest time counts; there is none if a pack has changed since.
    times = [time for path in packs if (time := verified_at(path)) is not None]
    verified = min(times) if packs and len(times) == len(packs) else None
    damage = next(filter(None, (_damage(path, data_set.name) for path in packs)), None)
    return ListedSet(
        name=data_set.name,
        what=data_set.summary,
        download_bytes=data_set.download_bytes,
        licence=data_set.licence,
        origin=data_set.origin,
        here=data_set.is_here(root),
        verified=verified.isoformat(timespec="seconds") if verified and not damage else None,
        damage=damage,
        folder=str(root),
    )


def _damage(path: Path, name: str, on_event: OnEvent | None = None) -> str | None:
    """The damage of a pack; without `on_event`, only a sample of large packs is checked."""
    try:
        if on_event is not None:
            verify_pack(path, name, on_event)
        else:
            load_pack(path, name)
    except DataError as error:
        return error.message
    return None


def verify_all(names: Sequence[str], *, data_root: str | None, on_event: OnEvent) -> list[VerifiedSet]:
    """Recompute the digests of all packs.

    Args:
        names: the data sets; empty for all that are present.
        data_root: the folder of prepared data sets; None for the default.
        on_event: receives progress.

    Raises:
        SettingsError: a name is unknown.
        DataError: a named data set is not present.
    """
    root = folder_of(data_root)
    for name in names:
        if not find_data_set(name).is_here(root):
            raise DataError(f"{name} is not in {root}", hint=f"run mamlctl fetch {name}")
    packs = {name: packs_of(find_data_set(name).home(root)) for name in dict.fromkeys(names or DATA_SETS)}
    sizes = {path: path.stat().st_size for paths in packs.values() for path in paths if path.is_file()}
    total, done = sum(sizes.values()), 0
    if not total and not names:
        on_event(Notice(f"nothing is in {root}"))
    checked = []
    for name, paths in packs.items():
        damages = []
        for path in paths:
            damages.append(_damage(path, name, on_event))
            done += sizes.get(path, 0)
            on_event(Progress(f"verify {name}", done, total, "B"))
        if paths or names:
            damage = "; ".join(filter(None, damages)) or None
            checked.append(VerifiedSet(name, len(paths), damage, str(root)))
    return checked


def refuse_damage(checked: Sequence[VerifiedSet]) -> None:
    """Raise DataError if one of the data sets is damaged."""
    if damages := {entry.name: entry.damage for entry in checked if entry.damage}:
        names = " ".join(damages)
        message = "; ".join(damages.values())
        raise DataError(message, hint=f"run mamlctl fetch {names} --force")
