"""The measured cases: shapes of meta-batches, and settings of the engines. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mamlctl.settings.merge import fill_schedules
from mamlctl.settings.schema import IMPROVEMENTS, TrainConfig

INNER_LR = 0.01  # small, because losses on random images can diverge

# A timed engine is named "engine" (float32) or "engine-precision".
ENGINES = ("plain", "adjoint")
PRECISIONS = ("float32", "tf32", "bf16", "float64")
CPU_ENGINES = ("plain", "adjoint", "adjoint-bf16")
CUDA_ENGINES = ("plain", "plain-tf32", "adjoint", "adjoint-tf32", "adjoint-bf16")


@dataclass(frozen=True)
class Case:
    """The shapes of a meta-batch and of the network, which determine the arithmetic."""

    name: str
    image: tuple[int, int, int]  # C, H, W
    filters: int
    ways: int
    shots: int
    queries: int
    tasks: int
    inner_steps: int = 5
    first_order: bool = False

    @property
    def order(self) -> str:
        """The order of the meta-gradient in words, for tables."""
        return "first" if self.first_order else "second"

    def document(self) -> dict[str, Any]:
        """Return the case as a JSON object, which `case_of` reads."""
        return asdict(self)


def case_of(document: Mapping[str, Any]) -> Case:
    """Return the case of a `Case.document`, which may have been through JSON."""
    channels, height, width = document["image"]
    return Case(**{**document, "image": (channels, height, width)})


def omniglot(ways: int, shots: int) -> Case:
    """Return the published case of omniglot_maml++-*.json: 8 tasks, 64 filters, 1 query per class."""
    return Case(f"omniglot-{ways}w{shots}s", (1, 28, 28), 64, ways, shots, queries=1, tasks=8)


def mini_imagenet(ways: int, shots: int) -> Case:
    """Return the published case of mini-imagenet_maml++-*.json: 2 tasks, 48 filters, 15 queries per class."""
    return Case(f"mini-imagenet-{ways}w{shots}s", (3, 84, 84), 48, ways, shots, queries=15, tasks=2)


CASES = (omniglot(20, 1), omniglot(5, 1), omniglot(20, 5), mini_imagenet(5, 1), mini_imagenet(5, 5))
PEERS = ("higher", "torchopt", "torch.func")
OTHERS = (*PEERS, "official")  # learners that are not part of mamlctl
PEER_CASES = ("omniglot-20w1s", "omniglot-5w1s")
GROWTH_BASE = omniglot(5, 1)  # the smallest case: 64 tasks fit into the memory of a laptop
GROWTH: dict[str, Sequence[int]] = {
    "inner_steps": (1, 2, 5, 10, 20),
    "tasks": (1, 2, 4, 8, 16, 32, 64),
    "ways": (5, 10, 20, 30, 50),
    "shots": (1, 2, 5, 10),
}


def in_both_orders(case: Case) -> tuple[Case, Case]:
    """Return the case in second order and in first order."""
    return replace(case, first_order=False), replace(case, first_order=True)


def growth_cases(axis: str) -> list[Case]:
    """Return the base case with each of the axis's values."""
    return [case_of(GROWTH_BASE.document() | {axis: value}) for value in GROWTH[axis]]


def engine_settings(name: str) -> dict[str, Any]:
    """Return the TrainConfig settings of an engine such as `plain` or `adjoint-bf16`."""
    engine, _, precision = name.partition("-")
    return {"engine": engine, "precision": precision or "float32"}


def engine_problem(name: str) -> str | None:
    """Return why the engine cannot be used, or None."""
    settings = engine_settings(name)
    if settings["engine"] not in ENGINES or settings["precision"] not in PRECISIONS:
        return (
            f"unknown engine '{name}': use one of {', '.join(ENGINES)}, optionally followed by -bf16 or -tf32"
        )
    return None


def train_config(case: Case, settings: Mapping[str, Any], algo: str = "maml++") -> TrainConfig:
    """Return settings for the case: derivative-order annealing is off, since a case has a fixed order.

    At epoch 0, MSL weights all inner steps equally, as the peers do.
    """
    switches: dict[str, Any] = dict.fromkeys(IMPROVEMENTS, algo == "maml++") | {
        "da": False,
        "msl": case.inner_steps > 1,
    }
    config = TrainConfig(
        algo=algo,
        ways=case.ways,
        shots=case.shots,
        queries=case.queries,
        filters=case.filters,
        inner_steps=case.inner_steps,
        inner_lr=INNER_LR,
        first_order=case.first_order,
        meta_batch_size=case.tasks,
        **switches,
        **settings,
    )
    return fill_schedules(config, {"split_scheme": "own", "resize": "none", "rotations": "none"})
