"""An adapted network as a module of torch's own layers, which predicts without mamlctl."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mamlctl.engine.evaluation.adapted_model import AdaptedModel, plain_weights
from mamlctl.engine.evaluation.prediction import class_distances
from mamlctl.engine.nets.base import HEAD
from mamlctl.engine.nets.module_net import ModuleNet
from mamlctl.engine.nets.plain_layers import plain_layers


class NearestHead(nn.Module):
    """The scores of `nearest`: minus the squared distance to the nearest support example of each class."""

    support_1MF: Tensor

    def __init__(self, f_MF: Tensor, y_M: Tensor, ways: int) -> None:
        """Sort the support examples by class.

        Args:
            f_MF: their features.
            y_M: their labels, of which every class has at least one.
            ways: the number of classes.
        """
        super().__init__()
        self.register_buffer("support_1MF", f_MF[y_M.argsort(stable=True)].unsqueeze(0))
        self.ends: list[int] = torch.bincount(y_M, minlength=ways).cumsum(0)[:-1].tolist()

    def forward(self, f_EF: Tensor) -> Tensor:
        """Compute the scores _EN of features."""
        distances_EM = class_distances(f_EF.unsqueeze(0), self.support_1MF)[0]
        by_class = torch.tensor_split(distances_EM, self.ends, dim=1)
        return -torch.stack([part.amin(1) for part in by_class], dim=1)


def plain_module(model: AdaptedModel) -> nn.Module:
    """Return the network of an adapted model as a module, from network inputs _E... to scores _EN.

    It is in float32 on the CPU. Batch norm has the fixed statistics, or those of the support set if there are
    none, so that each example is predicted independently.
    """
    net = model.derivatives.net
    module = plain_layers(net)
    path = net.template.head if isinstance(net, ModuleNet) else HEAD[0].rpartition(".")[0]
    if model.neighbours is None:
        module.load_state_dict(plain_weights(model))
    else:
        unused = module.get_submodule(path).state_dict()
        module.load_state_dict(plain_weights(model, {name: unused[name.rpartition(".")[2]] for name in HEAD}))
        f_MF, y_M = (part[0].cpu() for part in model.neighbours)
        module.set_submodule(path, NearestHead(f_MF.float(), y_M, net.outputs))
    if isinstance(net, ModuleNet):
        _fix_statistics(module, model, net)
    return module


def norms_without_statistics(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of batch norm, by path, that keep no running statistics: they would use those of a batch."""
    norm = nn.modules.batchnorm._BatchNorm
    layers = dict(module.named_modules())
    return {
        path: part for path, part in layers.items() if isinstance(part, norm) and part.running_mean is None
    }


def _fix_statistics(module: nn.Module, model: AdaptedModel, net: ModuleNet) -> None:
    """Give the layers without running statistics the fixed ones."""
    fixed = model.fixed or model.support
    for path, layer in norms_without_statistics(module).items():
        name = net.template.internal(path)
        layer.running_mean, layer.running_var = (
            fixed[f"{name}.{kind}"][0].float().cpu() for kind in ("mean", "var")
        )
