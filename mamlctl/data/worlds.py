"""The worlds of reinforcement learning, and where their goals are: 2-D navigation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

# Part of every digest: another order of words is another set of tasks and another noise.
LAYOUT = "words: the goal, then the key of the noise; noise: a pair per trajectory and time, in this order"


@dataclass(frozen=True)
class World:
    """A plane in which a point robot starts at the origin and is rewarded for being near a hidden goal.

    With x the position, g the goal and a the action of the policy,

        x <- x + clip(scale a, -limit, limit)        reward = -|x - g|^2, or -|x - g|

    A trajectory ends after `horizon` actions, or earlier when the robot is within `near` of the goal.
    """

    name: str
    summary: str
    squared: bool  # whether the reward is minus the squared distance, or minus the distance
    horizon: int = 100  # actions per trajectory, at most
    half_side: float = 0.5  # goals are uniform in [-half_side, half_side]^2
    scale: float = 0.1  # velocity of an action of 1
    limit: float = 0.1  # largest velocity per axis
    near: float = 0.01  # distance to the goal at which a trajectory ends

    dimensions = 2

    @property
    def definition(self) -> str:
        """Everything that determines the tasks, in words."""
        reward = "squared distance" if self.squared else "distance"
        return (
            f"goal ~ U[-{self.half_side}, {self.half_side}]^{self.dimensions}; reward = -{reward}; "
            f"velocity = clip({self.scale} action, {self.limit}); {self.horizon} steps, or "
            f"within {self.near} of the goal; {LAYOUT}"
        )

    @property
    def digest(self) -> str:
        """The sha256 of the definition: equal digests, seeds and splits mean equal tasks."""
        return hashlib.sha256(self.definition.encode()).hexdigest()


WORLDS = {
    world.name: world
    for world in (
        # Finn, Abbeel & Levine 2017 (arXiv:1703.03400), section 5.3. The published code (cbfinn/maml_rl,
        # rllab's NormalizedEnv) multiplies actions by 0.1 too.
        World(
            "navigation",
            "a point robot that finds a hidden goal, reward minus squared distance (Finn et al. 2017)",
            squared=True,
        ),
        # maml_examples/point_env_randgoal.py in cbfinn/maml_rl, which drew the published figure.
        World(
            "navigation-distance",
            "the same with minus the distance as the reward, as in the published code",
            squared=False,
        ),
    )
}
