"""What a run stores about its table: the tasks of each split, and the statistics of the columns."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mamlctl.core.errors import DataError, MamlctlError
from mamlctl.core.files import read_object, write_json
from mamlctl.core.literals import SPLITS
from mamlctl.data.reading.tables import read_table
from mamlctl.data.tasks.table_tasks import Standardisation, TableFacts
from mamlctl.experiments.settings import fill_defaults
from mamlctl.run_folder import RunFolder

FACTS = "table.json"  # in a run folder


def store_facts(run: RunFolder, facts: TableFacts | None) -> None:
    """Write the facts about the table of a run unless the run has them, which are then compared.

    Raises DataError and MamlctlError as `check_facts` does.
    """
    if facts is not None and not (run.path / FACTS).exists():
        document = _document(facts)
        write_json(run.path / FACTS, document | {"digest": _digest(document)})
    check_facts(run, facts)


def check_facts(run: RunFolder, facts: TableFacts | None) -> None:
    """Compare the facts about a table with those that a run has stored.

    Raises:
        DataError: the statistics or the tasks differ.
        MamlctlError: the file is damaged.
    """
    if facts is not None and (run.path / FACTS).exists() and stored_facts(run) != facts:
        fact = f"{run.path / FACTS} has other tasks or statistics than {run.config.dataset} has now"
        raise DataError(fact, hint="restore the file and the table, or train a new run")


def stored_facts(run: RunFolder) -> TableFacts:
    """What `store_facts` wrote. Raises MamlctlError if it is missing or damaged."""
    stored = read_object(run.path / FACTS)
    digest = stored.pop("digest", None)
    if digest != _digest(stored) or not _is_valid(stored):
        fact = f"{run.path / FACTS} is missing or damaged, so the statistics of the run's table are unknown"
        raise MamlctlError(fact, hint="restore the file, or train a new run")
    columns = {name: tuple(stored[name]) for name in ("inputs", "targets", "mean", "deviation")}
    tasks = {split: tuple(stored["tasks"][split]) for split in SPLITS}
    return TableFacts(Standardisation(**columns), tasks)


def _is_valid(stored: Mapping[str, Any]) -> bool:
    """Whether the file has all names and numbers; its digest protects it from damage only."""
    tasks, names = stored.get("tasks"), [stored.get(key) for key in ("inputs", "targets")]
    groups = [*names, *(tasks.get(split) for split in SPLITS)] if isinstance(tasks, dict) else [None]
    if not all(isinstance(group, list) and all(isinstance(name, str) for name in group) for group in groups):
        return False
    numbers = [stored.get(key) for key in ("mean", "deviation")]
    width = len(stored["inputs"]) + len(stored["targets"])
    are_numbers = all(
        isinstance(group, list) and len(group) == width and all(map(_is_finite, group)) for group in numbers
    )
    return bool(stored["inputs"] and stored["targets"]) and are_numbers and min(stored["deviation"]) > 0


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _document(facts: TableFacts) -> dict[str, Any]:
    values = facts.standardisation
    assert all(map(math.isfinite, values.mean + values.deviation))
    columns = {name: list(getattr(values, name)) for name in ("inputs", "targets", "mean", "deviation")}
    return {**columns, "tasks": {split: list(names) for split, names in facts.tasks.items()}}


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def is_same_table(run: RunFolder, path: Path) -> bool:
    """Whether a file has the table on which a run was trained. Raises DataError if it is not a table."""
    config = fill_defaults(run.config)
    assert config.inputs is not None and config.targets is not None
    return read_table(path, config.inputs, config.targets).digest == run.dataset_digest
