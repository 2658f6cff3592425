"""A user's module compared with mamlctl's own networks and with central differences."""

from dataclasses import replace

import pytest
import torch
from helpers.derivative_cases import CPU, IMAGES, assert_equal_measurements, measured_by, prepared
from helpers.engine_cases import small_config
from helpers.module_cases import FILTERS, Attention, Dropped, Encoder, Recurrent, conv4, module_net
from torch import nn

from mamlctl.core.literals import TORCHVISION_NETS
from mamlctl.data.tasks.episodes import Keyed
from mamlctl.engine.algorithms.adjoint import adjoint
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, unrolled
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.derivatives.autograd import Autograd
from mamlctl.engine.evaluation.adapted_model import adapt_to_support_set, plain_weights
from mamlctl.engine.inner_loop import InnerRule
from mamlctl.engine.nets.batch_norm import NormPass, Statistics
from mamlctl.engine.nets.factory import Parts, torchvision_net, torchvision_plan
from mamlctl.engine.nets.module_net import ModulePlan
from mamlctl.engine.nets.module_template import _head_of
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep
from mamlctl.engine.training.module_check import checked, learner

CASES = [
    {"algo": "maml"},
    {"algo": "maml", "bnwb": True},
    {"algo": "maml", "bnrs": True},
    {"algo": "maml", "lslr": True},
    {"algo": "maml", "msl": True},
    {"algo": "maml++"},
]


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("outer", [unrolled, adjoint])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("settings", CASES, ids=lambda case: " ".join(case))
def test_a_module_has_the_meta_gradient_of_the_same_built_in_network(settings, first_order, outer, one_pass):
    config, net, state, episodes = prepared(**settings)
    module = module_net(conv4, IMAGES[0], config.ways, one_pass=one_pass)
    expected = measured_by(unrolled, config, net, state, episodes, first_order)
    result = measured_by(outer, config, module, state, episodes, first_order)
    assert_equal_measurements(result, expected, state)


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("algo", [name for name in ALGORITHMS if name not in ("scratch", "oracle")])
def test_every_algorithm_gives_a_module_the_gradient_of_the_same_built_in_network(algo, one_pass):
    config, net, state, episodes = prepared(algo=algo, filters=FILTERS)
    outputs = net.outputs
    expected = MetaStep(config, net, state).measure(episodes, 9, measure_all=True)
    module = module_net(conv4, IMAGES[0], outputs, one_pass=one_pass)
    result = MetaStep(config, module, state).measure(episodes, 9, measure_all=True)
    assert result.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert torch.allclose(result.grads[name], grad, rtol=1e-9, atol=1e-12), name
    for steps, loss in expected.query_losses.items():
        assert torch.allclose(result.query_losses[steps], loss, rtol=1e-11)


def central_difference(net, state, episodes, request, name, direction):
    losses = []
    for sign in (1, -1):
        moved = dict(state.slow)
        moved[name] = (state.slow[name] + sign * 1e-5 * direction).detach().requires_grad_()
        losses.append(unrolled(net, replace(state, slow=moved), episodes, request).meta_loss)
    return float(losses[0] - losses[1]) / 2e-5


