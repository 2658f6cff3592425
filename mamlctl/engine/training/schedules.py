"""The schedules of a run, as functions of the epoch, counted from 0."""

from __future__ import annotations

import math

from mamlctl.settings.schema import TrainConfig

# The smallest weight of an early step is this over inner_steps, as in the published MAML++ code
# (few_shot_learning_system.py). It has an effect only with msl_epochs >= 34.
MSL_FLOOR = 0.03


def msl_weights(inner_steps: int, epoch: int, msl_epochs: int) -> tuple[float, ...]:
    """Return the weights v_k of the multi-step loss (arXiv:1810.09502, section 4; schedule of the code).

        v_k = max(1 - epoch / msl_epochs, MSL_FLOOR) / I  for k < I,        v_I = 1 - sum of the others

    At epoch 0 all weights are 1/I. From epoch `msl_epochs` on the last step has weight 1, all others 0.

    Args:
        inner_steps: I.
        epoch: counted from 0.
        msl_epochs: the number of epochs with a multi-step loss; 0 for none.

    Returns:
        The weights of the query losses after 1, 2, ..., I inner steps, with sum 1; empty without inner steps.
    """
    if not inner_steps:
        return ()
    if epoch >= msl_epochs:
        return (0.0,) * (inner_steps - 1) + (1.0,)
    early = max((1 - epoch / msl_epochs) / inner_steps, MSL_FLOOR / inner_steps)
    return (early,) * (inner_steps - 1) + (1 - early * (inner_steps - 1),)


def first_order_at(config: TrainConfig, epoch: int) -> bool:
    """Whether the meta-steps of an epoch are first order: always, or with DA in its first `da_epochs` epochs.

    Derivative-order annealing (DA): arXiv:1810.09502, section 4. Its epochs, like those of the multi-step
    loss, follow those that train only the body.
    """
    return config.first_order or (config.da and epoch - config.body_epochs < (config.da_epochs or 0))


def msl_weights_at(config: TrainConfig, epoch: int) -> tuple[float, ...]:
    """The weights of `msl_weights` in an epoch of a run; empty while only the body is trained."""
    if config.trains_body_only(epoch):
        return ()
    msl_epochs = (config.msl_epochs or 0) if config.msl else 0
    return msl_weights(config.inner_steps, epoch - config.body_epochs, msl_epochs)


def linear_meta_lr(done: float, meta_lr: float, final: float) -> float:
    """Interpolate the meta learning rate linearly over the run.

    Args:
        done: the finished fraction of the run, 0..1.
        meta_lr: the rate at its start.
        final: the rate at its end.
    """
    return meta_lr + done * (final - meta_lr)


def cosine_meta_lr(epoch: int, epochs: int, meta_lr: float, min_meta_lr: float) -> float:
    """Anneal the meta learning rate by a cosine without restarts; it is constant within an epoch.

        min_meta_lr + (meta_lr - min_meta_lr) (1 + cos(pi epoch / epochs)) / 2

    Loshchilov & Hutter 2017 (arXiv:1608.03983), section 3; CA in arXiv:1810.09502, section 4.

    Args:
        epoch: counted from 0.
        epochs: of the whole run.
        meta_lr: the rate of the first epoch.
        min_meta_lr: the rate that the last epoch approaches.
    """
    return min_meta_lr + 0.5 * (meta_lr - min_meta_lr) * (1 + math.cos(math.pi * epoch / epochs))
