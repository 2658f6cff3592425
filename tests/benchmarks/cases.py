"""What is measured: shapes of meta-batches, and the engines' settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mamlctl.settings.merge import fill_schedules
from mamlctl.settings.schema import IMPROVEMENTS, TrainConfig

INNER_LR = 0.01  # small, so that nothing overflows: random images have nothing to be learnt from

# Settings of each engine that is timed; "name-precision" elsewhere.
ENGINES = ("plain", "adjoint")
PRECISIONS = ("float32", "tf32", "bf16", "float64")
CPU_ENGINES = ("plain", "adjoint", "adjoint-bf16")
CUDA_ENGINES = ("plain", "plain-tf32", "adjoint", "adjoint-tf32", "adjoint-bf16")


@dataclass(frozen=True)
class Case:
    """The shapes of a meta-batch and of the network; everything that the arithmetic depends on."""

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
        """In words, for tables."""
        return "first" if self.first_order else "second"

    def document(self) -> dict[str, Any]:
        """For JSON, and for `case_of`."""
        return asdict(self)


def case_of(document: Mapping[str, Any]) -> Case:
    """The inverse of `Case.document`, after a trip through JSON too."""
    channels, height, width = document["image"]
    return Case(**{**document, "image": (channels, height, width)})


def omniglot(ways: int, shots: int) -> Case:
    """The published settings (experiment_config/omniglot_maml++-*.json): 8 tasks, 64 filters, 1 query."""
    return Case(f"omniglot-{ways}w{shots}s", (1, 28, 28), 64, ways, shots, queries=1, tasks=8)


def mini_imagenet(ways: int, shots: int) -> Case:
    """The same for mini-imagenet_maml++-*.json: 2 tasks, 48 filters, 15 queries."""
    return Case(f"mini-imagenet-{ways}w{shots}s", (3, 84, 84), 48, ways, shots, queries=15, tasks=2)


CASES = (omniglot(20, 1), omniglot(5, 1), omniglot(20, 5), mini_imagenet(5, 1), mini_imagenet(5, 5))
PEERS = ("higher", "torchopt", "torch.func")
OTHERS = (*PEERS, "official")  # learners that are not ours
PEER_CASES = ("omniglot-20w1s", "omniglot-5w1s")
GROWTH_BASE = omniglot(5, 1)  # the smallest: 64 of its tasks still fit into a laptop's memory
GROWTH: dict[str, Sequence[int]] = {
    "inner_steps": (1, 2, 5, 10, 20),
    "tasks": (1, 2, 4, 8, 16, 32, 64),
    "ways": (5, 10, 20, 30, 50),
    "shots": (1, 2, 5, 10),
}


def in_both_orders(case: Case) -> tuple[Case, Case]:
    """The case in second and in first order."""
    return replace(case, first_order=False), replace(case, first_order=True)


def growth_cases(axis: str) -> list[Case]:
    """The base with one of its numbers growing."""
    return [case_of(GROWTH_BASE.document() | {axis: value}) for value in GROWTH[axis]]


def engine_settings(name: str) -> dict[str, Any]:
    """`plain`, `adjoint-bf16`, ... as settings of TrainConfig."""
    engine, _, precision = name.partition("-")
    return {"engine": engine, "precision": precision or "float32"}


def engine_problem(name: str) -> str | None:
    """Why TrainConfig cannot be given this engine, or None."""
    settings = engine_settings(name)
    if settings["engine"] not in ENGINES or settings["precision"] not in PRECISIONS:
        return f"unknown engine '{name}': use one of {', '.join(ENGINES)}, with -bf16 or -tf32 behind it"
    return None


def train_config(case: Case, settings: Mapping[str, Any], algo: str = "maml++") -> TrainConfig:
    """MAML++, its order the case's own instead of annealed; at epoch 0 MSL weighs all steps equally."""
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
