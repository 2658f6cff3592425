"""Modules that cannot work are refused, with the layer's name."""

import itertools

import pytest
import torch
from helpers.module_cases import conv4, module_net
from helpers.own_code import Once
from torch import nn

from mamlctl.core.errors import SettingsError
from mamlctl.engine.nets.base import REGRESSION
from mamlctl.engine.nets.module_net import ModuleNet, ModulePlan
from mamlctl.engine.training.module_check import checked

SHAPE = (1, 4, 5)


class Base(nn.Module):
    """A body, and a head called fc."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.body = nn.Linear(20, 6)
        self.fc = nn.Linear(6, outputs)

    def forward(self, x):
        return self.fc(self.body(x.flatten(1)).tanh())


class OnceLayer(nn.Module):
    def forward(self, x):
        return Once.apply(x)


class NotTwice(Base):
    def __init__(self, shape, outputs):
        super().__init__(shape, outputs)
        self.square = OnceLayer()
        self.fc = nn.Linear(6, outputs)

    def forward(self, x):
        return self.fc(self.square(self.body(x.flatten(1))))


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class WithState(Base):
    def __init__(self, shape, outputs):
        super().__init__(shape, outputs)
        self.counter = Counter()
        self.fc = nn.Linear(6, outputs)

    def forward(self, x):
        return self.fc(self.counter(self.body(x.flatten(1))))


class Buffered(Base):
    def __init__(self, shape, outputs):
        super().__init__(shape, outputs)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return super().forward(x)


class Noise(Base):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.1))


class Softmax(Base):
    def forward(self, x):
        return super().forward(x).log_softmax(1)


class Unused(Base):
    def __init__(self, shape, outputs):
        super().__init__(shape, outputs)
        self.extra = nn.Conv1d(2, 2, 1)


class UnusedNorm(Unused):
    def __init__(self, shape, outputs):
        super().__init__(shape, outputs)
        self.extra = nn.BatchNorm1d(2)


class Flat(Base):
    def forward(self, x):
        return super().forward(x).flatten()


class Pair(Base):
    def forward(self, x):
        return super().forward(x), x


class Fails(Base):
    def forward(self, x):
        return self.fc(x)


class NoBias(Base):
    def __init__(self, shape, outputs):
        super().__init__(shape, outputs)
        self.fc = nn.Linear(6, outputs, bias=False)


def with_layer(layer):
    """A function that makes the base with another layer in front of its head."""

    def make(shape, outputs):
        net = Base(shape, outputs)
        net.body = nn.Sequential(nn.Linear(20, 6), layer)
        return net

    return make


class TiedHead(Base):
    def __init__(self, shape, outputs):
        super().__init__(shape, outputs)
        self.body = nn.Sequential(nn.Linear(20, 6), nn.Linear(6, outputs), nn.Linear(outputs, 6))
        self.fc = nn.Linear(6, outputs)
        self.fc.weight = self.body[1].weight


def frozen(shape, outputs):
    net = Base(shape, outputs)
    net.body.requires_grad_(False)
    return net


class TrainingCounter(Counter):
    def forward(self, x):
        return super().forward(x) if self.training else x


class TrainingBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += self.training
        return x


def dropped(layer):
    """A function that makes the base with dropout and another layer in front of its head."""

    def make(shape, outputs):
        net = Base(shape, outputs)
        net.body = nn.Sequential(nn.Linear(20, 6), nn.Dropout(0.5), layer())
        return net

    return make


class OwnNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * 2


KEPT = Base(SHAPE, 3)


def spectral(shape, outputs):
    net = Base(shape, outputs)
    net.fc = nn.utils.parametrizations.spectral_norm(net.fc)
    return net


class Backwards(torch.autograd.Function):
    """The identity, whose backward pass has a mistake."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad[{}]


class FailsBackwards(Base):
    def forward(self, x):
        return super().forward(Backwards.apply(x) + Backwards.apply(self.body.bias).sum())


CALLS = itertools.count()


def differs(shape, outputs):
    """Weights that torch's seed does not decide."""
    net = Base(shape, outputs)
    net.body.bias.data[0] = next(CALLS)
    return net


