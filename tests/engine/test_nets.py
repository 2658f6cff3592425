"""Networks compared with torch's layers task by task, and implementations of derivatives with each other."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.derivative_cases import (
    BY_HAND,
    CPU,
    IMAGES,
    WAYS,
    assert_equal_measurements,
    measured_by,
    prepared,
)
from helpers.engine_cases import build_uneven, random_episodes, small_config
from torch import nn

from mamlctl.core.errors import SettingsError
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.adjoint import adjoint
from mamlctl.engine.algorithms.meta_gradient import unrolled
from mamlctl.engine.derivatives.autograd import Autograd
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.nets.base import CLASSIFICATION, HEAD, REGRESSION
from mamlctl.engine.nets.batch_norm import NormPass, Statistics
from mamlctl.engine.nets.conv4 import Conv4
from mamlctl.engine.nets.mlp import Mlp
from mamlctl.engine.nets.resnet12 import ResNet12
from mamlctl.engine.training.initial_state import build
from mamlctl.settings.schema import TrainConfig

TASKS = 2
EXAMPLES = 5


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own_weights(net, tasks=TASKS):
    """Weights for each task, and batch-norm weights and biases of both signs."""
    weights = net.init(torch.Generator().manual_seed(1), torch.float64)
    fast = {
        name: weight + 0.3 * (float(weight.abs().mean()) or 1) * normal(tasks, *weight.shape, seed=number)
        for number, (name, weight) in enumerate(weights.items())
    }
    for number, (name, channels) in enumerate(net.norm_layers.items(), len(fast)):
        fast[f"{name}.weight"] = 1 + normal(tasks, channels, seed=number)
        fast[f"{name}.bias"] = normal(tasks, channels, seed=2 * number)
    return fast


def of_task(fast, task):
    return {name: weight[task] for name, weight in fast.items()}


def assert_equals_its_twin(net, twin, shape):
    """Compare a network with `twin`(one task's weights, x), the same network in torch's layers.

    First each task has its own batch-norm weights, then all tasks share those of the first one.
    """
    fast, x = own_weights(net), normal(TASKS, EXAMPLES, *shape, seed=7)
    outputs_TEN = net(fast, x, NormPass({}, {}, 0))
    for task in range(TASKS):
        expected_EN = twin(of_task(fast, task), x[task])
        assert expected_EN.shape == (EXAMPLES, net.outputs)
        assert torch.allclose(outputs_TEN[task], expected_EN, rtol=1e-10, atol=1e-10)
    weights = {name: weight for name, weight in fast.items() if not name.startswith("norm")}
    rows = {name: weight[:1] for name, weight in fast.items() if name.startswith("norm")}
    outputs_TEN = net(weights, x, NormPass(rows, {}, 0))
    expected_EN = twin(of_task(weights, 1) | of_task(rows, 0), x[1])
    assert torch.allclose(outputs_TEN[1], expected_EN, rtol=1e-10, atol=1e-10)


def normed(weights, name, x):
    """Apply torch's batch norm."""
    return F.batch_norm(x, None, None, weights[f"{name}.weight"], weights[f"{name}.bias"], training=True)


ACTIVATIONS = {"relu": F.relu, "leaky_relu": lambda x: F.leaky_relu(x, 0.01)}


def plain_conv4_maps(net, weights, x):
    """Conv4's blocks, without code from the package."""
    for block in range(1, 5):
        x = F.conv2d(x, weights[f"conv{block}.weight"], stride=2 if net.pooling == "stride" else 1, padding=1)
        x = ACTIVATIONS[net.activation](normed(weights, f"norm{block}", x))
        if net.pooling == "max":
            x = F.max_pool2d(x, 2)
    return x


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("readout", ["flatten", "mean"])
@pytest.mark.parametrize("pooling", ["max", "stride"])
@pytest.mark.parametrize("image", [*IMAGES, (1, 28, 28)], ids=str)
def test_conv4_equals_torch_layers_in_every_variant(image, pooling, readout, activation):
    """A stride of 2 rounds odd sizes up, pooling rounds them down."""
    net = Conv4(image, 3, 4, pooling=pooling, readout=readout, activation=activation)

    def twin(weights, x):
        maps = plain_conv4_maps(net, weights, x)
        assert maps.shape[1:] == net.features_shape
        f_EF = maps.mean((2, 3)) if readout == "mean" else maps.flatten(1)
        return F.linear(f_EF, weights["linear.weight"], weights["linear.bias"])

    assert_equals_its_twin(net, twin, image)


def test_conv4_with_strides_leaves_a_pixel_of_any_image():
    net = Conv4((1, 5, 3), 3, 4, pooling="stride")
    assert net.features_shape == (4, 1, 1)
    assert net.features(own_weights(net), normal(TASKS, EXAMPLES, 1, 5, 3), NormPass({}, {}, 0)).shape[2] == 4


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_mlp_on_images_equals_torch_layers(activation):
    net = Mlp((1, 6, 5), 3, (8, 7, 6, 6), CLASSIFICATION, activation)

    def twin(weights, x):
        x = x.flatten(1)
        for layer in range(1, 5):
            x = normed(weights, f"norm{layer}", F.linear(x, weights[f"hidden{layer}.weight"]))
            x = ACTIVATIONS[activation](x)
        return F.linear(x, weights["linear.weight"], weights["linear.bias"])

    assert_equals_its_twin(net, twin, (1, 6, 5))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_mlp_on_curves_equals_torch_layers_without_batch_norm(activation):
    net = Mlp((1,), 1, (40, 40), REGRESSION, activation)
    assert net.norm_layers == {}

    def twin(weights, x):
        for layer in (1, 2):
            x = F.linear(x, weights[f"hidden{layer}.weight"], weights[f"hidden{layer}.bias"])
            x = ACTIVATIONS[activation](x)
        return F.linear(x, weights["linear.weight"], weights["linear.bias"])

    assert_equals_its_twin(net, twin, (1,))


class Block(nn.Module):
    """A residual block, written in the usual way."""

    def __init__(self, inputs, width):
        super().__init__()
        sizes = {"1": (inputs, 3), "2": (width, 3), "3": (width, 3), "skip": (inputs, 1)}
        self.conv = nn.ModuleDict(
            {
                name: nn.Conv2d(into, width, size, padding=size // 2, bias=False)
                for name, (into, size) in sizes.items()
            }
        )
        self.norm = nn.ModuleDict({name: nn.BatchNorm2d(width) for name in sizes})

    def forward(self, x):
        inner = F.leaky_relu(self.norm["1"](self.conv["1"](x)), 0.1)
        inner = F.leaky_relu(self.norm["2"](self.conv["2"](inner)), 0.1)
        both = self.norm["3"](self.conv["3"](inner)) + self.norm["skip"](self.conv["skip"](x))
        return F.max_pool2d(F.leaky_relu(both, 0.1), 2)


@pytest.mark.parametrize("image", [(1, 28, 28), (3, 19, 16)], ids=str)
def test_resnet12_equals_torch_layers(image):
    net = ResNet12(image, 3, 4)

    def twin(weights, x):
        widths = (image[0], 4, 10, 20, 40)
        plain = nn.Sequential(*(Block(*pair) for pair in itertools.pairwise(widths)))
        plain.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(40, 3)).double()
        numbers = plain.state_dict()
        for name, value in weights.items():
            kind, place = name.removesuffix(".weight").removesuffix(".bias"), name.rpartition(".")[2]
            layer, _, part = kind.removeprefix("conv").removeprefix("norm").partition(".")
            key = f"6.{place}" if kind == "linear" else f"{int(layer) - 1}.{kind[:4]}.{part}.{place}"
            numbers[key].copy_(value)
        return plain(x)

    assert_equals_its_twin(net, twin, image)


def numbers_of(net):
    weights = net.init(torch.Generator().manual_seed(0), torch.float32)
    head = sum(weights[name].numel() for name in HEAD)
    return sum(map(torch.numel, weights.values())) - head, head, 2 * sum(net.norm_layers.values())


def test_networks_have_the_published_numbers_of_parameters():
    """Numbers of body, head and norm; 1,761 in total for the regression network, 12.4 M for ResNet-12."""
    curves = numbers_of(Mlp((1,), 1, (40, 40), REGRESSION))
    assert curves == (40 + 40 + 40 * 40 + 40, 40 + 1, 0)
    assert sum(curves) == 1761
    images = numbers_of(Mlp((1, 28, 28), 5, (256, 128, 64, 64), CLASSIFICATION))
    assert images == (784 * 256 + 256 * 128 + 128 * 64 + 64 * 64, 64 * 5 + 5, 2 * (256 + 128 + 64 + 64))
    assert sum(images) == 247_109
    # 9 weights per filter and channel, 1 for a skip; the published 12.4 M are body and norm.
    resnet12 = numbers_of(ResNet12((3, 84, 84), 5, 64))
    widths = (3, 64, 160, 320, 640)
    taps = [10 * a * b + 18 * b * b for a, b in itertools.pairwise(widths)]
    assert resnet12 == (sum(taps), 640 * 5 + 5, 8 * (64 + 160 + 320 + 640))
    assert resnet12[0] + resnet12[2] == 12_424_320
    # The published 111,749 include 4 x 64 biases before batch norm.
    assert sum(numbers_of(Conv4((1, 28, 28), 5, 64))[:2]) == 111_749 - 4 * 64
    for readout, features in (("flatten", 2 * 2 * 64), ("mean", 64)):
        body, head, _ = numbers_of(Conv4((1, 28, 28), 5, 64, pooling="stride", readout=readout))
        assert (body, head) == (9 * 64 + 3 * 9 * 64 * 64, features * 5 + 5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"readout": "mean"}, {"net": "resnet12"}],
    ids=["conv4", "conv4-mean", "resnet12"],
)
def test_images_that_are_too_small_for_the_network_are_an_error(settings):
    """Four halvings leave one of 16 pixels, and none of 15."""
    config = TrainConfig(filters=2, **settings)
    net, _ = build(config, (1, 16, 16), CPU)
    assert net(own_weights(net), normal(TASKS, EXAMPLES, 1, 16, 16), NormPass({}, {}, 0)).shape[2] == 5
    with pytest.raises(SettingsError, match="images of 15x16 are too small for") as caught:
        build(config, (1, 15, 16), CPU)
    assert "\n" not in caught.value.message
    assert caught.value.hint == "use --net mlp"


