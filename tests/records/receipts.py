"""Receipts: what a result was made with, and the checks that they still belong to their experiments."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mamlctl.core.files import finite, read_object
from mamlctl.core.literals import Metric
from mamlctl.core.metrics_rows import rows_of
from mamlctl.data.rules import metric_of
from mamlctl.experiments.grid.evaluation_files import read_scores, read_summary
from mamlctl.run_folder import RESUME_OVERRIDES, SUMMARY, TASKS
from records.experiments import Experiment
from records.runs import RecordedRun

FOLDER = Path(__file__).parents[2] / "mamlctl" / "records"
FORMAT = 1
DIGEST = "sha256"  # of the rest of the receipt
TIMES = ("wall_s", "processor_s", "slices", "validated_s")  # of "training"

Receipt = Mapping[str, Any]


def receipt(run: RecordedRun) -> dict[str, Any]:
    """The receipt of a run that is trained and tested. Raises MamlctlError if a file of it is damaged."""
    folder = run.open()
    settings = {
        name: value
        for name, value in vars(folder.config).items()
        if name not in RESUME_OVERRIDES and value is not None
    }
    places = [part["environment"] for part in (*run.slices, *run.tests.values())]
    document = {
        "format": FORMAT,
        "experiment": run.experiment.name,
        "seed": run.seed,
        "stated": run.experiment.stated,
        "settings": settings,
        "commits": _distinct(place["git"] for place in places),
        "environments": _distinct(_without(place, "git") for place in places),
        "data_digest": folder.dataset_digest,
        "training": {
            "meta_steps": folder.state().step,
            "wall_s": round(run.wall_s, 1),
            "processor_s": round(run.processor_s, 1),
            "slices": len(run.slices),
            "validated_s": run.validated_s,
        },
        "validation": _validation(rows_of(folder.metrics(), "validation"), metric_of(folder.config)),
        "tests": [_tested(run.path / test["folder"]) for test in run.tests.values()],
    }
    return document | {DIGEST: digest(document)}


def digest(document: Receipt) -> str:
    """The SHA-256 of a receipt without its own digest, as it is stored."""
    return hashlib.sha256(text_of(_without(document, DIGEST)).encode()).hexdigest()


def _validation(rows: Sequence[Mapping[str, Any]], metric: Metric) -> dict[str, Any]:
    """The validation curve: meta-steps, the score, and the half width of its 95 % interval over tasks."""
    if not rows:
        return {"curve": []}
    return {
        "metric": metric,
        "tasks": rows[0]["val_tasks"],
        "bn": rows[0]["bn"],
        "curve": [[row["step"], row[f"val_{metric}"], row["val_ci95"]] for row in rows],
    }


def _tested(folder: Path) -> dict[str, Any]:
    """A test: its protocol, its results, and the digest of the score of every task.

    Raises MamlctlError if a file of the test is damaged.
    """
    summary = read_summary(folder / SUMMARY)
    read_scores(folder, summary)
    parts = {name: summary[name] for name in ("protocol", "results", "notes", "seconds")}
    return parts | {"scores_sha256": hashlib.sha256((folder / TASKS).read_bytes()).hexdigest()}


def _distinct(values: Iterable[Any]) -> list[Any]:
    """The values without repetitions, in order."""
    return [json.loads(text) for text in dict.fromkeys(map(json.dumps, values))]


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def without_times(document: Receipt) -> dict[str, Any]:
    """The part of a receipt that is the same for a run that was interrupted and for one that was not."""
    training = _without(document["training"], *TIMES)
    tests = [_without(test, "seconds") for test in document["tests"]]
    return {**_without(document, DIGEST), "training": training, "tests": tests}


def text_of(document: Receipt) -> str:
    """A receipt as it is stored, with each list of numbers on one line."""
    text = json.dumps(finite(document), indent=1, allow_nan=False)
    return re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text) + "\n"


def receipt_file(experiment: Experiment, seed: int, folder: Path) -> Path:
    """Where the receipt of a seed is stored."""
    return folder / f"{experiment.name}-s{seed}.json"


def problems(document: Receipt, experiment: Experiment) -> list[str]:
    """Why a receipt is not one of the experiment as its file is now; empty if it is."""
    stated = json.loads(json.dumps(experiment.stated))
    found = []
    if document.get("format") != FORMAT or document.get("experiment") != experiment.name:
        return ["it is not a receipt of this experiment"]
    if document.get(DIGEST) != digest(document):
        return [f"its {DIGEST} is not the digest of its content"]
    if document["seed"] not in experiment.seeds:
        found.append(f"the experiment has no seed {document['seed']}")
    for part, values in stated.items():
        if document["stated"].get(part) != values:
            found.append(f"{part}: {document['stated'].get(part)}, but the experiment has {values}")
    training, total = document["training"], experiment.config.total_steps
    if experiment.minutes is None and training["meta_steps"] != total:
        found.append(f"it has {training['meta_steps']} of {total} meta-steps")
    tested = [test["protocol"]["bn"] for test in document["tests"]]
    if tested != [mode or "none" for mode in experiment.modes]:
        found.append(f"it was tested with the batch-norm modes {tested}")
    return found


def valid_receipt(experiment: Experiment, seed: int, folder: Path = FOLDER) -> Receipt | None:
    """The receipt of a seed; None if there is none, or none for the experiment as it is now."""
    document = read_object(receipt_file(experiment, seed, folder))
    fits = document and not problems(document, experiment) and document["seed"] == seed
    return document if fits else None
