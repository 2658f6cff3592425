"""Endless streams of navigation tasks: the goal of task i is a pure function of (seed, split, i).

Shapes: T tasks, E trajectories, H times, D = 2 coordinates, A = 2 numbers of an action.

A meta-batch is an `Episodes`: its x are the starts of trajectories, _TED, one for each trajectory that the
task may sample before an inner step (support set) or for a measurement (query set); its y are the goals,
_TD; and its keys are those of the noise of actions.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mamlctl.data.counter_rng import random_word_rows, random_words_of_keys, uniform_numbers
from mamlctl.data.tasks.episodes import Episodes, StreamSettings, to_device_no_sync
from mamlctl.data.worlds import World


class NavigationStream:
    """All tasks of a world; task i does not depend on the run, the batch size or the order of calls."""

    ways = 1  # there are no classes

    def __init__(self, world: World, settings: StreamSettings) -> None:
        self.world, self.split, self.seed = world, settings.split, settings.seed
        self.shots, self.queries = settings.shots, settings.queries
        self.device, self._dtype = settings.place.device, settings.place.dtype

    def episodes(self, first: int, tasks: int) -> Episodes:
        """Return tasks `first`, `first` + 1, ...; all trajectories start at the origin."""
        words_TW = random_word_rows(self.seed, self.split, first, tasks, self.world.dimensions + 1)
        uniform_TD = uniform_numbers(words_TW[:, : self.world.dimensions])
        goal_TD = torch.from_numpy((2 * uniform_TD - 1) * self.world.half_side).to(self._dtype)
        goal_TD = to_device_no_sync(goal_TD, self.device)
        start = goal_TD.new_zeros(tasks, 1, self.world.dimensions)
        # On the CPU, where the noise is drawn; the top bit is left out, since torch's integers are signed.
        keys_T = torch.from_numpy((words_TW[:, -1] >> np.uint64(1)).astype(np.int64))
        support, query = start.expand(-1, self.shots, -1), start.expand(-1, self.queries, -1)
        return Episodes(support, goal_TD, query, goal_TD, keys_T=keys_T)


def action_noise(keys_T: Tensor, inner_step: int, trajectories: int, horizon: int) -> Tensor:
    """Draw standard normal noise for the actions of all trajectories of tasks -> _TEHA, float64 on the CPU.

    The noise of a trajectory at a time depends on these and on the task's key and the inner step, but neither
    on how many trajectories there are nor on the other tasks.

    Args:
        keys_T: the keys of the tasks.
        inner_step: inner steps taken before.
        trajectories: E.
        horizon: H.
    """
    pairs = trajectories * horizon
    words_TW = random_words_of_keys(keys_T.cpu().numpy(), "action noise", inner_step, 2 * pairs)
    uniform = uniform_numbers(words_TW)
    # Box & Muller 1958: two uniform numbers make two normal ones. log1p(-u), since u may be 0 but is never 1.
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[:, 0::2])), 2 * math.pi * uniform[:, 1::2]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    return torch.from_numpy(normal.reshape(len(keys_T), trajectories, horizon, 2))
