"""The run folder: created once, written by one process, with atomic file replacement.

`upgrade` converts files from older versions to the current form.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from mamlctl.core.errors import MamlctlError, SettingsError
from mamlctl.core.files import (
    append_text,
    check_out,
    contents,
    expanded,
    finite,
    one_writer,
    read_object,
    write_json,
    write_text,
)
from mamlctl.core.formatting import plural
from mamlctl.core.literals import RowKind, RunStatus
from mamlctl.core.metrics_rows import is_damaged
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.merge import stored_settings
from mamlctl.settings.presets import load_file, to_yaml
from mamlctl.settings.schema import FIELDS, TrainConfig

# Settings that a resumed run may change.
RESUME_OVERRIDES = tuple(name for name, item in FIELDS.items() if not item.metadata["decides"])
CONFIG = "config.yaml"
COMMANDS = "command.txt"  # the command lines that have trained the run
STATUS = "status.json"
METRICS = "metrics.jsonl"
CLASSES = "classes.json"
ENVIRONMENT = "environment.json"
EVALUATIONS = "eval"  # has one folder per evaluation, with the next two files
SUMMARY = "summary.json"
TASKS = "tasks.csv"
TAIL = 20_000  # bytes that `last_metrics` reads at the end of metrics.jsonl

# The settings of commit 207ec7b, which are in every config.yaml and in every owner digest.
_FIRST = (
    "dataset ways shots queries train_shots split_scheme split_fractions strict rotations augment ink "
    "normalize image_size channels resize net filters hidden pooling readout activation algo adapts "
    "inner_steps eval_inner_steps inner_lr inner_optimizer inner_batch eval_inner_batch proximal "
    "first_order bn meta_lr meta_lr_final hyper_lr cg_steps meta_batch_size epochs steps_per_epoch "
    "val_tasks adam_beta1 adam_beta2 clip_value clip_norm msl msl_epochs da da_epochs bnrs bnwb lslr ca "
    "min_meta_lr device precision engine task_chunk cuda_graph data_root seed init_seed train_seed "
    "split_seed eval_seed report_every"
)
FIRST_SETTINGS = frozenset(_FIRST.split())

# The evaluation settings of that commit, which are in every protocol.
FIRST_EVAL_SETTINGS = frozenset({"split", "tasks", "queries", "dataset", "eval_seed", "inner_steps", "bn"})

# Settings of the run that are also in every protocol.
OF_RUN = ("split_scheme", "split_seed", "ink", "ways", "shots")


@dataclass(frozen=True)
class RunState:
    """The state of a run, as stored in status.json."""

    status: RunStatus | None  # None before the first meta-step, and if the file cannot be read
    step: int = 0  # meta-steps done
    reason: str = ""  # why it is not finished
    diverged_at: int | None = None  # the meta-step that failed, which may be later than the last good one

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train, because the run is finished or would diverge again."""
        return self.status in ("finished", "diverged")