VARIANTS = {
    "relu": ({"activation": "relu"}, (1, 16, 16)),
    "stride": ({"pooling": "stride"}, (2, 9, 7)),
    "stride-mean-relu": ({"pooling": "stride", "readout": "mean", "activation": "relu"}, (1, 16, 13)),
    "max-mean": ({"readout": "mean"}, (1, 16, 32)),
    "mlp": ({"net": "mlp", "hidden": "8-6"}, (1, 5, 4)),
    "resnet12": ({"net": "resnet12", "filters": 2}, (1, 16, 16)),
}
ALGORITHMS = {
    "maml": {},
    "maml++": {"da": False},
    "boil": {},
    "meta-sgd": {},
}


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("algo", list(ALGORITHMS))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_adjoint_equals_double_backward_for_every_network(variant, algo, first_order):
    settings, image = VARIANTS[variant]
    learner = prepared(image, algo=algo, inner_steps=2, **ALGORITHMS[algo] | settings)
    expected = measured_by(unrolled, *learner, first_order)
    result = measured_by(adjoint, *learner, first_order)
    assert_equal_measurements(result, expected, learner[2], tolerance=1e-9)


@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_adjoint_equals_double_backward_on_curves(algo):
    no_norm = {"bnrs": False, "bnwb": False}
    config = small_config(algo=algo, net="mlp", hidden="7-6", **ALGORITHMS[algo] | no_norm)
    net, state = build_uneven(config, image=(1,))
    for tensor in state.learnable().values():
        tensor.requires_grad_()
    parts = normal(4, TASKS, EXAMPLES, 1)
    episodes = Episodes(parts[0], parts[1].squeeze(-1), parts[2], parts[3].squeeze(-1))
    learner = config, net, state, episodes, False
    expected = measured_by(unrolled, *learner)
    assert_equal_measurements(measured_by(adjoint, *learner), expected, state, tolerance=1e-9)