REFUSED = {
    "'square' (OnceLayer) has no second derivative": NotTwice,
    "'counter' (Counter) gives other outputs when it is called again": WithState,
    "the module itself (Buffered) changes its buffers": Buffered,
    "the module itself (Noise) draws random numbers in evaluation too": Noise,
    "its outputs are not those of its head 'fc'": Softmax,
    "do not depend on its parameter 'extra.weight'": Unused,
    "'extra' is not used in a pass": UnusedNorm,
    r"shape (12,), not (4, 3)": Flat,
    "returns a tuple": Pair,
    "mat1 and mat2 shapes": Fails,
    "'fc' has no bias": NoBias,
    "has no linear layer": lambda shape, outputs: nn.Sequential(nn.Flatten(), nn.Tanh()),
    "returned a int, not a torch.nn.Module": lambda shape, outputs: 3,
    "'body.1' (BatchNorm1d) has no weights": with_layer(nn.BatchNorm1d(6, affine=False)),
    "'body.1' (LazyLinear) does not know its size": with_layer(nn.LazyLinear(6)),
    "'body.1' (InstanceNorm1d) keeps running": with_layer(nn.InstanceNorm1d(6, track_running_stats=True)),
    "its head 'fc' shares its weights": TiedHead,
    "its parameter 'body.weight' has requires_grad=False": frozen,
    "'body.bias' gets other initial weights": differs,
    "'body.weight' is the same tensor when the module is made again": lambda shape, outputs: KEPT,
    "'body.2' (TrainingCounter) gives other outputs when it is called again": dropped(TrainingCounter),
    "'body.2' (TrainingBuffer) changes its buffers": dropped(TrainingBuffer),
    "'body.1' (OwnNorm) is batch norm with a forward of its own": with_layer(OwnNorm(6)),
    "its head 'fc' computes its weights": spectral,
    "in backward: IndexError": FailsBackwards,
}


@pytest.mark.parametrize("words", list(REFUSED))
def test_a_module_that_cannot_work_is_refused_by_name(words):
    with pytest.raises(SettingsError) as raised:
        checked(module_net(REFUSED[words], SHAPE, 3))
    assert words in raised.value.message
    assert raised.value.hint


def test_another_layer_can_be_the_head():
    plan, _ = checked(ModuleNet(ModulePlan(Base), SHAPE, 3, head="fc"))
    assert plan.one_pass
    for name, words in (("body", "its outputs are not those of its head 'body'"), ("fd", "'fd' is no layer")):
        with pytest.raises(SettingsError, match=words):
            checked(ModuleNet(ModulePlan(Base), SHAPE, 3, head=name))


def test_the_head_may_be_called_with_a_named_input():
    class Named(Base):
        def forward(self, x):
            return self.fc(input=self.body(x.flatten(1)).tanh())

    assert checked(module_net(Named, SHAPE, 3))[0].one_pass


def test_a_network_of_curves_has_one_output():
    def make(shape, outputs):
        return nn.Sequential(nn.Linear(shape[0], 8), nn.Tanh(), nn.Linear(8, outputs))

    plan, why = checked(ModuleNet(ModulePlan(make), (1,), 1, REGRESSION))
    assert plan.one_pass and not why


def test_constants_of_a_module_follow_the_dtype_of_its_inputs():
    class Zeros(Base):
        def forward(self, x):
            return super().forward(x @ torch.eye(x.shape[-1]))

    assert checked(module_net(Zeros, SHAPE, 3))[0].one_pass


def test_a_difference_under_vmap_chooses_the_loop():
    class Batched(Base):
        def forward(self, x):
            if torch._C._functorch.is_batchedtensor(x):
                x = x * 1.001
            return super().forward(x)

    plan, why = checked(module_net(Batched, SHAPE, 3))
    assert not plan.one_pass and why == "its meta-gradient under vmap differs"


def test_conv4_is_computed_in_one_pass():
    assert checked(module_net(conv4, (1, 16, 16), 3)) == (ModulePlan(conv4), "")
