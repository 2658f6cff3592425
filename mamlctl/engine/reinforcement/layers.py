"""The mean of a task's policy in many states, and its derivatives with respect to the weights.

A layer is z_l = W_l a_{l-1} + b_l, where a_0 is the state, a_l = s_l z_l, and the mean is the last z. Small
changes of the weights do not change the slopes s_l of the activation. With C_l the derivative of the mean
with respect to z_l, changes U_l of W_l and u_l of b_l change the mean by

    sum over l of  C_l (U_l a_{l-1} + u_l)

and derivatives c with respect to the mean become (C_l^T c) a_{l-1}^T for W_l. All C_l are computed once, so
that each of these products takes as many multiplications as a pass through the network.

The second derivative of <c, mean> couples different layers only. With two hidden layers, <c, mean> is,
without the later biases, the sum of W_3[a, o] W_2[o, i] W_1[i, d] R[a, d, i, o], where R[a, d, i, o] is the
sum over states of c_a x_d s_1[i] s_2[o], and the bias of the first layer is a weight of x_d = 1. R is
computed once, too, and has few entries, so that its products take little time.

Shapes: E states, A numbers of an action, D coordinates of a state, I and O units before and after W_2.
States are the last axis, as sums over few rows are faster than sums over few columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mamlctl.engine.nets.base import SLOPES
from mamlctl.engine.nets.batch_norm import Params
from mamlctl.engine.nets.mlp import Mlp


@dataclass(frozen=True)
class Layers:
    """A network's pass over the states of a task, and products with its derivatives."""

    names: Sequence[str]
    weights: Mapping[str, Tensor]
    inputs: Sequence[Tensor]  # a_{l-1} of every layer, units x E
    slopes: Sequence[Tensor]  # s_l of the hidden layers, units x E
    mean_AE: Tensor

    @classmethod
    def of(cls, net: Mlp, weights: Mapping[str, Tensor], x_DE: Tensor) -> Layers:
        """Pass states through a network.

        Args:
            net: computes the mean.
            weights: of one task.
            x_DE: the states.
        """
        names = [*(f"hidden{layer}" for layer in range(1, len(net.hidden) + 1)), "linear"]
        inputs, slopes = [x_DE], []
        for name in names[:-1]:
            z = _linear(weights, name, inputs[-1])
            slope = torch.empty_like(z)
            torch.gt(z, 0, out=slope)  # 1 where it is true, else 0
            if leak := SLOPES[net.activation]:
                slope.clamp_(min=leak)
            slopes.append(slope)
            inputs.append(z.mul_(slope))
        return cls(names, weights, inputs, slopes, _linear(weights, "linear", inputs[-1]))

    def weight(self, layer: int) -> Tensor:
        """W_l."""
        return self.weights[f"{self.names[layer]}.weight"]

    def change(self, layer: int, tangent: Mapping[str, Tensor]) -> Tensor:
        """U_l a_{l-1} + u_l."""
        return _linear(tangent, self.names[layer], self.inputs[layer])

    def gradient(self, c_AE: Tensor) -> Params:
        """The same as `pull` by backpropagation, which is faster for a single c."""
        grads: Params = {}
        of_z = c_AE
        for layer in range(len(self.names) - 1, -1, -1):
            grads |= self._grads(layer, of_z)
            if layer:
                of_z = (self.weight(layer).T @ of_z).mul_(self.slopes[layer - 1])
        return grads

    def changes(self, tangent: Mapping[str, Tensor]) -> list[Tensor]:
        """The changes of a_1, a_2, ... and of the mean with the weights, layer by layer."""
        changes = [self.change(0, tangent)]
        for layer, slope in enumerate(self.slopes, 1):
            below = changes[-1].mul_(slope)
            changes.append(self.change(layer, tangent).addmm_(self.weight(layer), below))
        return changes

    def gradient_change(
        self, c_AE: Tensor, c_change_AE: Tensor, changes: Sequence[Tensor], tangent: Mapping[str, Tensor]
    ) -> Params:
        """The change of `gradient` with the weights and with c.

        Args:
            c_AE: the derivatives with respect to the mean.
            c_change_AE: their change.
            changes: those of `changes`.
            tangent: the change of the weights.
        """
        grads: Params = {}
        of_z, of_z_change = c_AE, c_change_AE
        for layer in range(len(self.names) - 1, -1, -1):
            grads |= self._grads(layer, of_z_change)
            if layer:
                name, slope = f"{self.names[layer]}.weight", self.slopes[layer - 1]
                grads[name].addmm_(of_z, changes[layer - 1].T)
                of_z_change = (self.weight(layer).T @ of_z_change).addmm_(tangent[name].T, of_z).mul_(slope)
                of_z = (self.weight(layer).T @ of_z).mul_(slope)
        return grads

    def push(self, tangent: Mapping[str, Tensor]) -> Tensor:
        """The change of the mean with the weights -> _AE."""
        last = len(self.slopes)
        mean_AE = self.change(last, tangent)
        if last:
            mean_AE.addmm_(self.weight(last), self.slopes[-1] * self.change(last - 1, tangent))
        for layer, of_mean in enumerate(self._of_mean):
            change = self.change(layer, tangent)
            for row, part in zip(mean_AE, of_mean, strict=True):
                row += (part * change).sum(0)
        return mean_AE

    def pull(self, c_AE: Tensor) -> Params:
        """The derivatives with respect to the weights, from those with respect to the mean."""
        last = len(self.slopes)
        grads = self._grads(last, c_AE)
        if last:
            grads |= self._grads(last - 1, self.slopes[-1] * (self.weight(last).T @ c_AE))
        for layer, of_mean in enumerate(self._of_mean):
            of_z = of_mean[0] * c_AE[0]
            for row, part in zip(c_AE[1:], of_mean[1:], strict=True):
                of_z.addcmul_(part, row)
            grads |= self._grads(layer, of_z)
        return grads

    def _grads(self, layer: int, of_z: Tensor) -> Params:
        name = self.names[layer]
        return {f"{name}.weight": of_z @ self.inputs[layer].T, f"{name}.bias": of_z.sum(1)}

    @cached_property
    def _of_mean(self) -> list[Tensor]:
        """C_l of the layers before the last two, A x units x E; the last ones are s W and the identity."""
        if len(self.slopes) < 2:
            return []
        of_mean = [self.weight(len(self.slopes)).unsqueeze(-1) * self.slopes[-1]]
        for layer in range(len(self.slopes) - 1, 0, -1):
            of_mean.insert(0, (self.weight(layer).T @ of_mean[0]).mul_(self.slopes[layer - 1]))
        return of_mean[:-1]


