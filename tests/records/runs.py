"""One seed of an experiment: its run folder, the time spent on it, and its tests.

    runs/records/EXPERIMENT-sSEED/
      progress.json  the settings of the experiment, the slices of training, the time of each validation, and
                     the finished tests
      run/           an ordinary run folder: train --resume, eval and compare take it

The folder can be moved to another machine at any time when no process is writing to it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mamlctl.core.errors import MamlctlError
from mamlctl.core.events import Event, OnEvent, RunStarted, ValidationDone
from mamlctl.core.files import one_writer, read_object, write_json
from mamlctl.core.literals import StopReason
from mamlctl.core.problems import Problem
from mamlctl.core.results import TrainResult
from mamlctl.engine.devices import open_device
from mamlctl.experiments.environment import code_and_machine
from mamlctl.experiments.evaluate import evaluate_run
from mamlctl.experiments.train import resume, train
from mamlctl.run_folder import CONFIG, RunFolder, open_run, run_state
from records.experiments import Experiment

RUNS = Path("runs/records")
PROGRESS = "progress.json"
STORE_EVERY_S = 5.0  # of training; the most that is missing in its time after a kill


@dataclass(frozen=True)
class Place:
    """Where runs are trained and tested."""

    device: str  # auto, cpu, cuda or cuda:N
    data_root: str | None  # the folder of prepared data sets; None for the platform's cache folder
    command: str  # the command line, for command.txt


class RecordedRun:
    """The state of one seed of an experiment, read from its folder."""

    def __init__(self, experiment: Experiment, seed: int, runs: Path) -> None:
        """Read the folder below `runs`, which may not exist yet."""
        self.experiment, self.seed = experiment, seed
        self.folder = runs / self.name
        self.path = self.folder / "run"
        self._read()

    def _read(self) -> None:
        stored = read_object(self.folder / PROGRESS)
        self.slices: list[dict[str, Any]] = stored.get("slices", [])
        self.tests: dict[str, dict[str, Any]] = stored.get("tests", {})
        # The meta-steps at each validation (a string in JSON) -> the time of training until then.
        self.validated_s: dict[str, float] = stored.get("validated_s", {})
        self._problem = self._found_problem(stored)

    def _found_problem(self, stored: Mapping[str, Any]) -> Problem | None:
        """Why the run cannot be continued, and what to do; None if it can."""
        remove = "remove that folder"
        change = f"change {self.experiment.name}.yaml, or {remove}"
        settings = ("begun with other settings", change)
        if stored and stored.get("stated") != self.experiment.stated:
            return settings
        if not (self.path / CONFIG).is_file():
            return None
        try:
            found = vars(self.open().config)
        except MamlctlError:
            return None  # training and tests report it
        if found["seed"] != self.seed:
            return f"a run of seed {found['seed']}", f"move that run to its own folder, or {remove}"
        expected = vars(self.experiment.config)
        if any(found[name] != expected[name] for name in self.experiment.stated["settings"]):
            return settings
        if self.step and not self.slices:
            return f"without {PROGRESS}", f"copy that file from where the run was trained, or {remove}"
        state = run_state(self.path)
        return (f"diverged at meta-step {state.diverged_at}", change) if state.status == "diverged" else None

    @property
    def name(self) -> str:
        """The experiment and the seed, as they are in the names of the folder and of the receipt."""
        return f"{self.experiment.name}-s{self.seed}"

    @property
    def wall_s(self) -> float:
        """The time of training so far, including validation and the start of each slice."""
        return sum(part["wall_s"] for part in self.slices)

    @property
    def processor_s(self) -> float:
        """The processor time of training so far, over all threads."""
        return sum(part["processor_s"] for part in self.slices)

    @property
    def step(self) -> int:
        """The meta-steps done, as of the last checkpoint."""
        return run_state(self.path).step

    @property
    def is_trained(self) -> bool:
        """Whether training has reached its last meta-step or used its time."""
        minutes = self.experiment.minutes
        spent = minutes is not None and self.wall_s >= 60 * minutes
        return not self.obstacle and (run_state(self.path).status == "finished" or (spent and self.step > 0))

    @property
    def obstacle(self) -> str:
        """Why the run cannot be continued; "" if it can."""
        return self._problem[0] if self._problem else ""

    @property
    def untested(self) -> list[str | None]:
        """The batch-norm modes that are not tested yet, or whose test has been removed."""
        tested = {mode for mode, test in self.tests.items() if (self.path / test["folder"]).is_dir()}
        return [mode for mode in self.experiment.modes if str(mode) not in tested]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the folder for the block. Raises LockedError if another process is working on the run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with one_writer(self.folder, "folder"):
            self._read()
            yield

    def open(self) -> RunFolder:
        """Open the run folder. Raises MamlctlError if it is damaged."""
        return open_run(self.path)

    def _store(self) -> None:
        document = {
            "stated": self.experiment.stated,
            "slices": self.slices,
            "validated_s": self.validated_s,
            "tests": self.tests,
        }
        write_json(self.folder / PROGRESS, document)

    def train(self, place: Place, time_limit_s: float | None, on_event: OnEvent) -> StopReason:
        """Begin or continue the training.

        Args:
            place: where to train.
            time_limit_s: seconds until the run saves and stops; None for no limit.
            on_event: receives progress, reports and notices.

        Returns:
            Why training has stopped; "" at its last meta-step, and "time limit" also if its time is used.

        Raises:
            MamlctlError: as `train` and `resume` do, or the run cannot be continued.
        """
        if self._problem:
            fact, hint = self._problem
            raise MamlctlError(f"{self.folder}: {fact}", hint=hint)
        limits = [time_limit_s, self._seconds_left()]
        limit_s = min((limit for limit in limits if limit is not None), default=None)
        began, began_processor = time.monotonic(), time.process_time()
        part: dict[str, Any] = {}

        def store() -> None:
            part["wall_s"] = time.monotonic() - began
            part["processor_s"] = time.process_time() - began_processor
            self._store()

        def stored_event(event: Event) -> None:
            on_event(event)
            if isinstance(event, RunStarted):  # what fails before, as without data, is not a slice
                config = replace(self.experiment.config, device=place.device)
                device = open_device(config.device, config.precision)
                part["environment"] = code_and_machine(config.precision, device)
                self.slices.append(part)
                store()
            elif not part:
                return
            elif isinstance(event, ValidationDone):
                so_far_s = self.wall_s - part["wall_s"] + time.monotonic() - began
                self.validated_s[str(event.step)] = round(so_far_s, 1)
                store()
            elif time.monotonic() - began - part["wall_s"] >= STORE_EVERY_S:
                store()

        try:
            return self._trained(place, limit_s, stored_event).reason
        finally:
            if part:
                store()

    def _trained(self, place: Place, limit_s: float | None, on_event: OnEvent) -> TrainResult:
        common: dict[str, Any] = {
            "offline": False,
            "time_limit_s": limit_s,
            "command": place.command,
            "on_event": on_event,
        }
        where: Mapping[str, Any] = {"device": place.device, "data_root": place.data_root}
        if (self.path / CONFIG).is_file():
            return resume(self.path, where, **common)
        config = replace(self.experiment.config, seed=self.seed, **where)
        return train(config, out=self.path, **common)

    def _seconds_left(self) -> float | None:
        """The rest of the time of training; None if the experiment has no limit."""
        minutes = self.experiment.minutes
        return None if minutes is None else max(60 * minutes - self.wall_s, 0.001)

    def test(self, mode: str | None, place: Place, on_event: OnEvent) -> None:
        """Test the trained run in one batch-norm mode.

        Args:
            mode: one of the experiment's modes.
            place: where to test.
            on_event: receives progress and notices.

        Raises:
            MamlctlError: as `evaluate_run` does.
        """
        settings = replace(self.experiment.test, bn=mode, device=place.device, data_root=place.data_root)
        result = evaluate_run(self.path, settings, offline=False, on_event=on_event)
        config = replace(self.open().config, device=place.device)
        environment = code_and_machine(config.precision, open_device(config.device, config.precision))
        folder = Path(result.folder).relative_to(self.path)
        self.tests[str(mode)] = {"folder": str(folder), "environment": environment}
        self._store()
