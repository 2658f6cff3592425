"""The progress of a run: its position, the sums since its last report, and what is written of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mamlctl.core.literals import RowKind
from mamlctl.engine.algorithms.meta_gradient import MetaStepResult
from mamlctl.engine.training import checkpoints


@dataclass
class Period:
    """Sums since the last report; checkpoints contain them, so that a resumed run reports the same means."""

    # Query losses after 0..I inner steps, query scores after 0..I, support loss, meta-loss.
    sums: Tensor  # on the device
    counts: Tensor  # of the values in `sums`; on the CPU

    @classmethod
    def empty(cls, inner_steps: int, device: torch.device) -> Period:
        """Return sums of 0."""
        zeros = torch.zeros(2 * (inner_steps + 1) + 2, dtype=torch.float64)
        return cls(zeros.to(device, copy=True), zeros)

    def add_no_sync(self, measured: MetaStepResult) -> None:
        """Add one meta-step; a value that it did not measure does not change the mean."""
        steps = range((len(self.sums) - 2) // 2)
        values = [part.get(step) for part in (measured.query_losses, measured.query_scores) for step in steps]
        support = measured.support_losses_I
        values += [support.mean() if len(support) else None, measured.meta_loss]
        nothing = self.sums.new_zeros(())
        self.sums += torch.stack([nothing if value is None else value.double() for value in values])
        self.counts += torch.tensor([value is not None for value in values])

    def means(self) -> list[float]:
        """Compute the means; the only synchronisation with the device in a report period."""
        means: list[float] = (self.sums.cpu() / self.counts).tolist()
        return means


@dataclass
class Position:
    """The progress of a run."""

    step: int = 0  # finished meta-steps
    validated: int = 0  # validated epochs
    # The best epochs, best first: epoch, validation score, half width of its 95 % interval.
    top: list[list[float]] = field(default_factory=list)


class RunFiles(Protocol):
    """The part of a run folder that training uses."""

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""

    @property
    def owner(self) -> str:
        """The digest of the run's settings, which its checkpoints contain."""

    def append_metrics(self, kind: RowKind, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl."""

    def rewind_metrics(self, step: int, validated_epochs: int) -> str:
        """Drop the rows that were written after a checkpoint; return which lines were damaged, or ""."""


class Saver:
    """Writes the checkpoints and metrics of a run; without a run folder, it writes nothing."""

    def __init__(self, run: RunFiles | None) -> None:
        """`run` is None in a process that leaves writing to another one."""
        self.run = run

    def append(self, kind: RowKind, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl."""
        if self.run is not None:
            self.run.append_metrics(kind, row)

    def save_last(self, content: Mapping[str, Any]) -> None:
        """Write `last.pt`, and keep the one before it."""
        if self.run is not None:
            checkpoints.save_last(self.run.checkpoints, content, owner=self.run.owner)

    def save_best(self, epoch: int, content: Mapping[str, Any], top: list[list[float]]) -> None:
        """Write the checkpoint of an epoch if it is one of the best.

        Args:
            epoch: counted from 1.
            content: of the checkpoint.
            top: the best epochs, best first; each entry begins with the epoch.
        """
        if self.run is None:
            return
        if any(entry[0] == epoch for entry in top):
            checkpoints.save(epoch_file(self.run, epoch), content, owner=self.run.owner)
        if top[0][0] == epoch:
            checkpoints.save(self.run.checkpoints / checkpoints.BEST, content, owner=self.run.owner)

    def remove_others(self, top: list[list[float]]) -> None:
        """Remove the checkpoints of epochs that are no longer among the best."""
        if self.run is None:
            return
        kept = {epoch_file(self.run, int(entry[0])) for entry in top}
        for path in set(self.run.checkpoints.glob("epoch-*.pt")) - kept:
            path.unlink()


def epoch_file(run: RunFiles, epoch: int) -> Path:
    """Return the path of the checkpoint of an epoch, counted from 1."""
    return run.checkpoints / f"epoch-{epoch:04d}.pt"
