"""Find runs and tables in the folder of runs: all of them, or the latest one that can be resumed."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from mamlctl.core.errors import MamlctlError
from mamlctl.core.files import is_locked, lock_holder
from mamlctl.experiments.grid.grid import PLAN, is_grid
from mamlctl.run_folder import CONFIG, METRICS, STATUS, open_run
from mamlctl.settings.variables import runs_folder
from mamlctl.shipped_models import COPIES, model_names

DEPTH = 3  # levels of folders below the folder of runs in which runs and tables are searched
DATED = (STATUS, METRICS, CONFIG, PLAN)  # the files of a run or a table whose last change counts
NAMED = 3  # of the latest runs, in a hint


def means_latest(path: Path) -> bool:
    """Whether --resume asks for the latest folder: "latest", unless there is a folder of that name."""
    return path == Path("latest") and not path.exists()


def hint_for_missing_run() -> str:
    """What to do if a command needs a run: name one of the latest, or train a first one."""
    folder = runs_folder()
    copies = {folder / COPIES / name for name in model_names()}
    whole = (
        path for path in newest_first(folder) if not is_grid(path) and path not in copies and _can_open(path)
    )
    latest = [shlex.quote(str(path)) for path in itertools.islice(whole, NAMED)]
    if not latest:
        models = " or ".join(model_names())
        return f"use {models}, train one with mamlctl train --preset demo, or see mamlctl eval --help"
    return f"name a run; the latest {'is' if len(latest) == 1 else 'are'} {', '.join(latest)}"


def latest_unfinished_run() -> Path:
    """The newest run in the folder of runs that can be resumed. Raises MamlctlError if there is none."""
    return _latest("run", lambda path: not is_grid(path) and _can_resume(path))


def latest_unfinished_table() -> Path:
    """The newest table in the folder of runs that is not complete. Raises MamlctlError if there is none."""
    from mamlctl.experiments.grid.grid_folder import load_grid  # needs a YAML parser
    from mamlctl.experiments.grid.scheduler import pending_cells  # needs numpy

    def is_unfinished(path: Path) -> bool:
        return is_grid(path) and bool(pending_cells(load_grid(path)))

    return _latest("table", is_unfinished)


def _latest(kind: str, is_unfinished: Callable[[Path], bool]) -> Path:
    """The newest unfinished folder that is not in use; damaged ones do not count."""
    folder, in_use = runs_folder(), list[Path]()
    for path in newest_first(folder):
        with suppress(MamlctlError, OSError):
            if is_unfinished(path):
                if not is_locked(path):
                    return path
                in_use.append(path)
    fact = f"{folder} has no unfinished {kind}"
    if in_use:
        holder = lock_holder(in_use[0] / "lock")
        fact = f"{fact} that is not in use; {in_use[0]} is in use by {holder}"
    raise MamlctlError(fact, hint="list all with mamlctl compare --list, or name the folder")


def _can_open(path: Path) -> bool:
    with suppress(MamlctlError, OSError):
        return bool(open_run(path))
    return False


def _can_resume(path: Path) -> bool:
    """Whether training has not ended. Raises MamlctlError if the run is damaged."""
    return not open_run(path).state().ended


def newest_first(folder: Path) -> list[Path]:
    """The folders of runs and tables, by the last change of their files; links to others are left out."""
    by_depth = sorted(_folders(folder, DEPTH), key=lambda path: len(path.parts), reverse=True)
    once = {path.resolve(): path for path in by_depth}
    return sorted(once.values(), key=lambda path: (changed_at(path), path.name), reverse=True)


def changed_at(path: Path) -> float:
    """The time of the last change of a run or a table, in seconds since the epoch."""
    times = [0.0]
    for name in DATED:
        with suppress(OSError):
            times.append((path / name).stat().st_mtime)
    return max(times)


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """The folders of runs and tables below a folder; what cannot be read is skipped."""
    children = list[Path]()
    with suppress(OSError):
        children = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in children:
        with suppress(OSError):
            if (path / CONFIG).is_file() or is_grid(path):
                yield path
            elif depth > 1:
                yield from _folders(path, depth - 1)
