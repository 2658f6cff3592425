"""What run folders hold for a table: how training went, and each test task's score."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import MamlctlError
from mamlctl.core.files import is_locked
from mamlctl.core.literals import CellStatus
from mamlctl.report.table import Cell
from mamlctl.run_folder import RunFolder
from mamlctl.settings.schema import EvalConfig, TrainConfig

NEAR = 0.99  # share of the last validation's score that counts as having got there

SUMMARY, TASKS = "summary.json", "tasks.csv"


@dataclass(frozen=True)
class StoredEvaluation:
    """A stored evaluation of one run."""

    protocol: Mapping[str, Any]
    metric: str
    scores: Mapping[str, NDArray[np.float64]]  # "best" or "last", "ensemble": of every task
    per_step: Mapping[str, Sequence[float]]  # of the same, after 0, 1 ... inner steps
    ensemble_size: int
    notes: tuple[str, ...]


def find_evaluation(run: RunFolder, settings: EvalConfig) -> StoredEvaluation | None:
    """The evaluation of the run as it is now that the settings ask for; None if there is none yet.

    Raises MamlctlError for one that is there and cannot be read.
    """
    wanted = _wanted(run.config, settings, run.environment().get("dataset_digest", ""))
    for path in sorted((run.path / "eval").glob(f"{settings.split}-*/{SUMMARY}")):
        try:
            summary = json.loads(path.read_text())
            protocol = summary["protocol"]
            asked = {name: protocol.get(name, default) for name, default in _ABSENT.items()} | protocol
            same = all(asked.get(name) in values for name, values in wanted.items())
            # One from before the last training, or of other images, is no result of this run.
            if same and summary.get("step") == run.state().step:
                return _tested(path.parent, summary)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            hint = "remove that folder, and it is tested again"
            raise MamlctlError(f"{path.parent} is damaged: {error}", hint=hint) from error
    return None


# What a protocol leaves out where it is as it was before there was such a setting.
_ABSENT = {"disjoint": False, "label_permutations": 1, "adapts": None, "inner_lr": None}


def _wanted(config: TrainConfig, settings: EvalConfig, digest: str) -> dict[str, tuple[Any, ...]]:
    """What a protocol must say to be the one asked for: name -> values that will do."""
    steps = settings.inner_steps_of(config)
    exact = {
        "split": settings.split,
        "tasks": settings.tasks,
        "queries": settings.queries or config.queries,
        "eval_seed": config.eval_seed if settings.eval_seed is None else settings.eval_seed,
        "inner_steps": steps,
        "dataset": config.dataset,
        "disjoint": settings.disjoint,
        "label_permutations": settings.label_permutations,
        "dataset_digest": digest,
        "adapts": settings.adapts,
        "inner_lr": settings.inner_lr,
    }
    return {name: (value,) for name, value in exact.items()} | {"bn": (settings.bn or config.bn, "none")}


def _tested(folder: Path, summary: Mapping[str, Any]) -> StoredEvaluation:
    results, metric = summary["results"], "mse" if "mse" in summary["results"][0] else "accuracy"
    with (folder / TASKS).open(newline="") as file:
        columns = list(zip(*csv.reader(file), strict=True))
    values = {head: np.array(column, dtype=np.float64) for head, *column in columns}
    kinds = {row["model"]: "ensemble" if row["model"].startswith("ensemble") else "best" for row in results}
    return StoredEvaluation(
        summary["protocol"],
        metric,
        {kind: values[model] for model, kind in kinds.items()},
        {kinds[row["model"]]: row["per_step"] for row in results},
        max(len(row["epochs"]) for row in results),
        tuple(summary.get("notes", ())),
    )


def read_cell(run: RunFolder | None, *, seed: int, place: str, command: str, failed: str = "") -> Cell:
    """How a run's training went; `run` is None before it began, `failed`: why its last commands ended so."""
    if run is None:
        return Cell(seed, place, "failed" if failed else "missing", failed, 0, None, None, (), {}, command)
    state, metrics = run.state(), run.metrics()
    reports = [row for row in metrics if row["kind"] == "report"]
    validations = [row for row in metrics if row["kind"] == "validation"]
    status: CellStatus = state.status or "running"
    if failed and status != "diverged":
        status = "failed"
    elif status == "running" and not is_locked(run.path):
        status = "interrupted"  # killed: it could not say so
    return Cell(
        seed=seed,
        run=place,
        status=status,
        reason=failed if status == "failed" else state.reason,
        steps=max(state.step, *(int(row["step"]) for row in metrics[-1:]), 0),
        steps_to_99=_steps_to_99(validations) if state.status == "finished" else None,
        step_s=_step_s(reports, run.config.meta_batch_size),
        validation=tuple((entry["step"], _score(entry)) for entry in validations),
        rates=next((entry["rates"] for entry in reversed(reports) if entry.get("rates")), {}),
        command=command,
        device=str(run.environment().get("device", "")),
        diverged_at=state.diverged_at,
    )


def _number(value: float | None) -> float:
    """A file's null is a number that was not finite."""
    return float("nan") if value is None else float(value)


def _score(validation: Mapping[str, Any]) -> float:
    return _number(validation.get("val_accuracy", validation.get("val_mse")))


def _steps_to_99(validations: Sequence[Mapping[str, Any]]) -> int | None:
    """Meta-steps to the first validation as good as 99 % of the last one's (mse: within 1 %)."""
    if not validations:
        return None
    last = _score(validations[-1])
    if "val_mse" in validations[-1]:
        there = [entry["step"] for entry in validations if _score(entry) <= last / NEAR]
    else:
        there = [entry["step"] for entry in validations if _score(entry) >= last * NEAR]
    return int(there[0]) if there else None


def _step_s(reports: Sequence[Mapping[str, Any]], meta_batch_size: int) -> float | None:
    """Median seconds per meta-step over reports; the first one's holds the warm-up."""
    timed = [meta_batch_size / entry["tasks_per_second"] for entry in reports[1:] or reports]
    return statistics.median(timed) if timed else None
