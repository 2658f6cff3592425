"""From settings to streams of tasks: the data set found, fetched if need be, split and put on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mamlctl.config import TrainConfig, derive
from mamlctl.data.episodes import TaskStream, episode_problems
from mamlctl.data.images import PackedImages, data_root
from mamlctl.data.sets import choice_problems, find
from mamlctl.engine.devices import DTYPES
from mamlctl.errors import DataError, SettingsError
from mamlctl.records import Notice, OnEvent


def complete(config: TrainConfig) -> TrainConfig:
    """The settings with nothing left open. Raises SettingsError if the data set lacks such a thing."""
    problems = choice_problems(config.dataset, split_scheme=config.split_scheme, resize=config.resize)
    if problems:
        raise SettingsError(problems)
    data_set = find(config.dataset)
    own = {
        "split_scheme": data_set.split_schemes[0],
        "resize": data_set.resizes[0],
        "rotations": data_set.rotations,
    }
    return derive(config, own)


def open_streams(
    config: TrainConfig, splits: Sequence[str], device: torch.device, *, offline: bool, on_event: OnEvent
) -> tuple[dict[str, TaskStream], PackedImages]:
    """A stream of tasks for each split, its images on the device; a data set that is not there is fetched.

    `config`: complete. Raises SettingsError for tasks that a split is too small for, DataError for missing
    or damaged data.
    """
    data_set, root = find(config.dataset), data_root(config.data_root)
    if not data_set.is_here(root):
        if offline:
            message = f"{config.dataset} is not at {root}, and --offline forbids fetching it"
            raise DataError(message, hint=f"mamlctl fetch {config.dataset}")
        on_event(Notice(f"{config.dataset} is not at {root}: fetching it"))
        data_set.fetch(root, source=None, offline=False, force=False, on_event=on_event)
    packed = data_set.open_pack(root, str(config.resize), on_event=on_event)
    classes = data_set.split_classes(packed, str(config.split_scheme), config.split_seed)
    asked = {split: classes[split] for split in splits}
    size = {"ways": config.ways, "shots": config.shots, "queries": config.queries}
    if problems := episode_problems(config.dataset, packed, asked, **size, rotations=str(config.rotations)):
        raise SettingsError(problems)
    train_seed = config.seed if config.train_seed is None else config.train_seed
    streams = {
        split: TaskStream(
            packed,
            members,
            name=config.dataset,
            split=split,
            seed=train_seed if split == "train" else config.eval_seed,
            **size,
            rotations=str(config.rotations),
            ink=config.ink,
            device=device,
            dtype=DTYPES.get(config.precision, torch.float32),
        )
        for split, members in asked.items()
    }
    return streams, packed


def image_shape(packed: PackedImages) -> tuple[int, int, int]:
    """Channels, height and width of a data set's images."""
    _, channels, height, width = packed.images_MCHW.shape
    return channels, height, width