class RunFolder:
    """The files of one run, opened by `new_run` or `open_run`."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path, self.config = path, config

    @property
    def owner(self) -> str:
        """The digest of the settings that identify this run; its checkpoints contain it."""
        identity = identity_settings(self.config) | {"seed": self.config.seed}
        # The settings that a resumed run may change have always been null in digests.
        covered = dict.fromkeys(FIRST_SETTINGS) | digested_settings(identity)
        return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, chosen: str) -> Path:
        """The checkpoint with this name in the folder of checkpoints, or the file with this path."""
        path = expanded(chosen)
        own = self.checkpoints / path
        is_path = "/" in chosen or not own.is_file()
        return path if is_path and path.is_file() else own

    def checkpoint_name(self, chosen: str | None) -> str | None:
        """The name of a checkpoint in the folder of checkpoints, or an absolute path, for the protocol."""
        if chosen is None:
            return None
        file = self.checkpoint(chosen)
        inside = file.parent.resolve() == self.checkpoints.resolve()
        return file.name if inside else str(file.resolve())

    def writing(self) -> AbstractContextManager[None]:
        """Lock the folder for the block. Raises LockedError if another process is writing to it."""
        return one_writer(self.path)

    def state(self) -> RunState:
        """The state that `set_state` wrote last."""
        return run_state(self.path)

    def environment(self) -> dict[str, Any]:
        """The environment at the start of the run; empty if its file is missing or damaged."""
        return upgrade(ENVIRONMENT, read_object(self.path / ENVIRONMENT))

    @property
    def dataset_digest(self) -> str | None:
        """The digest of the data at the start of the run; None if it is unknown."""
        digest = self.environment().get("dataset_digest")
        return digest if isinstance(digest, str) else None

    @property
    def older_digests(self) -> tuple[str, ...]:
        """The digests that older versions gave to the same data."""
        stored = self.environment().get("dataset_older_digests")
        digests = stored if isinstance(stored, list) else []
        return tuple(digest for digest in digests if isinstance(digest, str))

    def trained_on(self, digest: str | None, older_digests: Sequence[str] = ()) -> bool:
        """Whether the run was trained on the data with these digests; true if one is unknown."""
        own, digests = self.dataset_digest, {digest, *older_digests}
        return None in (own, digest) or not digests.isdisjoint({own, *self.older_digests})

    def classes(self) -> dict[str, list[str]]:
        """The classes of each split at the start of training; empty for curves or a damaged file."""
        return read_object(self.path / CLASSES)

    def set_state(self, state: RunState) -> None:
        """Replace status.json."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(self.path / STATUS, {**asdict(state), "pid": os.getpid(), "time": now})

    def append_metrics(self, kind: RowKind, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl and flush it, so that other processes can follow."""
        append_text(self.path / METRICS, json.dumps(finite({"kind": kind, **row}), allow_nan=False) + "\n")

    def metrics(self, containing: str = "") -> list[dict[str, Any]]:
        """The rows of metrics.jsonl whose lines contain a text, without damaged lines."""
        return _metrics_rows(line for line in self._metrics_lines() if containing in line)

    def _metrics_lines(self) -> list[str]:
        try:
            return (self.path / METRICS).read_text(errors="replace").splitlines(keepends=True)
        except FileNotFoundError:
            return []

    def last_metrics(self) -> list[dict[str, Any]]:
        """The last rows of metrics.jsonl, read from its end because a scheduler polls often."""
        try:
            with (self.path / METRICS).open("rb") as file:
                start = max(file.seek(0, 2) - TAIL, 0)
                file.seek(start)
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return []
        return _metrics_rows(lines[start > 0 :])  # the first line may be incomplete

    def rewind_metrics(self, step: int, validated_epochs: int) -> str:
        """Drop the rows reported after the checkpoint from which a run resumes, and damaged lines.

        Args:
            step: meta-steps at the checkpoint.
            validated_epochs: epochs that were validated before the checkpoint.

        Returns:
            Which lines were damaged, or ""; a last line that a crash cut off does not count.
        """
        lines = self._metrics_lines()
        rows = [_metrics_row(line) for line in lines]
        kept = [
            row
            for row in rows
            if row
            and row["step"] <= step
            and (row["kind"] != "validation" or row["epoch"] <= validated_epochs)
        ]
        write_text(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
        read = enumerate(zip(lines, rows, strict=True), 1)
        damaged = [number for number, (line, row) in read if line.endswith("\n") and row is None]
        if not damaged:
            return ""
        numbers = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        return f"{METRICS}: dropped {len(damaged)} damaged {plural(len(damaged), 'line')} ({numbers})"


def _metrics_rows(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The rows in the lines, without damaged ones."""
    return [row for row in map(_metrics_row, lines) if row is not None]


def _metrics_row(line: str) -> dict[str, Any] | None:
    """The row in a line; None if the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    upgraded = upgrade(METRICS, row) if isinstance(row, dict) else {}
    return None if is_damaged(upgraded) else upgraded


def identity_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that identify a run, except its seed."""
    return {key: value for key, value in asdict(config).items() if key not in (*RESUME_OVERRIDES, "seed")}


def digested_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a digest; newer ones only if they differ from the behaviour of older versions."""
    return {
        name: value
        for name, value in settings.items()
        if name in FIRST_SETTINGS or value != FIELDS[name].metadata["before"]
    }


def run_state(path: Path) -> RunState:
    """The state in a run folder's status.json; values of the wrong type count as missing."""
    stored = upgrade(STATUS, read_object(path / STATUS))
    step, diverged_at = (
        value if isinstance(value := stored.get(name), int) else None for name in ("step", "diverged_at")
    )
    statuses: tuple[RunStatus, ...] = get_args(RunStatus)
    status = next((status for status in statuses if status == stored.get("status")), None)
    return RunState(status, step or 0, str(stored.get("reason") or ""), diverged_at)


def protocol_settings(settings: EvalConfig, evaluated: TrainConfig) -> dict[str, Any]:
    """The settings in a protocol; newer ones only if they differ from the behaviour of older versions.

    Args:
        settings: the settings of the evaluation.
        evaluated: the settings of the run, with the values that the evaluation replaces.
    """
    of_run = vars(evaluated) | {"inner_steps": evaluated.evaluation_inner_steps}
    protocol = {}
    for item in fields(settings):
        value = getattr(settings, item.name)
        if item.name in FIRST_EVAL_SETTINGS:
            protocol[item.name] = of_run.get(item.name, value)
        elif item.metadata["decides"] and value != item.metadata["before"]:
            protocol[item.name] = value
    return protocol


@contextmanager
def new_run(
    path: Path, config: TrainConfig, completed: TrainConfig, *, command: str, environment: Mapping[str, Any]
) -> Iterator[RunFolder]:
    """Create a run folder, locked for the block.

    Args:
        path: the folder.
        config: the settings of the run.
        completed: the same with all derived values, for the comments in config.yaml.
        command: the command line, for command.txt.
        environment: the contents of environment.json.

    Raises:
        LockedError: another process is writing to the folder.
        MamlctlError: the folder is not empty, or the path is a file.
    """
    check_out(path)
    taken = path.is_dir() and bool(contents(path, CONFIG))
    run = RunFolder(path, config)
    if taken and not (path / CONFIG).is_file():
        raise MamlctlError(f"{path} is not empty", hint="choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    with run.writing():
        if taken:
            hint = f"resume it with mamlctl train --resume {path}, or choose another --out"
            raise MamlctlError(f"{path} already contains a run", hint=hint)
        write_text(path / CONFIG, to_yaml(config, completed))
        write_text(path / COMMANDS, command + "\n")
        write_json(path / ENVIRONMENT, environment)
        yield run


def open_run(path: Path) -> RunFolder:
    """Open an existing run folder without locking it. Raises MamlctlError if it is damaged or not one."""
    hint = "use the folder that 'mamlctl train' printed"
    if not path.is_dir():
        raise MamlctlError(f"there is no run folder {path}", hint=hint)
    if not (path / CONFIG).is_file():
        raise MamlctlError(f"{path} is not a run folder: it has no {CONFIG}", hint=hint)
    try:
        return RunFolder(path, stored_config(load_file(path / CONFIG), str(path / CONFIG)))
    except SettingsError as error:
        fact = f"{path / CONFIG} is damaged: {error.problems[0][0]}"
        raise MamlctlError(fact, hint="train a new run") from error


def stored_config(values: Mapping[str, Any], source: str) -> TrainConfig:
    """The settings in a file from this or an older version. Raises SettingsError if it is damaged."""
    if missing := FIRST_SETTINGS - values.keys():
        raise SettingsError([(f"{len(missing)} settings are missing, e.g. {min(missing)}", "")])
    return stored_settings(source, upgrade(CONFIG, values))


def upgrade(file: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Convert what an older version wrote to the current form; no other code knows the old forms.

    Args:
        file: CONFIG, STATUS, ENVIRONMENT, SUMMARY or METRICS.
        content: the content of the file; for METRICS, one row.
    """
    upgraded = dict(content)
    if file == CONFIG:
        new = {name: item.metadata["before"] for name, item in FIELDS.items() if name not in FIRST_SETTINGS}
        upgraded = new | upgraded
    elif file == STATUS and content.get("status") == "diverged":
        reason = str(content.get("reason"))
        meta_step = re.search(r"meta-step (\d+)", reason)
        upgraded.setdefault("diverged_at", int(meta_step[1]) if meta_step else content.get("step"))
        upgraded["reason"] = re.sub(r"^training diverged at meta-step \d+: ", "", reason)
    elif file == ENVIRONMENT and isinstance(device := content.get("device"), str):
        upgraded["device"] = device.replace(" 1 threads)", " 1 thread)")
    elif file == METRICS:
        kind = "report" if "query_losses" in content else ""
        upgraded.setdefault("kind", "validation" if "val_tasks" in content else kind)
    elif file == SUMMARY:
        upgraded["results"] = [
            {"kind": "ensemble" if row["model"].startswith("ensemble") else "best", **row}
            for row in content["results"]
        ]
    return upgraded