@pytest.mark.parametrize("kind", [Attention, Encoder, Recurrent, Dropped])
def test_other_architectures_agree_with_central_differences(kind):
    net = module_net(kind, (1, 5, 7), 3)
    plan, why = checked(net)
    reasons = {
        Attention: "",
        Encoder: "",
        Recurrent: "vmap does not support it",
        Dropped: "'drop' (Dropout) draws",
    }
    assert plan.one_pass == (kind in (Attention, Encoder)) and why.startswith(reasons[kind])
    assert plan.random == (kind is Dropped)
    net = replace(net, plan=plan)
    state, episodes = learner(net)
    episodes = replace(episodes, keys_T=torch.tensor([12, 34]))
    for tensor in state.learnable().values():
        tensor.requires_grad_()
    request = MetaStepRequest(2, [0.5, 0.5], first_order=False, measure_all=False)
    grads = unrolled(net, state, episodes, request).grads
    by_adjoint = adjoint(net, state, episodes, request).grads
    for name, weight in state.slow.items():
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
        expected = central_difference(net, state, episodes, request, name, direction)
        assert float((grads[name] * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert torch.allclose(by_adjoint[name], grads[name], rtol=1e-9, atol=1e-12)


def outputs_of(net, keys_T, step=0):
    state, episodes = learner(net)
    norm = NormPass(state.norm, state.running, step, keys_T=keys_T)
    fast = {name: weight.expand(2, *weight.shape) for name, weight in state.slow.items()}
    return net(fast, episodes.support_x_TECHW, norm)


def test_dropout_depends_on_task_step_and_set_and_is_off_without_keys():
    net = module_net(Dropped, (1, 5, 7), 3, one_pass=False, random=True)
    keys_T = torch.tensor([12, 34])
    drawn = outputs_of(net, keys_T)
    torch.manual_seed(5)  # whatever else has drawn numbers
    assert torch.equal(outputs_of(net, keys_T), drawn)
    assert torch.equal(outputs_of(net, torch.tensor([12, 35]))[0], drawn[0])
    for other in (outputs_of(net, keys_T + 1), outputs_of(net, keys_T, step=1)):
        assert not torch.isclose(other, drawn).any()
    off = outputs_of(net, None)
    assert torch.equal(outputs_of(net, None), off) and not torch.isclose(off, drawn).any()


def test_the_keys_of_a_task_do_not_depend_on_the_meta_batch():
    class Stream:
        split, seed, device, ways, shots, queries = "train", 0, CPU, 3, 1, 1

        def episodes(self, first, tasks):
            return learner(module_net(Attention, (1, 5, 7), 3))[1]

    together = Keyed(Stream(), 7).episodes(4, 2)
    alone = [Keyed(Stream(), 7).episodes(number, 1).keys_T for number in (4, 5)]
    assert torch.equal(together.keys_T, torch.cat(alone))
    assert torch.equal(together.query_keys_T, together.support_keys_T + 1)
    assert not torch.equal(Keyed(Stream(), 8).episodes(4, 2).keys_T, together.keys_T)


class Odd(nn.Module):
    """Names that mamlctl uses itself, batch norm in one dimension, an eps, a buffer, and shared weights."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.linear, self.rate = nn.Linear(shape[1] * shape[2], 6), nn.BatchNorm1d(6, eps=0.1)
        self.running, self.shared = nn.Linear(6, 6), nn.Linear(6, 6)
        self.shared.weight = self.running.weight
        self.norms = nn.ModuleDict({"inner": nn.BatchNorm1d(6)})
        self.register_buffer("scale", torch.tensor(2.0))
        self.out = nn.Linear(6, outputs)
        nn.init.normal_(self.rate.weight)
        nn.init.normal_(self.rate.bias)
        nn.init.uniform_(self.rate.running_var)

    def forward(self, x):
        x = self.rate(self.linear(x.flatten(1))).tanh()
        return self.out(self.norms["inner"](self.shared(self.running(x))) * self.scale)


def test_names_initial_norms_buffers_and_shared_weights_of_a_module_are_kept():
    shape = (1, 4, 5)
    net = module_net(Odd, shape, 3)
    plan, _ = checked(net)
    config = small_config(algo="maml++", net="odd.py:Odd")
    net, state = build(config, shape, CPU, parts=Parts(plan))
    torch.manual_seed(config.seed)
    module = Odd(shape, 3).double().train()
    assert torch.equal(state.norm["module.rate.weight"], module.rate.weight.expand(3, -1))
    assert torch.equal(state.running["module.rate.var"], module.rate.running_var.expand(3, -1))
    stored = state.stored()
    assert len(stored) == sum(map(len, (state.slow, state.norm, state.rates, state.running)))
    x = torch.randn(1, 6, *shape, dtype=torch.float64)
    fast = {name: weight.unsqueeze(0) for name, weight in state.slow.items()}
    assert torch.allclose(net(fast, x, state.norm_pass(0))[0], module(x[0]), rtol=1e-12)


class SharedNorm(nn.Module):
    """One batch-norm layer with two names, for rows that are folded into the examples."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.inner, self.fc = nn.Linear(shape[2], 6), nn.Linear(6, outputs)
        self.norm = nn.BatchNorm1d(6)
        self.same = self.norm

    def forward(self, x):
        rows = self.inner(x.flatten(1, 2))
        folded = self.norm(rows.flatten(0, 1)).tanh()
        return self.fc(self.same(folded).view(rows.shape).mean(1))


def test_a_batch_norm_layer_with_two_names_is_one_layer():
    shape = (1, 4, 5)
    net = module_net(SharedNorm, shape, 3)
    assert net.norm_layers == {"norm": 6} and checked(net)[0].one_pass
    state, episodes = learner(net)
    x = episodes.support_x_TECHW
    module = net.made(0).module
    reference = SharedNorm(shape, 3).double().train()
    own = net.template.state_dict(
        state.slow
        | {
            f"norm.{name}": rows[0]
            for name, rows in (
                ("weight", state.norm["norm.weight"]),
                ("bias", state.norm["norm.bias"]),
                ("mean", state.running["norm.mean"]),
                ("var", state.running["norm.var"]),
            )
        }
    )
    reference.load_state_dict(own)
    assert module.norm is module.same
    fast = {name: weight.expand(2, *weight.shape) for name, weight in state.slow.items()}
    for out, x_E in zip(net(fast, x, state.norm_pass(0)), x, strict=True):
        assert torch.allclose(out, reference(x_E), rtol=1e-12)


def test_folded_examples_are_normalised_by_all_rows_of_the_support_set():
    net = module_net(SharedNorm, (1, 4, 5), 3)
    state, episodes = learner(net)
    x = torch.cat([episodes.support_x_TECHW, episodes.query_x_TECHW], dim=1)
    fast = {name: weight.expand(2, *weight.shape) for name, weight in state.slow.items()}
    support = x.shape[1] // 2
    own = net(fast, x[:, :support], state.norm_pass(0))
    norm = NormPass(state.norm, state.running, 0, statistics=Statistics.SUPPORT, support_examples=support)
    assert torch.allclose(net(fast, x, norm)[:, :support], own, rtol=1e-12)


def test_an_adapted_module_is_saved_as_its_own_state_dictionary():
    shape = (1, 4, 5)
    net, state = build(small_config(net="odd.py:Odd"), shape, CPU, parts=Parts(ModulePlan(Odd)))
    _, episodes = learner(net)
    one = episodes.split(1)[0]
    model = adapt_to_support_set(
        Autograd(net),
        state,
        one,
        inner_steps=2,
        statistics=Statistics.SUPPORT,
        classifier="head",
        rule=InnerRule(),
    )
    module = Odd(shape, 3)
    module.load_state_dict(plain_weights(model))
    expected = model.scores(one.query_x_TECHW[0]).float()
    assert torch.allclose(module.eval()(one.query_x_TECHW[0].float()), expected, atol=1e-5)


@pytest.mark.parametrize("name", TORCHVISION_NETS)
def test_all_names_of_torchvision_have_a_linear_head(name):
    assert _head_of(torchvision_net(name, (1, 28, 28), 3), None) in ("fc", "classifier.1")


@pytest.mark.parametrize("channels", [1, 3])
def test_networks_of_torchvision_take_grey_and_coloured_images(channels):
    config = small_config(net="resnet18", meta_batch_size=1, shots=1, queries=1, inner_steps=1)
    net, state = build(config, (channels, 16, 16), CPU, parts=Parts(torchvision_plan("resnet18")))
    assert state.slow["linear.weight"].shape == (3, 512) and "layer1.0.conv1.weight" in state.slow
    x = torch.rand(1, 4, channels, 16, 16, dtype=torch.float64)
    fast = {name: weight.unsqueeze(0) for name, weight in state.slow.items()}
    outputs = net(fast, x, state.norm_pass(0))
    if channels == 1:
        in_colour, _ = build(config, (3, 16, 16), CPU, parts=Parts(torchvision_plan("resnet18")))
        assert torch.equal(outputs, in_colour(fast, x.expand(-1, -1, 3, -1, -1), state.norm_pass(0)))
    assert net.largest == 64 * 8 * 8
