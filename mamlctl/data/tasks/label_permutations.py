"""The same tasks with their labels in several orders."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from mamlctl.data.counter_rng import k_smallest, random_words
from mamlctl.data.tasks.episodes import Episodes, Tasks


class LabelPermutations:
    """A stream that repeats every task `orders` times in a row, with different labels each time.

    The first orders are the stream's own and its cyclic shifts, so that N orders (N ways) give each class
    each label once; further ones are cyclic shifts of random orders of the task.
    """

    def __init__(self, stream: Tasks, orders: int) -> None:
        self.stream, self.orders = stream, orders
        self.split, self.seed, self.device = stream.split, stream.seed, stream.device
        self.ways, self.shots, self.queries = stream.ways, stream.shots, stream.queries

    def episodes(self, first: int, tasks: int) -> Episodes:
        """Return tasks `first`, `first` + 1, ...; number n is task n // orders in order n % orders."""
        numbers = range(first, first + tasks)
        task = first // self.orders
        tasks_once = self.stream.episodes(task, numbers[-1] // self.orders - task + 1)
        repeated_T = torch.tensor([number // self.orders - task for number in numbers], device=self.device)
        repeated = {name: part.index_select(0, repeated_T) for name, part in tasks_once.present().items()}
        episodes = Episodes(**repeated)
        label_TN = torch.from_numpy(np.stack([self.labels(number) for number in numbers])).to(self.device)
        changed = {
            "support_y_TE": label_TN.gather(1, episodes.support_y_TE),
            "query_y_TE": label_TN.gather(1, episodes.query_y_TE),
        }
        if episodes.class_TN is not None:
            changed["class_TN"] = episodes.class_TN.gather(1, label_TN.argsort(1))
        return replace(episodes, **changed)

    def labels(self, number: int) -> NDArray[np.int64]:
        """Return the new label for each of the task's own labels, _N."""
        task, place = divmod(number, self.orders)
        drawn, shift = divmod(place, self.ways)
        order_N = np.arange(self.ways)
        if drawn:
            keys = random_words(self.seed, f"{self.split} labels", task, drawn * self.ways)[-self.ways :]
            order_N = k_smallest(keys, self.ways)
        return (order_N + shift) % self.ways
