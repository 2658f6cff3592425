"""Modules that predict from what a user has: images of whole numbers, or the rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mamlctl.data.tasks.table_tasks import Standardisation

WHITE = 255


class ImagePredictor(nn.Module):
    """The probabilities of the classes of images."""

    mean_C11: Tensor
    deviation_C11: Tensor

    def __init__(
        self, network: nn.Module, *, ink: int, mean: Sequence[float], deviation: Sequence[float]
    ) -> None:
        """Store what makes an image the input of the network.

        Args:
            network: from inputs to scores.
            ink: the value of ink in the inputs, 0 or 1.
            mean: of each channel, or of all; subtracted after the values are in 0..1.
            deviation: by which they are divided then.
        """
        super().__init__()
        self.network, self.ink = network, ink
        self.normalises = set(mean) != {0.0} or set(deviation) != {1.0}
        self.register_buffer("mean_C11", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("deviation_C11", torch.tensor(deviation)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the probabilities _MN of uint8 images _MCHW."""
        values_MCHW = images.to(torch.float32)
        if self.ink == 1:
            values_MCHW = WHITE - values_MCHW
        values_MCHW = values_MCHW / WHITE
        if self.normalises:
            values_MCHW = (values_MCHW - self.mean_C11) / self.deviation_C11
        probabilities_MN: Tensor = self.network(values_MCHW).softmax(1)
        return probabilities_MN


class TablePredictor(nn.Module):
    """The targets of rows, in the units of the table."""

    moments_2C: Tensor

    def __init__(self, network: nn.Module, values: Standardisation) -> None:
        """Store the statistics of the columns, inputs before targets."""
        super().__init__()
        self.network, self.width = network, len(values.inputs)
        moments = torch.tensor([values.mean, values.deviation], dtype=torch.float64)
        self.register_buffer("moments_2C", moments, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute the targets _MN of inputs _MD, both in float64; the network computes in float32."""
        mean_D, deviation_D = self.moments_2C[:, : self.width]
        mean_N, deviation_N = self.moments_2C[:, self.width :]
        outputs_MN = self.network(((inputs - mean_D) / deviation_D).to(torch.float32))
        targets_MN: Tensor = outputs_MN.to(torch.float64) * deviation_N + mean_N
        return targets_MN