def test_only_the_variants_of_conv4_py_have_hand_written_derivatives():
    """Only the variant that differs from the default by its activation has them."""
    like = torch.empty(0, dtype=torch.float64)
    for variant, (settings, image) in VARIANTS.items():
        net, _ = build(small_config(**settings), image, CPU)
        assert isinstance(select_derivatives(net, like), Autograd) == (variant != "relu"), variant


def assert_close(result, expected, tolerance=1e-9):
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert scale > 0, f"the expected value of {name} is 0"
        assert float((result[name] - value).abs().max()) < tolerance * scale, name


def by_hand_and_not(way, image, activation):
    """Autograd and hand-written derivatives, weights for each task, tasks, and two directions."""
    net = Conv4(image, 3, 4, activation=activation)
    fast = own_weights(net)
    episodes = random_episodes(small_config(), image=image)
    directions = [
        {
            name: normal(*weight.shape, seed=10 * number + turn)
            for number, (name, weight) in enumerate(fast.items())
        }
        for turn in (1, 2)
    ]
    return Autograd(net), WAYS[way](net), fast, episodes, directions


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("way", BY_HAND)
def test_hand_written_conv4_gradients_and_products_equal_autograd(way, image, activation):
    """Products are repeated, because one must not change the tape for the next."""
    *both, fast, episodes, directions = by_hand_and_not(way, image, activation)
    weights = {name: weight for name, weight in fast.items() if not name.startswith("norm")}
    rows = {name: weight[:1] for name, weight in fast.items() if name.startswith("norm")}
    result = []
    for derivatives in both:
        norm = NormPass(rows, {}, 0)
        ready = derivatives.prepare(episodes.support_x_TECHW, episodes.support_y_TE)
        gradient = ready.gradient(weights, norm, keep=True)
        products = [gradient.product(directions[turn]) for turn in (0, 1, 0)]
        assert all(torch.equal(products[2][0][name], value) for name, value in products[0][0].items())
        assert all(torch.equal(products[2][1][name], value) for name, value in products[0][1].items())
        result.append((gradient, products, norm))
    (expected, expected_products, expected_norm), (gradient, products, norm) = result
    assert torch.allclose(gradient.loss_T, expected.loss_T, rtol=1e-11)
    assert torch.allclose(gradient.logits_TEN, expected.logits_TEN, rtol=1e-9, atol=1e-11)
    assert_close(gradient.fast, expected.fast)
    assert_close(gradient.norm, expected.norm)
    for one, two in zip(products, expected_products, strict=True):
        assert_close(one[0], two[0])
        assert_close(one[1], two[1])
    for name, seen in expected_norm.seen.items():
        assert all(torch.allclose(*pair) for pair in zip(norm.seen[name], seen, strict=True))


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (Mlp((1, 4, 4), 3, (6, 5), CLASSIFICATION), (1, 4, 4)),
        (ResNet12((1, 16, 16), 3, 2), (1, 16, 16)),
        (Conv4((2, 9, 7), 3, 4, pooling="stride", readout="mean"), (2, 9, 7)),
    ],
    ids=["mlp", "resnet12", "stride-mean"],
)
def test_products_of_any_network_match_differences_of_gradients_and_can_be_repeated(net, shape):
    """The differences are so small that no pooling window and no activation changes its branch."""
    fast, length = own_weights(net), 1e-7
    labels_TE = torch.arange(EXAMPLES).expand(TASKS, EXAMPLES) % 3
    ready = Autograd(net).prepare(normal(TASKS, EXAMPLES, *shape), labels_TE)
    gradient = ready.gradient(fast, NormPass({}, {}, 0), keep=True)
    direction = {name: normal(*weight.shape) for name, weight in fast.items()}
    one, two = (gradient.product(direction)[0] for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in fast)
    before, after = (
        {name: weight + sign * length * direction[name] for name, weight in fast.items()} for sign in (-1, 1)
    )
    before, after = (ready.gradient(at, NormPass({}, {}, 0)).fast for at in (before, after))
    differences = {name: (after[name] - before[name]) / (2 * length) for name in fast}
    assert_close(one, differences, tolerance=1e-5)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("way", BY_HAND)
