"""What changes during a run: plain functions of the epoch, which counts from 0."""

from __future__ import annotations

import math

from mamlctl.settings.schema import TrainConfig

# Over inner_steps: the least weight of an early step while MSL is on, as in Antoniou's published code
# (few_shot_learning_system.py); it only binds when msl_epochs >= 34.
MSL_FLOOR = 0.03


def msl_weights(inner_steps: int, epoch: int, msl_epochs: int) -> tuple[float, ...]:
    """Weight of the query loss after inner step 1..I (multi-step loss, section 4 of arXiv:1810.09502).

    Equal weights at epoch 0, then mass moves linearly to the last step; from `msl_epochs` on the last
    step has it all. The weights sum to 1 at every epoch.
    """
    if not inner_steps:
        return ()
    if epoch >= msl_epochs:
        return (0.0,) * (inner_steps - 1) + (1.0,)
    early = max((1 - epoch / msl_epochs) / inner_steps, MSL_FLOOR / inner_steps)
    return (early,) * (inner_steps - 1) + (1 - early * (inner_steps - 1),)


def first_order_at(config: TrainConfig, epoch: int) -> bool:
    """Whether meta-steps of an epoch are of first order: all, or with DA those of the first `da_epochs`."""
    return config.first_order or (config.da and epoch < (config.da_epochs or 0))


def linear_meta_lr(done: float, meta_lr: float, final: float) -> float:
    """A straight line from `meta_lr` to `final` over the run, of which the share `done` lies behind."""
    return meta_lr + done * (final - meta_lr)


def cosine_meta_lr(epoch: int, epochs: int, meta_lr: float, min_meta_lr: float) -> float:
    """Cosine annealing without restarts, constant inside an epoch (Loshchilov & Hutter, arXiv:1608.03983)."""
    return min_meta_lr + 0.5 * (meta_lr - min_meta_lr) * (1 + math.cos(math.pi * epoch / epochs))
