"""The images that a run was trained on: where they are now, and whether a test contains them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError, MamlctlError, SettingsError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.files import replacing
from mamlctl.data.sets.folder_layout import class_files
from mamlctl.data.sets.registry import absolute_data_set, is_image_folder, is_table
from mamlctl.data.tasks.streams import TaskSource
from mamlctl.data.user_tasks.stream import CHANGED as CHANGED_TASKS
from mamlctl.experiments.tables.stored import FACTS, check_facts, is_same_table, stored_facts
from mamlctl.run_folder import CLASSES, RunFolder
from mamlctl.settings.evaluation import EvalConfig

DIGESTS = "training_images.bin"  # in a run folder: HEAD, a checksum, and sorted digests of 8 bytes each
HEAD = b"mamlctl2"  # files of older versions have neither this nor a checksum


def store_digests(run: RunFolder, source: TaskSource) -> None:
    """Write digests of the images of the training classes, unless the run has them; curves have none."""
    if source.image_digests is not None and not (run.path / DIGESTS).exists():
        digests = np.unique(source.image_digests("train")).astype("<u8").tobytes()
        with replacing(run.path / DIGESTS) as file:
            file.write(HEAD + _checksum(digests) + digests)


def _checksum(digests: bytes) -> bytes:
    return hashlib.sha256(digests).digest()[:8]


def stored_digests(run: RunFolder) -> NDArray[np.uint64] | None:
    """What `store_digests` wrote; None if it is missing, as in older runs, or damaged."""
    try:
        stored = (run.path / DIGESTS).read_bytes()
        has_head = stored.startswith(HEAD)
        checksum, content = stored[len(HEAD) :][:8], stored[len(HEAD) :][8:]
        digests = np.frombuffer(content if has_head else stored, dtype="<u8")
    except (OSError, ValueError):
        return None
    is_whole = checksum == _checksum(content) if has_head else bool(np.all(digests[1:] > digests[:-1]))
    return digests if is_whole and len(digests) else None


def same_training_images(run: RunFolder, other: RunFolder) -> bool:
    """Whether two runs have the same training images in any order; false if that is unknown."""
    digests, others = stored_digests(run), stored_digests(other)
    return digests is not None and others is not None and np.array_equal(digests, others)


def check_folder(run: RunFolder, command: str) -> None:
    """Raise DataError if the folder or table of the run no longer exists; `command` needs it."""
    folder = run.config.dataset
    if is_table(folder) and not Path(folder).is_file():
        hint = f"if it has moved to FILE, run {command} --dataset FILE"
        raise DataError(f"{folder}, on which {run.path} was trained, is not a file", hint=hint)
    if is_image_folder(folder) and not Path(folder).is_dir():
        hint = f"if its images have moved to DIR, run {command} --dataset DIR"
        raise DataError(f"{folder}, on which {run.path} was trained, is not a folder", hint=hint)


def check_own_data(run: RunFolder, settings: EvalConfig, source: TaskSource, *, same: bool) -> None:
    """Compare a table or the user's own tasks with those on which a run was trained.

    Args:
        run: the run.
        settings: the settings of the evaluation.
        source: the data of the evaluation.
        same: whether they have the digest of the run.

    Raises:
        DataError: they differ.
        SettingsError: a setting has no effect on the tasks.
        MamlctlError: what the run stores about its table is damaged.
    """
    if (tasks := source.user_tasks) is not None:
        if not same:
            raise DataError(f"the tasks of {run.path} have changed since it was trained", hint=CHANGED_TASKS)
        if settings.eval_seed is not None and not tasks.takes_seed:
            fact = f"--eval-seed has no effect: the method task of {tasks.name} takes no seed"
            raise SettingsError([(fact, "leave it out")])
    if source.table is not None:
        if not same:
            fact = f"{run.config.dataset} has changed since {run.path} was trained on it"
            raise DataError(fact, hint="restore the table, or use its new tasks with --support and --query")
        check_facts(run, source.table)


def stored_split(run: RunFolder) -> Mapping[str, Sequence[str]] | None:
    """The classes or tasks with which a run on own data started; None for other data, which do not change.

    Raises MamlctlError if their file is damaged.
    """
    if is_table(run.config.dataset) and (run.path / FACTS).exists():
        return stored_facts(run).tasks
    if not is_image_folder(run.config.dataset) or not (run.path / CLASSES).exists():
        return None
    stored = run.classes()
    if not stored or not all(isinstance(names, list) for names in stored.values()):
        fact = f"{run.path / CLASSES} is damaged, so the split of the run is unknown"
        raise MamlctlError(fact, hint="restore the file, or train a new run")
    return stored


def keeps_split(run: RunFolder, settings: EvalConfig) -> bool:
    """Whether the data are the run's own, which may have moved: a folder needs all classes of the run's."""
    own, dataset = run.config.dataset, settings.dataset
    if settings.classes not in (None, run.config.classes):
        return False
    if dataset is None or absolute_data_set(dataset) == own:
        return True
    if is_table(dataset) and is_table(own):
        return is_same_table(run, Path(absolute_data_set(dataset)))
    if not (is_image_folder(dataset) and is_image_folder(own)):
        return False
    try:
        names = class_files(Path(absolute_data_set(dataset)), run.config.classes)
    except DataError:  # opening the data set reports it
        return False
    stored = stored_split(run)
    return stored is not None and all(name in names for part in stored.values() for name in part)


def overlap_notes(
    run: RunFolder, settings: EvalConfig, source: TaskSource, *, own: bool, on_event: OnEvent
) -> tuple[str, ...]:
    """Look for training images among those of the test, by their content, if --dataset names the data.

    Args:
        run: the run.
        settings: the settings of the evaluation.
        source: the data of the evaluation.
        own: whether they are the run's own data with its own split, which may contain copies.
        on_event: receives notices.

    Returns:
        Caveats about the results.

    Raises:
        DataError: other data contain training images, and the settings do not allow that.
    """
    if settings.dataset is None or settings.split == "train" or source.image_digests is None:
        return ()
    trained = stored_digests(run)
    if trained is None:
        lack = "a damaged list" if (run.path / DIGESTS).exists() else "no list"
        unknown = "they may be among those of the test"
        on_event(Notice(f"{run.path} has {lack} of its training images: {unknown}"))
        return ()
    tested = source.image_digests(settings.split)
    if not (common := int(np.isin(tested, trained).sum())):
        return ()
    where = f"{len(tested):,} {settings.split} images of {settings.dataset}"
    note = f"the run was trained on {common:,} of the {where}"
    if not (settings.allow_overlap or own):
        raise DataError(note, hint="test it on other images, or add --allow-overlap")
    on_event(Notice(note))
    return (note,)
