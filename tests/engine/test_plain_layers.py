"""Networks in torch's own layers, for export, compared in float64 with the networks that are trained."""

import pytest
import torch
from torch import nn

from mamlctl.engine.derivatives.autograd import Autograd
from mamlctl.engine.evaluation.adapted_model import AdaptedModel
from mamlctl.engine.evaluation.plain_module import plain_module
from mamlctl.engine.nets import factory
from mamlctl.engine.nets.base import CLASSIFICATION, REGRESSION, body_of
from mamlctl.engine.nets.batch_norm import NormPass, Statistics
from mamlctl.engine.nets.conv4 import Conv4
from mamlctl.engine.nets.mlp import Mlp
from mamlctl.engine.nets.module_net import ModuleNet, ModulePlan
from mamlctl.engine.nets.plain_layers import plain_layers
from mamlctl.engine.nets.resnet12 import ResNet12
from mamlctl.settings.schema import TrainConfig


class OwnNet(nn.Module):
    """A module with a batch norm that keeps no statistics, one that is used twice, and a name of ours."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.linear = nn.Conv2d(shape[0], 4, 3, 2)
        self.twice = nn.BatchNorm2d(4)
        self.unkept = nn.BatchNorm2d(4, track_running_stats=False)
        self.out = nn.Linear(4, outputs)

    def forward(self, x):
        h = torch.tanh(self.twice(self.linear(x)))
        return self.out(torch.relu(self.unkept(self.twice(h))).mean((2, 3)))


NETS = {
    "conv4": Conv4((3, 17, 17), 5, 4),
    "conv4 with stride, mean and relu": Conv4((1, 21, 21), 3, 4, None, "stride", "mean", "relu"),
    "mlp of images": Mlp((1, 6, 6), 5, (9, 8), CLASSIFICATION),
    "mlp of a table": Mlp((3,), 2, (9, 8), REGRESSION),
    "resnet12": ResNet12((3, 16, 16), 4, 4),
    "own module": ModuleNet(ModulePlan(OwnNet), (2, 9, 9), 3),
}


def drawn(net, adapted_norm, generator):
    """Weights of one task, batch-norm weights and statistics, all random and exact in float32."""

    def normal(shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).double()

    weights = net.init(torch.Generator().manual_seed(1), torch.float32)
    weights = {
        name: (weight + normal(weight.shape, 0.1)).float().double().unsqueeze(0)
        for name, weight in weights.items()
    }
    norm, statistics = {}, {}
    for name, channels in net.norm_layers.items():
        norm |= {f"{name}.weight": normal((1, channels)), f"{name}.bias": normal((1, channels))}
        statistics |= {
            f"{name}.mean": normal((1, channels)),
            f"{name}.var": normal((1, channels)).float().square().double(),
        }
    return (weights | norm, {}, statistics) if adapted_norm else (weights, norm, statistics)


def test_every_built_in_network_has_layers_of_torch():
    config = TrainConfig(net="conv4", hidden="8", filters=4)
    for make in factory.NETS.values():
        net = make(config, (1, 16, 16), 3, CLASSIFICATION)
        assert type(net) in map(type, NETS.values())
        assert plain_layers(net)(torch.zeros(2, 1, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize("adapted_norm", [False, True])
@pytest.mark.parametrize("name", list(NETS))
def test_a_network_in_layers_of_torch_has_the_same_scores(name, adapted_norm):
    net, generator = NETS[name], torch.Generator().manual_seed(0)
    weights, norm, statistics = drawn(net, adapted_norm, generator)
    shape = getattr(net, "image_shape", None) or net.input_shape
    x = torch.randn((5, *shape), generator=generator, dtype=torch.float64)
    f = torch.randn((4, *shape), generator=generator, dtype=torch.float64)
    model = AdaptedModel(Autograd(net), weights, norm, statistics, statistics)
    module = plain_module(model).double()
    with torch.no_grad():
        assert torch.allclose(module(x), model.scores(x), rtol=1e-9, atol=1e-9)
        if net.objective is REGRESSION:
            return
        y_E = torch.tensor([net.outputs - 1, *range(net.outputs)])[:, None]
        support = x[torch.arange(len(y_E)) % 5] + 0.1 * torch.arange(len(y_E)).view(-1, 1, 1, 1)
        features = Autograd(net).prepare(support[None], y_E.T)
        f_TEF = features.features(weights, NormPass(norm, statistics, 0, Statistics.RUNNING))
        nearest = AdaptedModel(Autograd(net), body_of(weights), norm, statistics, statistics, (f_TEF, y_E.T))
        assert torch.allclose(plain_module(nearest).double()(f), nearest.scores(f), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.norm_layers])
def test_without_fixed_statistics_those_of_the_support_set_are_used(name):
    net = NETS[name]
    weights, norm, statistics = drawn(net, False, torch.Generator().manual_seed(0))
    own, fixed = (AdaptedModel(Autograd(net), weights, norm, statistics, part) for part in ({}, statistics))
    states = [plain_module(model).state_dict() for model in (own, fixed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
