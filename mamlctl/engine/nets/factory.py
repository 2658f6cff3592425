"""Build the network that --net names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from mamlctl.core.literals import Metric
from mamlctl.data.sets.registry import has_rewards
from mamlctl.engine.devices import COMPUTE
from mamlctl.engine.nets.base import REGRESSION, Net, Objective
from mamlctl.engine.nets.conv4 import Conv4
from mamlctl.engine.nets.losses import OwnLoss, objective_with
from mamlctl.engine.nets.mlp import HIDDEN, GaussianPolicy, Mlp
from mamlctl.engine.nets.module_net import ModuleNet, ModulePlan
from mamlctl.engine.nets.resnet12 import ResNet12
from mamlctl.settings.schema import TrainConfig


@dataclass(frozen=True)
class Parts:
    """The parts of a network that are not built in."""

    module: ModulePlan | None = None  # of --net
    loss: OwnLoss | None = None  # of --loss


BUILT_IN = Parts()


def _conv4(config: TrainConfig, shape: Sequence[int], outputs: int, objective: Objective) -> Net:
    channels, height, width = shape
    return Conv4(
        (channels, height, width),
        outputs,
        config.filters,
        COMPUTE.get(config.precision),
        config.pooling or "max",
        config.readout or "flatten",
        config.activation or "leaky_relu",
        config.conv,
        objective,
    )


def _mlp(config: TrainConfig, shape: Sequence[int], outputs: int, objective: Objective) -> Net:
    widths = _widths(config, objective.metric)
    return Mlp(tuple(shape), outputs, widths, objective, config.activation or "relu")


def _widths(config: TrainConfig, metric: Metric) -> tuple[int, ...]:
    return tuple(map(int, (config.hidden or HIDDEN[metric]).split("-")))


def _resnet12(config: TrainConfig, shape: Sequence[int], outputs: int, objective: Objective) -> Net:
    channels, height, width = shape
    compute = COMPUTE.get(config.precision)
    return ResNet12((channels, height, width), outputs, config.filters, compute, objective)


NETS: dict[str, Callable[[TrainConfig, Sequence[int], int, Objective], Net]] = {
    "conv4": _conv4,
    "mlp": _mlp,
    "resnet12": _resnet12,
}


def make_net(config: TrainConfig, shape: Sequence[int], outputs: int, parts: Parts = BUILT_IN) -> Net:
    """Build the network of the settings.

    Args:
        config: the settings.
        shape: C, H, W of images, or D of points.
        outputs: the number of outputs.
        parts: those that the settings name and that are not built in.
    """
    if has_rewards(config):
        widths = _widths(config, "return")
        return GaussianPolicy(Mlp(tuple(shape), outputs, widths, REGRESSION, config.activation or "relu"))
    objective = objective_with(shape, config.loss, parts.loss, config.task_type)
    if config.net in NETS:
        return NETS[config.net](config, shape, outputs, objective)
    assert parts.module is not None, f"--net {config.net} needs the plan of its module"
    return ModuleNet(parts.module, tuple(shape), outputs, objective, config.head)


def torchvision_net(name: str, shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Build one of torchvision's classifiers with random weights; grey images become three equal channels.

    Args:
        name: torchvision's name.
        shape: C, H, W of the images.
        outputs: the number of classes.
    """
    from torchvision.models import get_model  # imported here, since it takes half a second

    net: nn.Module = get_model(name, weights=None, num_classes=outputs)
    if shape[0] == 1:
        net.register_forward_pre_hook(_in_colour)
    return net


def torchvision_plan(name: str) -> ModulePlan:
    """The plan of one of torchvision's classifiers, before it is checked."""
    return ModulePlan(partial(torchvision_net, name))


def _in_colour(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0].expand(-1, 3, -1, -1)
