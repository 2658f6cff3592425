"""The run folder: created once, written by one process, every file replaced in one move."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from mamlctl.core.errors import MamlctlError, SettingsError
from mamlctl.core.files import _read_object, finite, one_writer, write_json, write_text
from mamlctl.settings.merge import stored_settings
from mamlctl.settings.presets import load_file, to_yaml
from mamlctl.settings.schema import FIELDS, TrainConfig

RESUME_OVERRIDES = (
    "device",
    "data_root",
    "report_every",
    "cuda_graph",
    "task_chunk",
)  # settings that a resumed run may change: no result depends on them but by rounding

CONFIG, STATUS, METRICS, CLASSES = "config.yaml", "status.json", "metrics.jsonl", "classes.json"


class RunFolder:
    """One run's files. Opened by `new_run` or `open_run`."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path, self.config = path, config

    @property
    def owner(self) -> str:
        """What this run's checkpoints carry: a digest of the settings that make it the run it is."""
        own = asdict(self.config) | dict.fromkeys(RESUME_OVERRIDES)
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    def writing(self) -> AbstractContextManager[None]:
        """Be the one writer for the block. Raises MamlctlError if another process is."""
        return one_writer(self.path)

    def status(self) -> dict[str, Any]:
        """What `set_status` last wrote; empty before."""
        return _read_object(self.path / STATUS)

    def environment(self) -> dict[str, Any]:
        """What environment.json told at the start; empty if it is not there or damaged."""
        return _read_object(self.path / "environment.json")

    def classes(self) -> dict[str, list[str]]:
        """The classes of every split that training began with; empty for curves."""
        return _read_object(self.path / CLASSES)

    def set_status(self, state: str, **details: Any) -> None:
        """running, finished, interrupted or diverged, with the step and whatever else tells how it stands."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(self.path / STATUS, {"status": state, **details, "pid": os.getpid(), "time": now})

    def append_metrics(self, entry: Mapping[str, Any]) -> None:
        """Add one object to metrics.jsonl, flushed, so that a reader may follow."""
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(finite(entry), allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The objects of metrics.jsonl; a last line cut off by a crash does not count."""
        entries = []
        try:
            lines = (self.path / METRICS).read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if isinstance(entry, dict) and "step" in entry:
                entries.append(entry)
        return entries

    def rewind_metrics(self, step: int, validated_epochs: int) -> None:
        """Drop what was reported after the checkpoint that a resumed run starts from."""
        kept = [
            entry
            for entry in self.metrics()
            if entry["step"] <= step and ("val_tasks" not in entry or entry["epoch"] <= validated_epochs)
        ]
        write_text(self.path / METRICS, "".join(json.dumps(entry) + "\n" for entry in kept))


def identity_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that make a run what it is, but for its seed."""
    return {key: value for key, value in asdict(config).items() if key not in (*RESUME_OVERRIDES, "seed")}


def common_settings(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all of these say alike."""
    first, *others = settings
    return {key: value for key, value in first.items() if all(other[key] == value for other in others)}


def status_of(path: Path) -> str:
    """What a run folder's status.json says; "" where there is none."""
    return str(_read_object(path / STATUS).get("status", ""))


def step_of(path: Path) -> int:
    """Meta-steps that a run folder's status.json tells of; 0 where there is none."""
    step = _read_object(path / STATUS).get("step", 0)
    return step if isinstance(step, int) else 0


@contextmanager
def new_run(
    path: Path, config: TrainConfig, completed: TrainConfig, *, command: str, environment: Mapping[str, Any]
) -> Iterator[RunFolder]:
    """A new run folder, this process its one writer. Raises MamlctlError if something is there already."""
    if path.exists() and not path.is_dir():
        raise MamlctlError(f"{path} is a file, not a folder", hint="choose another --out")
    # A lock alone is what a start leaves that was killed before it wrote its settings.
    taken = path.is_dir() and any(entry.name != "lock" for entry in path.iterdir())
    run = RunFolder(path, config)
    if taken and not (path / CONFIG).is_file():
        raise MamlctlError(f"{path} is not empty", hint="choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    with run.writing():
        if taken:
            hint = f"mamlctl train --resume {path}, or choose another --out"
            raise MamlctlError(f"{path} already holds a run", hint=hint)
        write_text(path / CONFIG, to_yaml(config, completed))
        write_text(path / "command.txt", command + "\n")
        write_json(path / "environment.json", environment)
        yield run


def open_run(path: Path) -> RunFolder:
    """A run folder that is there, not locked. Raises MamlctlError if it is none, or damaged."""
    if not path.is_dir():
        raise MamlctlError(
            f"there is no run folder {path}", hint="name the folder that 'mamlctl train' printed"
        )
    if not (path / CONFIG).is_file():
        raise MamlctlError(
            f"{path} is not a run folder: it has no {CONFIG}",
            hint="name the folder that 'mamlctl train' printed",
        )
    try:
        stored = load_file(path / CONFIG)
        if missing := FIELDS.keys() - stored.keys():
            raise SettingsError([(f"{len(missing)} settings are missing, such as {min(missing)}", "")])
        config = stored_settings(str(path / CONFIG), stored)
    except SettingsError as error:
        raise MamlctlError(
            f"{path / CONFIG} is damaged: {error.problems[0][0]}", hint="train again"
        ) from error
    return RunFolder(path, config)


def default_run_path(config: TrainConfig) -> Path:
    """A folder under runs/ that is not there yet; its name tells the run (complete), and when it started."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    ways = f"{config.ways}w" if config.ways > 1 else ""  # curves have none
    name = f"{Path(config.dataset).name}-{ways}{config.shots}s-{config.algo}-s{config.seed}-{now}"
    paths = (
        Path("runs") / (name + suffix)
        for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    )
    return next(path for path in paths if not path.exists())
