"""Modules that a user might write: Conv4 of torch's own layers, a transformer, an LSTM, and dropout."""

from torch import nn

from mamlctl.engine.nets.module_net import ModuleNet, ModulePlan

FILTERS = 4


def conv4(shape, outputs):
    """Conv4 of torch's own layers, with the names of mamlctl's."""
    net, channels = nn.Sequential(), shape[0]
    for block in range(1, 5):
        net.add_module(f"conv{block}", nn.Conv2d(channels, FILTERS, 3, padding=1, bias=False))
        net.add_module(f"norm{block}", nn.BatchNorm2d(FILTERS))
        net.add_module(f"act{block}", nn.LeakyReLU(0.01))
        net.add_module(f"pool{block}", nn.MaxPool2d(2))
        channels = FILTERS
    net.add_module("flat", nn.Flatten())
    net.add_module("linear", nn.Linear(FILTERS * (shape[1] // 16) * (shape[2] // 16), outputs))
    return net


class Attention(nn.Module):
    """One transformer block on the rows of an image, with attention as plain matrix products."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.embed, self.norm = nn.Linear(shape[2], 8), nn.LayerNorm(8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, outputs)

    def forward(self, x):
        rows = self.embed(x.flatten(1, 2))
        h = self.norm(rows)
        scores = self.query(h) @ self.key(h).transpose(1, 2) / 8**0.5
        return self.head((rows + scores.softmax(-1) @ self.value(h)).mean(1))


class Encoder(nn.Module):
    """torch's own transformer, whose attention would use a fused kernel."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.embed = nn.Linear(shape[2], 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=True)
        self.head = nn.Linear(4, outputs)

    def forward(self, x):
        return self.head(self.layer(self.embed(x.flatten(1, 2))).mean(1))


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.lstm, self.out = nn.LSTM(shape[2], 6, batch_first=True), nn.Linear(6, outputs)

    def forward(self, x):
        return self.out(self.lstm(x.flatten(1, 2))[0][:, -1])


class Dropped(nn.Module):
    """A convolution, dropout as a function and as a layer, and a head."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(shape[0], 3, 3), nn.BatchNorm2d(3)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(3 * (shape[1] - 2) * (shape[2] - 2), outputs)

    def forward(self, x):
        x = nn.functional.dropout(self.norm(self.conv(x)), 0.3, self.training)
        return self.fc(self.drop(x.tanh().flatten(1)))


def module_net(make, shape, outputs, **plan):
    """The network of a function that makes a module."""
    return ModuleNet(ModulePlan(make, **plan), shape, outputs)