def test_hand_written_gradients_of_adapted_norm_weights_equal_autograd(way, activation):
    """With Reptile and transfer every task has its own batch-norm weights."""
    *both, fast, episodes, directions = by_hand_and_not(way, IMAGES[1], activation)
    for algo in ("reptile", "transfer"):
        _, state = build(small_config(algo=algo, ways=3), IMAGES[1], CPU)
        assert state.slow.keys() == fast.keys()
        assert state.norm == {}
    result = []
    for derivatives in both:
        ready = derivatives.prepare(episodes.support_x_TECHW, episodes.support_y_TE)
        result.append(ready.gradient(fast, NormPass({}, {}, 0)))
    assert result[0].norm == result[1].norm == {}
    assert_close(result[1].fast, result[0].fast)
    assert torch.allclose(result[1].logits_TEN, result[0].logits_TEN, rtol=1e-9, atol=1e-11)
    ready = both[1].prepare(episodes.support_x_TECHW, episodes.support_y_TE)
    gradient = ready.gradient(fast, NormPass({}, {}, 0), keep=True)
    with pytest.raises(AssertionError, match="not implemented for an adapted batch norm"):
        gradient.product(directions[0])


@pytest.mark.parametrize("statistics", list(Statistics))
@pytest.mark.parametrize("adapted_norm", [False, True])
@pytest.mark.parametrize("way", BY_HAND)
def test_hand_written_features_and_their_backward_pass_equal_autograd(way, adapted_norm, statistics):
    """The head's weights are absent; only a set's own statistics have a backward pass, as in training."""
    *both, fast, episodes, _ = by_hand_and_not(way, IMAGES[1], "relu")
    body = {name: weight for name, weight in fast.items() if name not in HEAD}
    rows = {} if adapted_norm else {name: weight[:1] for name, weight in body.items() if "norm" in name}
    body = {name: weight for name, weight in body.items() if name not in rows}
    running = {
        f"norm{block}.{kind}": 1 + 0.1 * normal(1, 4).abs()
        for block in range(1, 5)
        for kind in ("mean", "var")
    }
    along = 3 if statistics is Statistics.SUPPORT else None
    result = []
    for derivatives in both:
        norm = NormPass(rows, running, 0, statistics, along or 0)
        ready = derivatives.prepare(episodes.query_x_TECHW, episodes.query_y_TE, along)
        f_TEF, tape = ready.features_and_tape(body, norm)
        assert not f_TEF.requires_grad
        alone = NormPass(rows, running, 0, statistics, along or 0)
        assert torch.equal(ready.features(body, alone), f_TEF)
        assert all(
            torch.equal(torch.stack(alone.seen[name]), torch.stack(norm.seen[name])) for name in norm.seen
        )
        back = tape.back_through(normal(*f_TEF.shape)) if statistics is Statistics.OWN else ({}, {})
        result.append((f_TEF, *back))
    assert torch.allclose(result[1][0], result[0][0], rtol=1e-9, atol=1e-11)
    assert_close(result[1][1], result[0][1])
    assert_close(result[1][2], result[0][2])


def test_initial_weights_have_the_bounds_of_their_distributions():
    """Glorot's for Conv4 and for layers on images, torch's default on curves, He's in ResNet-12."""
    generator = torch.Generator().manual_seed(0)
    conv = Conv4((1, 28, 28), 5, 64).init(generator, torch.float64)["conv2.weight"]
    assert float(conv.abs().max()) == pytest.approx(math.sqrt(6 / (128 * 9)), rel=1e-3)
    curve = Mlp((1,), 1, (40, 40), REGRESSION).init(generator, torch.float64)
    for name in ("hidden2.weight", "hidden2.bias", "linear.weight"):
        assert 0.9 / math.sqrt(40) < float(curve[name].abs().max()) <= 1 / math.sqrt(40), name
    skip = ResNet12((3, 84, 84), 5, 64).init(generator, torch.float64)["conv4.2.weight"]
    assert float(skip.std()) == pytest.approx(math.sqrt(2 / 1.01 / (640 * 9)), rel=1e-2)