@dataclass(frozen=True)
class Trilinear:
    """The second derivative of <c, mean> for two hidden layers, from sums over states."""

    w_IO: Tensor  # W_2, transposed
    w_AO: Tensor  # W_3
    r_ADIO: Tensor  # R
    r_AIO: Tensor  # R times W_1
    r_AO: Tensor  # the sum over states of c_a s_2[o], for the bias of the second layer

    @classmethod
    def of(cls, layers: Layers, c_AE: Tensor) -> Trilinear:
        """Sum over states."""
        x_DE, (s_IE, s_OE) = layers.inputs[0], layers.slopes
        x_DE = torch.cat([x_DE, torch.ones_like(x_DE[:1])])
        r_ADIO = ((c_AE.unsqueeze(1) * x_DE).unsqueeze(2) * s_IE) @ s_OE.T
        r_AIO = _with_first_layer(r_ADIO, layers.weights)
        return cls(layers.weight(1).T, layers.weight(2), r_ADIO, r_AIO, c_AE @ s_OE.T)

    def product(self, tangent: Mapping[str, Tensor]) -> Params:
        """The second derivative times a tangent."""
        u_IO, u_AO = tangent["hidden2.weight"].T, tangent["linear.weight"]
        r_AIO = _with_first_layer(self.r_ADIO, tangent)
        above_AIO = u_AO.unsqueeze(1) * self.w_IO + self.w_AO.unsqueeze(1) * u_IO
        first_DI = (self.r_ADIO * above_AIO.unsqueeze(1)).sum((0, 3))
        second_IO = (u_AO.unsqueeze(1) * self.r_AIO + self.w_AO.unsqueeze(1) * r_AIO).sum(0)
        last_AO = (u_IO * self.r_AIO + self.w_IO * r_AIO).sum(1)
        return {
            "hidden1.weight": first_DI[:-1].T,
            "hidden1.bias": first_DI[-1],
            "hidden2.weight": second_IO.T,
            "hidden2.bias": (u_AO * self.r_AO).sum(0),
            "linear.weight": last_AO + tangent["hidden2.bias"] * self.r_AO,
            "linear.bias": torch.zeros_like(tangent["linear.bias"]),
        }


def _with_first_layer(r_ADIO: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    w_DI = torch.cat([weights["hidden1.weight"].T, weights["hidden1.bias"].unsqueeze(0)])
    return (r_ADIO * w_DI.unsqueeze(-1)).sum(1)


def _linear(weights: Mapping[str, Tensor], name: str, inputs: Tensor) -> Tensor:
    return torch.addmm(weights[f"{name}.bias"].unsqueeze(1), weights[f"{name}.weight"], inputs)
