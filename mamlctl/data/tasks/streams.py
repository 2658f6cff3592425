"""Streams of tasks from settings: the data set is found, fetched if missing, split, and put on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.formatting import plural
from mamlctl.core.literals import SPLITS, Split
from mamlctl.core.problems import Problem
from mamlctl.core.user_code.references import names_tasks
from mamlctl.data.reading.image_digests import image_digests
from mamlctl.data.reading.packs import PackedImages, data_root
from mamlctl.data.sets import image_folder
from mamlctl.data.sets.curves import FAMILIES
from mamlctl.data.sets.folder_layout import FRACTIONS
from mamlctl.data.sets.registry import fetch_or_open, find_data_set, has_classes, is_table, open_images
from mamlctl.data.tasks.curve_tasks import CurveStream
from mamlctl.data.tasks.disjoint import DisjointTasks
from mamlctl.data.tasks.episodes import Episodes, MiniBatches, Placement, StreamSettings, Tasks, mini_batches
from mamlctl.data.tasks.image_tasks import ImageSettings, TaskStream, episode_problems
from mamlctl.data.tasks.navigation import NavigationStream
from mamlctl.data.tasks.open_table import leave_out, open_table, table_streams
from mamlctl.data.tasks.table_tasks import TableFacts
from mamlctl.data.user_tasks.code import UserTasks
from mamlctl.data.user_tasks.stream import open_user_tasks
from mamlctl.data.worlds import WORLDS
from mamlctl.settings.schema import TrainConfig

# What a run has of the user's own data: the classes or tasks of each split, or the code of its tasks.
Stored = Mapping[str, Sequence[str]] | UserTasks


@dataclass(frozen=True)
class TaskSource:
    """The data from which the streams draw their tasks."""

    digest: str  # of all images, of a family of curves, or of a table
    example_shape: tuple[int, ...]  # C, H, W of images, D of curves and tables
    classes: Mapping[str, int]  # split -> number of classes, including turned ones; empty for regression
    names: Mapping[str, Sequence[str]]  # split -> names of its classes; empty for regression
    brightness: float | None = None  # mean of stored images, 0 black and 1 white; None for regression
    older_digests: tuple[str, ...] = ()  # of the same images
    # Digests of the images of a split that was opened; None for regression.
    image_digests: Callable[[Split], NDArray[np.uint64]] | None = None
    table: TableFacts | None = None  # of a table
    targets: int = 1  # values to predict in regression, or the numbers of an action
    user_tasks: UserTasks | None = None  # the user's own ones


def open_streams(
    config: TrainConfig,
    splits: Sequence[Split],
    place: Placement,
    *,
    offline: bool,
    on_event: OnEvent,
    stored: Stored | None = None,
    disjoint: bool = False,
) -> tuple[dict[str, Tasks], TaskSource]:
    """Open a stream of tasks for each split, and fetch the data set first if it is not in the data root.

    Args:
        config: the complete settings.
        splits: which streams to open.
        place: the device and type of the examples.
        offline: whether fetching is forbidden.
        on_event: receives notices and progress.
        stored: for the user's own data: what an existing run has.
        disjoint: whether test tasks share no image, as far as a split allows.

    Returns:
        The streams by split, and the data from which they draw.

    Raises:
        SettingsError: a split is too small for such tasks.
        DataError: the data are missing or damaged.
    """
    settings = {split: _stream_settings(config, split, place) for split in splits}
    streams: dict[str, Tasks]
    tasks, stored = (stored, None) if isinstance(stored, UserTasks) else (None, stored)
    if names_tasks(config.dataset):
        tasks, own_streams = open_user_tasks(config, tasks, settings, on_event)
        streams, shape = dict(own_streams), tasks.form.example_shape
        source = TaskSource(tasks.digest, shape, {}, {}, targets=tasks.form.targets, user_tasks=tasks)
    elif is_table(config.dataset):
        table, facts = open_table(config, stored, on_event)
        streams = dict(table_streams(config, table, facts, settings, on_event))
        columns = table.columns
        shape, targets = (len(columns.inputs),), len(columns.targets)
        source = TaskSource(table.digest, shape, {}, {}, table=facts, targets=targets)
    elif config.dataset in FAMILIES:
        family = FAMILIES[config.dataset]
        streams = {split: CurveStream(family, settings[split]) for split in splits}
        source = TaskSource(family.digest, (1,), {}, {})
    elif config.dataset in WORLDS:
        world = WORLDS[config.dataset]
        streams = {split: NavigationStream(world, settings[split]) for split in splits}
        source = TaskSource(world.digest, (world.dimensions,), {}, {}, targets=world.dimensions)
    else:
        packed = _open_pack(config, offline=offline, on_event=on_event)
        needed = max(part.shots + part.queries for part in settings.values())
        split = split_of(config, packed, stored, least=needed)
        classes: dict[str, NDArray[np.int64]] = {name: split[name] for name in splits}
        if find_data_set(config.dataset).own_files:
            # A new split has none of the small classes, but a stored one may.
            listed = np.concatenate([*classes.values()]) if stored else np.arange(len(packed.names))
            small = _small_classes(config, packed, listed, needed, on_event)
            classes = {name: part[~np.isin(part, small)] for name, part in classes.items()}
        more = {} if stored else {name: _more_classes(config, name) for name in settings}
        image_streams = _image_streams(config, packed, classes, settings, more, disjoint=disjoint)
        pools = {name: stream.pool for name, stream in image_streams.items()}
        streams = dict(image_streams)
        # A few hundred images are enough; reading all images of a large set would take a second.
        some_MCHW = packed.images_MCHW[:: max(len(packed.images_MCHW) // 500, 1)]
        brightness = float(some_MCHW.mean() / 255)
        shape = (config.channels or 1, *packed.images_MCHW.shape[2:])
        names = {name: [packed.names[number] for number in part] for name, part in split.items()}
        source = TaskSource(
            packed.digest,
            shape,
            pools,
            names,
            brightness,
            packed.older_digests,
            lambda part: image_digests(packed, classes[part], on_event),
        )
    return {split: _in_batches(config, stream) for split, stream in streams.items()}, source


def _stream_settings(config: TrainConfig, split: Split, place: Placement) -> StreamSettings:
    seed, shots = config.eval_seed, config.shots
    if split == "train":
        seed = config.seed if config.train_seed is None else config.train_seed
        shots = config.shots if config.train_shots is None else config.train_shots
    ways = config.ways if has_classes(config) else 1
    return StreamSettings(split, seed, shots, config.queries, place, ways)


def _in_batches(config: TrainConfig, stream: Tasks) -> Tasks:
    """The stream, with mini-batches if those of the inner loop are smaller than the support set."""
    training = stream.split == "train"
    size = config.inner_batch if training else config.eval_inner_batch
    steps = config.inner_steps if training else config.evaluation_inner_steps
    return stream if size is None or size >= stream.ways * stream.shots else MiniBatches(stream, steps, size)


def own_task(config: TrainConfig, x_E: Tensor, y_E: Tensor) -> Episodes:
    """The user's own support set as a task without queries, with mini-batches if those are smaller.

    Args:
        config: the complete settings.
        x_E: its examples.
        y_E: their labels, or the targets _EN.
    """
    steps, size, batches_TIB = config.evaluation_inner_steps, config.eval_inner_batch, None
    if size is not None and size < len(y_E):
        batches = mini_batches(config.eval_seed, "own batches", 0, len(y_E), steps, size)
        batches_TIB = torch.from_numpy(batches).to(y_E.device).unsqueeze(0)
    x_TE, y_TE = x_E.unsqueeze(0), y_E.unsqueeze(0)
    return Episodes(x_TE, y_TE, x_TE[:, :0], y_TE[:, :0], None, batches_TIB)


def _open_pack(config: TrainConfig, *, offline: bool, on_event: OnEvent) -> PackedImages:
    data_set = find_data_set(config.dataset, classes=config.classes)
    root = data_root(config.data_root)
    if not data_set.own_files and not data_set.is_here(root):
        if offline:
            message = f"{config.dataset} is not in {root}, and --offline forbids fetching it"
            source = " --from FOLDER" if data_set.archives is None else ""
            raise DataError(message, hint=f"run mamlctl fetch {config.dataset}{source}")
        on_event(Notice(f"{config.dataset} is not in {root}: fetching it"))
        fetch_or_open(data_set, root, on_event=on_event)
    assert config.image_size is not None and config.channels is not None  # filled in by the data set
    packed = open_images(
        data_set,
        root,
        resize=str(config.resize),
        side=config.image_size,
        channels=config.channels,
        on_event=on_event,
    )
    if config.strict and (left_out := packed.facts.get("left_out")):
        named = "; ".join(left_out[:5])
        hint = "fix or remove them, or leave out --strict"
        raise DataError(f"--strict is on, but {len(left_out)} cannot be used: {named}", hint=hint)
    return packed


def split_of(
    config: TrainConfig,
    packed: PackedImages,
    stored: Mapping[str, Sequence[str]] | None = None,
    *,
    least: int = 1,
) -> dict[str, NDArray[np.int64]]:
    """Split the classes into train, val and test.

    Args:
        config: the complete settings.
        packed: all images of the data set.
        stored: the class names of each split when the run started. They replace the split of the settings,
            but only for the user's own images: the classes of other data sets do not change.
        least: in the user's own images, classes with fewer images are in no new split.

    Raises:
        DataError: a class of `stored` is missing.
    """
    if stored and find_data_set(config.dataset).own_files:
        places = {name: number for number, name in enumerate(packed.names)}
        if gone := [name for names in stored.values() for name in names if name not in places]:
            message = f"{config.dataset} no longer has class {gone[0]!r}, which is in the split of the run"
            raise DataError(message, hint="restore the class, or train a new run")
        return {split: np.array([places[name] for name in names], int) for split, names in stored.items()}
    data_set = find_data_set(config.dataset, fractions=config.split_fractions, least=least)
    return data_set.split_classes(packed, str(config.split_scheme), config.split_seed)


def _small_classes(
    config: TrainConfig, packed: PackedImages, classes: NDArray[np.int64], needed: int, on_event: OnEvent
) -> list[int]:
    """The classes with fewer images than a task needs, with a notice; none if all of them are too small."""
    small = [number for number in classes.tolist() if packed.counts[number] < needed]
    if len(small) in (0, len(classes)):
        return []
    named = [f"{packed.names[number]} ({packed.counts[number]})" for number in small]
    what = f"{len(small)} {plural(len(small), 'class')} with fewer than {needed} images"
    fact = f"{what} (--shots plus --queries)"
    leave_out(config, fact, named, "use fewer --shots or --queries, add images", on_event)
    return small


def _more_classes(config: TrainConfig, split: Split) -> str:
    """The hint for a split of the user's own images that has too few classes; empty for other data sets."""
    if not find_data_set(config.dataset).own_files:
        return ""
    if config.split_scheme != "fractions":
        return f"at least {config.ways} classes in '{split}'"
    fractions = config.split_fractions or FRACTIONS
    other = f"other --split-fractions than {fractions}"
    if not float(fractions.split("-")[SPLITS.index(split)]):
        return other
    return f"at least {image_folder.classes_needed(fractions, config.ways)} classes, or {other}"


def _image_streams(
    config: TrainConfig,
    packed: PackedImages,
    classes: Mapping[str, NDArray[np.int64]],
    settings: Mapping[Split, StreamSettings],
    more_classes: Mapping[Split, str],
    *,
    disjoint: bool,
) -> dict[str, TaskStream]:
    images = ImageSettings(
        name=config.dataset,
        rotations=config.rotations or "none",
        ink=config.ink or 0,
        augment=config.augment or "none",
        normalize=config.normalize or "none",
        channels=config.channels,
    )
    problems: list[Problem] = []
    for split, part in settings.items():
        problems += episode_problems(packed, classes[split], part, images, more_classes.get(split, ""))
    if problems:
        raise SettingsError(list(dict.fromkeys(problems)))
    kind = DisjointTasks if disjoint else TaskStream
    return {split: kind(packed, classes[split], part, images) for split, part in settings.items()}
