"""The built-in networks in torch's own layers, under the names of their tensors, for export."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from mamlctl.core.literals import Activation
from mamlctl.engine.nets.base import SLOPES, Net
from mamlctl.engine.nets.conv4 import Conv4
from mamlctl.engine.nets.mlp import Mlp
from mamlctl.engine.nets.module_net import ModuleNet
from mamlctl.engine.nets.resnet12 import GROWTH, LEAK, ResNet12


def plain_layers(net: Net) -> nn.Module:
    """Build the network of one task as a module in evaluation mode, from examples _E... to outputs _EN.

    The keys of its state dictionary are the names of the network's tensors, with "running_mean" and
    "running_var" for the statistics of batch norm. The weights are not those of any run. A network that is
    not built in is the user's own module.
    """
    match net:
        case ModuleNet():
            module = net.original(0)
        case Conv4():
            module = _conv4(net)
        case Mlp():
            module = _mlp(net)
        case ResNet12():
            module = _PlainResNet12(net)
        case _:
            raise NotImplementedError(type(net).__name__)
    return module.float().eval()


def _activation(name: Activation) -> nn.Module:
    slope = SLOPES[name]
    return nn.LeakyReLU(slope) if slope else nn.ReLU()


def _conv4(net: Conv4) -> nn.Module:
    channels, stride = net.image_shape[0], 2 if net.pooling == "stride" else 1
    module = nn.Sequential()
    for block in range(1, net.blocks + 1):
        conv = nn.Conv2d(channels, net.filters, 3, stride=stride, padding=1, bias=False)
        module.add_module(f"conv{block}", conv)
        module.add_module(f"norm{block}", nn.BatchNorm2d(net.filters))
        module.add_module(f"act{block}", _activation(net.activation))
        if stride == 1:
            module.add_module(f"pool{block}", nn.MaxPool2d(2))
        channels = net.filters
    features = net.filters
    if net.readout == "mean":
        module.add_module("mean", nn.AdaptiveAvgPool2d(1))
    else:
        features = math.prod(net.features_shape)
    module.add_module("flat", nn.Flatten())
    module.add_module("linear", nn.Linear(features, net.outputs))
    return module


def _mlp(net: Mlp) -> nn.Module:
    module, inputs = nn.Sequential(), math.prod(net.input_shape)
    module.add_module("flat", nn.Flatten())
    for layer, width in enumerate(net.hidden, 1):
        module.add_module(f"hidden{layer}", nn.Linear(inputs, width, bias=not net.normed))
        if net.normed:
            module.add_module(f"norm{layer}", nn.BatchNorm1d(width))
        module.add_module(f"act{layer}", _activation(net.activation))
        inputs = width
    module.add_module("linear", nn.Linear(inputs, net.outputs))
    return module


class _PlainResNet12(nn.Module):
    def __init__(self, net: ResNet12) -> None:
        super().__init__()
        inputs = net.image_shape[0]
        for block, growth in enumerate(GROWTH, 1):
            width = int(net.filters * growth)
            convolutions = {
                "1": nn.Conv2d(inputs, width, 3, padding=1, bias=False),
                "2": nn.Conv2d(width, width, 3, padding=1, bias=False),
                "3": nn.Conv2d(width, width, 3, padding=1, bias=False),
                "skip": nn.Conv2d(inputs, width, 1, bias=False),
            }
            self.add_module(f"conv{block}", nn.ModuleDict(convolutions))
            norms = {name: nn.BatchNorm2d(width) for name in convolutions}
            self.add_module(f"norm{block}", nn.ModuleDict(norms))
            inputs = width
        self.linear = nn.Linear(inputs, net.outputs)

    def _normed(self, name: str, x_ECHW: Tensor) -> Tensor:
        normed: Tensor = self.get_submodule(f"norm{name}")(self.get_submodule(f"conv{name}")(x_ECHW))
        return normed

    def forward(self, x_ECHW: Tensor) -> Tensor:
        for block in range(1, len(GROWTH) + 1):
            inner = x_ECHW
            for layer in (1, 2):
                inner = functional.leaky_relu(self._normed(f"{block}.{layer}", inner), LEAK)
            both = self._normed(f"{block}.3", inner) + self._normed(f"{block}.skip", x_ECHW)
            x_ECHW = functional.max_pool2d(functional.leaky_relu(both, LEAK), 2)
        outputs: Tensor = self.linear(x_ECHW.mean((2, 3)))
        return outputs
