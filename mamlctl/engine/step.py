"""One meta-step: schedules, meta-gradient, clipping, Adam."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mamlctl.config import TrainConfig
from mamlctl.data.episodes import Episodes
from mamlctl.engine.algorithms import ALGORITHMS
from mamlctl.engine.devices import COMPUTE, DTYPES
from mamlctl.engine.inner import MetaState
from mamlctl.engine.nets import NETS, Net
from mamlctl.engine.norms import accumulate, init_params, init_running
from mamlctl.engine.outer import Measured
from mamlctl.schedules import cosine_meta_lr, is_first_order, msl_weights


def build(
    config: TrainConfig, image_shape: tuple[int, int, int], device: torch.device
) -> tuple[Net, MetaState]:
    """The network and its starting state: a function of the settings, the same on every device."""
    net = NETS[config.net](image_shape, config.ways, config.filters, COMPUTE.get(config.precision))
    dtype = DTYPES.get(config.precision, torch.float32)
    seed = config.seed if config.init_seed is None else config.init_seed
    slow = {name: w.to(device) for name, w in net.init(torch.Generator().manual_seed(seed), dtype).items()}
    like = torch.empty((), dtype=dtype, device=device)
    steps = config.inner_steps
    state = MetaState(
        slow=slow,
        norm=init_params(net.norm_layers, steps if config.bnwb else 1, like),
        rates={name: like.new_full((steps if config.lslr else 1,), config.inner_lr) for name in slow},
        running=init_running(net.norm_layers, steps if config.bnrs else 1, like),
        rates_learnt=config.lslr,
    )
    return net, state


class MetaStep:
    """The outer loop's body: everything that one meta-batch changes."""

    def __init__(self, config: TrainConfig, net: Net, state: MetaState) -> None:
        self.config, self.net, self.state = config, net, state
        self.outer = ALGORITHMS[config.algo].outer
        self.learnable = {name: tensor.requires_grad_() for name, tensor in state.learnable().items()}
        betas = (config.adam_beta1, config.adam_beta2)
        self.adam = torch.optim.Adam(list(self.learnable.values()), lr=config.meta_lr, betas=betas)

    def schedule(self, epoch: int) -> tuple[tuple[float, ...], bool, float]:
        """MSL weights, whether in first order, and meta learning rate of an epoch."""
        config = self.config
        weights = msl_weights(config.inner_steps, epoch, (config.msl_epochs or 0) if config.msl else 0)
        first_order = config.first_order or (config.da and is_first_order(epoch, config.da_epochs or 0))
        meta_lr = config.meta_lr
        if config.ca:
            meta_lr = cosine_meta_lr(epoch, config.epochs, meta_lr, config.min_meta_lr or 0.0)
        return weights, first_order, meta_lr

    def measure(self, episodes: Episodes, epoch: int, *, measure_all: bool) -> Measured:
        """Losses and clipped meta-gradients; nothing moves yet."""
        weights, first_order, _ = self.schedule(epoch)
        measured = self.outer(
            self.net,
            self.state,
            episodes,
            inner_steps=self.config.inner_steps,
            msl_weights=weights,
            first_order=first_order,
            measure_all=measure_all,
        )
        self._clip(measured.grads)
        return measured

    def apply(self, measured: Measured, epoch: int) -> None:
        """Adam's step, and the running statistics'."""
        self.adam.param_groups[0]["lr"] = self.schedule(epoch)[2]
        for name, tensor in self.learnable.items():
            tensor.grad = measured.grads[name]
        self.adam.step()
        accumulate(self.state.running, measured.norm_passes)

    def _clip(self, grads: dict[str, Tensor]) -> None:
        if self.config.clip_value is not None:
            for name, grad in grads.items():
                if not name.startswith("rate."):  # the published code leaves the learnt rates alone
                    grad.clamp_(-self.config.clip_value, self.config.clip_value)
        if self.config.clip_norm is not None:
            norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
            scale = (self.config.clip_norm / (norm + 1e-12)).clamp(max=1.0)  # 1e-12: no division by 0
            for grad in grads.values():
                grad.mul_(scale)


def what_is_not_finite(measured: Measured) -> str | None:
    """The first loss or gradient that is NaN or infinite, in words, or None. Syncs with the device."""
    for step, loss in enumerate(measured.support_losses_I.tolist()):
        if not math.isfinite(loss):
            return f"the support loss after {step} inner steps is {loss}"
    for steps, loss in measured.query_losses.items():
        if not math.isfinite(value := loss.item()):
            return f"the query loss after {steps} inner steps is {value}"
    for name, grad in measured.grads.items():
        if not bool(grad.isfinite().all()):
            return f"the meta-gradient of {name} is not finite"
    return None
