"""The settings of policies and their outer step, for reinforcement learning."""

# ruff: noqa: RUF009 - every default here is a field of a frozen dataclass

from __future__ import annotations

from dataclasses import dataclass

from mamlctl.core.literals import OuterStep
from mamlctl.settings.data_settings import DataSettings
from mamlctl.settings.fields import REINFORCEMENT, setting


@dataclass(frozen=True)
class PolicySettings(DataSettings):
    """How a policy learns from trajectories; all are None for data sets without rewards."""

    outer: OuterStep | None = setting(
        None,
        REINFORCEMENT,
        "Outer step of policies: trpo (a trust region) or pg (Adam on the policy gradient).",
    )
    max_kl: float | None = setting(
        None,
        REINFORCEMENT,
        "With --outer trpo: largest mean divergence from the old policies (default: 0.01).",
        above=0,
        below=1e3,
    )
    discount: float | None = setting(
        None, REINFORCEMENT, "Discount of rewards per time step (default: 0.99).", least=0
    )
    gae: float | None = setting(
        None,
        REINFORCEMENT,
        "Decay of generalised advantages; 1 is the return minus its baseline (default: 1).",
        least=0,
    )
