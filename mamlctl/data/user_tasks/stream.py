"""Streams of the user's own tasks: made one by one on the CPU, stacked, and moved to the device at once.

Shapes: T tasks, E examples of a set, D inputs or C H W of an image, N targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import Notice, OnEvent, Waiting
from mamlctl.core.literals import Split
from mamlctl.core.user_code.stored import trust_by_use
from mamlctl.data.tasks.episodes import Episodes, StreamSettings, to_device_no_sync
from mamlctl.data.user_tasks.code import UserTasks, open_tasks
from mamlctl.data.user_tasks.form import Arrays
from mamlctl.data.user_tasks.purity import check_pure
from mamlctl.settings.schema import TrainConfig

# The hint if a run's tasks are no longer those with which it started.
CHANGED = "restore what its code reads, or train a new run"


class UserStream:
    """The tasks of a split: number i is task(split, i)."""

    def __init__(self, tasks: UserTasks, settings: StreamSettings) -> None:
        self.tasks, self.split, self.seed = tasks, settings.split, settings.seed
        self.device, self._dtype = settings.place.device, settings.place.dtype
        form = tasks.form
        self.ways, self.shots, self.queries = form.ways, form.shots, form.queries

    def episodes(self, first: int, tasks: int) -> Episodes:
        """Return tasks `first`, `first` + 1, ... Raises SettingsError if the code fails or is wrong."""
        form = self.tasks.form
        floats: type[np.floating] = np.float64 if self._dtype == torch.float64 else np.float32
        targets = np.int64 if form.ways > 1 else floats
        sets: list[NDArray[Any]] = []
        for examples in (form.support, form.query):
            sets.append(np.empty((tasks, examples, *form.example_shape), floats))
            sets.append(np.empty((tasks, examples, *form.target_shape), targets))

        def fill(number: int, arrays: Arrays) -> None:
            form.check(arrays, self.tasks.where(self.split, number))
            with np.errstate(over="ignore"):  # reported as numbers that are not finite
                for filled, array in zip(sets, arrays, strict=True):
                    filled[number - first] = array  # a copy, since the code may use its arrays again

        self.tasks.make(self.split, range(first, first + tasks), self.seed, fill)
        if not form.has_valid(sets):
            for place in range(tasks):
                where = self.tasks.where(self.split, first + place)
                form.check_values([filled[place] for filled in sets], where)
        return Episodes(*(self._on_device(part) for part in sets))

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        tensor = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
        return to_device_no_sync(tensor, self.device)


def open_user_tasks(
    config: TrainConfig,
    stored: UserTasks | None,
    settings: Mapping[Split, StreamSettings],
    on_event: OnEvent,
) -> tuple[UserTasks, dict[str, UserStream]]:
    """Open the user's own tasks, and a stream for each split.

    The tasks of a new run are checked first, and the user trusts their code by training with it.

    Args:
        config: the complete settings.
        stored: those of an existing run; None for a new one.
        settings: the seeds and the device of each split.
        on_event: receives notices.

    Raises:
        SettingsError: the code fails or is wrong, or its tasks have other sizes than the settings.
        DataError: those of an existing run now have other sizes.
    """
    tasks = open_tasks(config.dataset) if stored is None else stored
    problems = tasks.contradictions(config)
    if problems and stored is not None:
        raise DataError(problems[0][0], hint=CHANGED)
    if problems:
        raise SettingsError(problems)
    streams: dict[str, UserStream] = {split: UserStream(tasks, part) for split, part in settings.items()}
    if stored is None:
        on_event(Waiting(f"checking the tasks of {tasks.name}"))
        check_pure(tasks)
        # Numbers have no end, which training would find late.
        last = {"train": config.total_steps * config.meta_batch_size - 1, "val": config.val_tasks - 1}
        for split, stream in streams.items():
            stream.episodes(last.get(split, 0), 1)
        if torch.get_default_dtype() != torch.float32 or not torch.is_grad_enabled():
            fact = f"{tasks.name} changes torch's default dtype, or turns derivatives off"
            raise SettingsError([(fact, "pass dtype to the calls, and use with torch.no_grad(): there")])
        _notice_whole_targets(tasks, on_event)
        trust_by_use(tasks.stored, on_event)
    return tasks, streams


def _notice_whole_targets(tasks: UserTasks, on_event: OnEvent) -> None:
    """Say that floating-point targets are no classes, if they look like labels."""
    targets = [y for _, *sets in tasks.samples.values() for y in sets[::2]]
    if tasks.form.ways == 1 and all((y == np.rint(y)).all() for y in targets):
        fact = f"targets of {tasks.name} are whole numbers of type {targets[0].dtype}, so this is regression"
        on_event(Notice(f"{fact}: return integers if they are labels"))
