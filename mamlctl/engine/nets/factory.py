"""Build the network that --net names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mamlctl.engine.devices import COMPUTE
from mamlctl.engine.nets.base import CLASSIFICATION, REGRESSION, Net
from mamlctl.engine.nets.conv4 import Conv4
from mamlctl.engine.nets.mlp import HIDDEN, Mlp
from mamlctl.engine.nets.resnet12 import ResNet12
from mamlctl.settings.schema import TrainConfig


def _conv4(config: TrainConfig, shape: Sequence[int], outputs: int) -> Net:
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
    )


def _mlp(config: TrainConfig, shape: Sequence[int], outputs: int) -> Net:
    objective = REGRESSION if len(shape) == 1 else CLASSIFICATION
    widths = (config.hidden or HIDDEN[objective.metric]).split("-")
    return Mlp(tuple(shape), outputs, tuple(map(int, widths)), objective, config.activation or "relu")


def _resnet12(config: TrainConfig, shape: Sequence[int], outputs: int) -> Net:
    channels, height, width = shape
    return ResNet12((channels, height, width), outputs, config.filters, COMPUTE.get(config.precision))


NETS: dict[str, Callable[[TrainConfig, Sequence[int], int], Net]] = {
    "conv4": _conv4,
    "mlp": _mlp,
    "resnet12": _resnet12,
}
