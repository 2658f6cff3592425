"""MAML in other libraries, with the work of a second-order meta-step and equal multi-step weights.

All peers use the same torch.nn network. Its norms have no weights, because the libraries would adapt these in
the inner loop; in mamlctl they are learned per inner step, as are the inner rates.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case
from mamlctl.data.tasks.episodes import Episodes

META_LR = 0.001


class ComposedNorm(nn.Module):
    """Batch norm from basic operations: the native one has wrong second derivatives under vmap."""

    def forward(self, x_ECHW: Tensor) -> Tensor:
        var, mean = torch.var_mean(x_ECHW, dim=(0, 2, 3), correction=0, keepdim=True)
        return (x_ECHW - mean) * (var + 1e-5).rsqrt()  # torch.nn.BatchNorm2d's own eps


def conv4(case: Case, *, composed_norm: bool = False) -> nn.Sequential:
    """Build the engine's network from torch.nn modules."""
    layers: list[nn.Module] = []
    channels, height, width = case.image
    for _ in range(4):
        native = nn.BatchNorm2d(case.filters, affine=False, track_running_stats=False)
        layers += [
            nn.Conv2d(channels, case.filters, 3, padding=1, bias=False),
            ComposedNorm() if composed_norm else native,
            nn.LeakyReLU(0.01),
            nn.MaxPool2d(2),
        ]
        channels = case.filters
    features = case.filters * (height >> 4) * (width >> 4)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, case.ways))


class Peer:
    """A network, its outer Adam, and one library's way to compute the meta-gradient."""

    composed_norm = False

    def __init__(self, case: Case, slow: Mapping[str, Tensor], inner_lr: float) -> None:
        """Start from `slow`, the engine's weights in the order of the network's parameters."""
        self.case, self.inner_lr = case, inner_lr
        like = next(iter(slow.values()))
        self.module = conv4(case, composed_norm=self.composed_norm).to(like.device, like.dtype)
        self.load(slow)
        self.adam = torch.optim.Adam(self.module.parameters(), lr=META_LR)

    def load(self, slow: Mapping[str, Tensor]) -> None:
        """Copy the engine's weights."""
        self.names = list(slow)
        with torch.no_grad():
            for parameter, weight in zip(self.module.parameters(), slow.values(), strict=True):
                parameter.copy_(weight)

    def meta_step(self, episodes: Episodes) -> Tensor:
        """Compute the meta-gradient and apply Adam; return the meta-loss."""
        self.adam.zero_grad()
        loss = self.backward(episodes)
        self.adam.step()
        return loss

    def meta_grads(self) -> dict[str, Tensor]:
        """Return the meta-gradients of the latest meta-step by the engine's names."""
        found = {}
        for name, parameter in zip(self.names, self.module.parameters(), strict=True):
            assert parameter.grad is not None, name
            found[name] = parameter.grad
        return found

    def backward(self, episodes: Episodes) -> Tensor:
        """Fill `.grad` of the weights and return the meta-loss."""
        raise NotImplementedError


def tasks_of(episodes: Episodes) -> list[tuple[Tensor, ...]]:
    """Return support images, support labels, query images and query labels for each task."""
    return list(zip(*episodes.sets, strict=True))


class Higher(Peer):
    """facebookresearch/higher, with its documented loop (examples/maml-omniglot.py)."""

    def __init__(self, case: Case, slow: Mapping[str, Tensor], inner_lr: float) -> None:
        super().__init__(case, slow, inner_lr)
        self.higher: Any = importlib.import_module("higher")
        self.inner = torch.optim.SGD(self.module.parameters(), lr=inner_lr)

    def backward(self, episodes: Episodes) -> Tensor:
        steps, total = self.case.inner_steps, torch.zeros(())
        for support_x, support_y, query_x, query_y in tasks_of(episodes):
            with self.higher.innerloop_ctx(self.module, self.inner, copy_initial_weights=False) as (
                net,
                diffopt,
            ):
                loss: Tensor = query_x.new_zeros(())
                for _ in range(steps):
                    diffopt.step(F.cross_entropy(net(support_x), support_y))
                    loss = loss + F.cross_entropy(net(query_x), query_y) / (steps * self.case.tasks)
                loss.backward()  # type: ignore[no-untyped-call]
            total = total.to(loss.device) + loss.detach()
        return total


class Torchopt(Peer):
    """metaopt/torchopt, with its documented loop (examples/few-shot/maml_omniglot.py), one backward pass."""

    def __init__(self, case: Case, slow: Mapping[str, Tensor], inner_lr: float) -> None:
        super().__init__(case, slow, inner_lr)
        self.torchopt: Any = importlib.import_module("torchopt")
        self.inner = self.torchopt.MetaSGD(self.module, lr=inner_lr)

    def backward(self, episodes: Episodes) -> Tensor:
        losses = []
        net_state = self.torchopt.extract_state_dict(self.module, by="reference", detach_buffers=True)
        inner_state = self.torchopt.extract_state_dict(self.inner, by="reference")
        for support_x, support_y, query_x, query_y in tasks_of(episodes):
            for _ in range(self.case.inner_steps):
                self.inner.step(F.cross_entropy(self.module(support_x), support_y))
                losses.append(F.cross_entropy(self.module(query_x), query_y))
            self.torchopt.recover_state_dict(self.module, net_state)
            self.torchopt.recover_state_dict(self.inner, inner_state)
        loss = torch.stack(losses).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


class TorchFunc(Peer):
    """torch.func: inner and outer gradients of one task's loss as a function, vectorised by vmap."""

    composed_norm = True

    def backward(self, episodes: Episodes) -> Tensor:
        weights = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
        grads, loss = torch.func.grad_and_value(self._meta_loss)(weights, *episodes.sets)
        for name, parameter in self.module.named_parameters():
            parameter.grad = grads[name]
        meta_loss: Tensor = loss
        return meta_loss

    def _meta_loss(self, weights: dict[str, Tensor], *sets: Tensor) -> Tensor:
        loss_T: Tensor = torch.func.vmap(self._task_loss, in_dims=(None, 0, 0, 0, 0))(weights, *sets)
        return loss_T.mean()

    def _task_loss(
        self, fast: dict[str, Tensor], support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> Tensor:
        loss = query_x.new_zeros(())
        for _ in range(self.case.inner_steps):
            grads = torch.func.grad(self._loss)(fast, support_x, support_y)
            fast = {name: weight - self.inner_lr * grads[name] for name, weight in fast.items()}
            loss = loss + self._loss(fast, query_x, query_y) / self.case.inner_steps
        return loss

    def _loss(self, fast: dict[str, Tensor], x_ECHW: Tensor, y_E: Tensor) -> Tensor:
        logits_EN: Tensor = torch.func.functional_call(self.module, fast, (x_ECHW,))
        return F.cross_entropy(logits_EN, y_E)


PEERS: dict[str, type[Peer]] = {"higher": Higher, "torchopt": Torchopt, "torch.func": TorchFunc}
