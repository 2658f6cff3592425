"""The progress of a run: its position, and the sums since its last report."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mamlctl.engine.algorithms.meta_gradient import MetaStepResult


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
