"""The relatives of MAML, each against a closed form, a slow loop of its own, or what it shares with MAML."""

import copy
import itertools
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_cases import IMAGE, build_uneven, fastest, random_episodes, slow_forward, small_config

from mamlctl.data.episodes import Episodes, MiniBatches
from mamlctl.data.regression import FAMILIES, CurveStream
from mamlctl.engine import relatives
from mamlctl.engine.algorithms import ALGORITHMS
from mamlctl.engine.build import build
from mamlctl.engine.inner import MetaState
from mamlctl.engine.nets import CLASSIFICATION, HEAD, REGRESSION, HeadNet
from mamlctl.engine.norms import Statistics
from mamlctl.engine.optimizers import Hypergradient, Sgd
from mamlctl.engine.outer import Ask, unrolled
from mamlctl.engine.predict import adapted, by_neighbours, by_prototypes, fine_tuned
from mamlctl.engine.relatives import conjugate_gradient, implicit
from mamlctl.engine.step import MetaStep

CPU = torch.device("cpu")


def close(one, two, tolerance=1e-9):
    scale = float(two.abs().max())
    return one.shape == two.shape and float((one - two).abs().max()) <= tolerance * scale + 1e-14


def measured(algo, episodes=None, *, epoch=0, uneven=True, **settings):
    config = small_config(algo=algo, **settings)
    net, state = (build_uneven if uneven else lambda config: build(config, IMAGE, CPU))(config)
    step = MetaStep(config, net, state)
    episodes = random_episodes(config) if episodes is None else episodes
    return step, step.measure(episodes, epoch, measure_all=True)


# Tasks with a quadratic loss: a linear net without inputs but one, y = w x + b, on chosen points.


def linear_tasks(x, y, slow, *, inner_lr=0.1, queries=None):
    """Regression by the head alone: features x_TED, values y_TE; loss = mean (w x + b - y)^2."""
    net = HeadNet(1, REGRESSION)
    state = MetaState(slow, {}, {name: torch.full((1,), inner_lr, dtype=torch.float64) for name in slow})
    for tensor in slow.values():
        tensor.requires_grad_()
    return net, state, Episodes(x, y, *(queries or (x, y)))


def random_line(seed=0, tasks=3, examples=4, features=2):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    slow = {"linear.weight": normal(1, features), "linear.bias": normal(1)}
    support, query = ((normal(tasks, examples, features), normal(tasks, examples)) for _ in range(2))
    return slow, support, query


def quadratic(x_ED, y_E):
    """Of the loss mean (x . w + b - y)^2, in v = (w, b): Hessian and the gradient at v as functions."""
    inputs = torch.cat([x_ED, torch.ones(len(x_ED), 1).double()], 1)
    hessian = 2 * inputs.T @ inputs / len(y_E)
    return hessian, lambda v: 2 * inputs.T @ (inputs @ v - y_E) / len(y_E)


def joined(weights):
    return torch.cat([weights["linear.weight"].flatten(), weights["linear.bias"].flatten()])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_mamls_gradient_of_quadratic_tasks_has_its_closed_form(steps, first_order):
    """v_k+1 - c = (I - r A)(v_k - c): the gradient is the mean over tasks of (I - r A)^steps times the
    query gradient at the end, and without that factor in first order."""
    slow, support, query = random_line()
    net, state, episodes = linear_tasks(*support, slow, queries=query)
    weights = (0.0,) * (steps - 1) + (1.0,)
    found = unrolled(net, state, episodes, Ask(steps, weights, first_order, measure_all=False))
    wanted = 0
    for x, y, qx, qy in zip(*support, *query, strict=True):
        hessian, gradient = quadratic(x, y)
        v = joined(slow).detach()
        for _ in range(steps):
            v = v - 0.1 * gradient(v)
        factor = torch.linalg.matrix_power(torch.eye(len(v)).double() - 0.1 * hessian, steps)
        last = quadratic(qx, qy)[1](v)
        wanted = wanted + (last if first_order else factor @ last) / len(support[0])
    assert close(joined(found.grads), wanted, 1e-13)


def test_fomaml_differs_from_maml_by_the_curvature_alone():
    """One step of rate r on a loss of curvature a in one number: MAML's gradient is (1 - r a) of FOMAML's."""
    slow = {"linear.weight": torch.zeros(1, 1).double(), "linear.bias": torch.zeros(1).double()}
    x = torch.tensor([[[2.0]]]).double()  # loss (2 w - y)^2 in w: a = 8
    grads = {}
    for first_order in (False, True):
        net, state, episodes = linear_tasks(x, torch.tensor([[3.0]]).double(), slow)
        state.rates = {"linear.weight": torch.full((1,), 0.05, dtype=torch.float64)}
        named = {"inner_steps": 1, "msl_weights": (1.0,), "first_order": first_order, "measure_all": False}
        grads[first_order] = unrolled(net, state, episodes, Ask(**named)).grads["linear.weight"].item()
    assert grads[True] == pytest.approx(-12 * (1 - 0.05 * 8))  # the gradient at the adapted weight
    assert grads[False] / grads[True] == pytest.approx(1 - 0.05 * 8)


def test_the_implicit_gradient_of_quadratic_tasks_has_its_closed_form():
    """Minimum of loss + p/2 |v - v0|^2: the gradient by v0 is p (A + p)^-1 times the query gradient there."""
    slow, support, query = random_line()
    net, state, episodes = linear_tasks(*support, slow, inner_lr=0.05, queries=query)
    found = implicit(
        net, state, episodes, Ask(2000, (), False, False), engine="adjoint", proximal=0.7, cg_steps=3
    )
    wanted = 0
    for x, y, qx, qy in zip(*support, *query, strict=True):
        hessian, gradient = quadratic(x, y)
        shifted = hessian + 0.7 * torch.eye(3).double()
        v0 = joined(slow).detach()
        v = v0 - torch.linalg.solve(shifted, gradient(v0))
        wanted = wanted + 0.7 * torch.linalg.solve(shifted, quadratic(qx, qy)[1](v)) / len(support[0])
    assert close(joined(found.grads), wanted, 1e-10)


def test_conjugate_gradient_solves_every_task_and_stands_still_where_there_is_no_curvature():
    generator = torch.Generator().manual_seed(0)
    root_TDD = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64)
    matrix_TDD = root_TDD @ root_TDD.transpose(1, 2) + torch.eye(5)
    matrix_TDD[2] = -matrix_TDD[2]
    b_TD = torch.randn(3, 5, generator=generator, dtype=torch.float64)

    def product(direction):
        both = torch.cat([direction["a"], direction["b"]], 1).unsqueeze(2)
        out = (matrix_TDD @ both).squeeze(2)
        return {"a": out[:, :2], "b": out[:, 2:]}

    found = conjugate_gradient(product, {"a": b_TD[:, :2], "b": b_TD[:, 2:]}, steps=5)
    x_TD = torch.cat([found["a"], found["b"]], 1)
    assert close(x_TD[:2], torch.linalg.solve(matrix_TDD[:2], b_TD[:2]), 1e-8)
    assert (x_TD[2] == 0).all()
    beyond = conjugate_gradient(product, {"a": b_TD[:, :2], "b": b_TD[:, 2:]}, steps=50)
    assert close(beyond["a"][:2], found["a"][:2], 1e-8)


def test_the_implicit_gradient_of_a_net_is_its_central_differences():
    """The inner problem solved to its end, then the query loss as a function of weights and norm.

    The head alone is adapted, since a minimum over the body likes to lie on a kink of its activations.
    """
    settings = {
        "proximal": 0.5,
        "cg_steps": 15,
        "inner_steps": 400,
        "inner_lr": 0.3,
        "meta_batch_size": 1,
    }
    step, found = measured("imaml", uneven=False, adapts="head", **settings)
    episodes = random_episodes(step.config)
    for name in ("conv3.weight", "linear.bias", "norm2.weight"):
        tensor, at = step.learnable[name], (0,) * step.learnable[name].dim()
        losses = []
        for change in (1e-6, -2e-6):
            with torch.no_grad():
                tensor[at] += change
            losses.append(float(step.measure(episodes, 0, measure_all=False).meta_loss))
        with torch.no_grad():
            tensor[at] += 1e-6
        difference = (losses[0] - losses[1]) / 2e-6
        assert float(found.grads[name][at]) == pytest.approx(difference, rel=1e-5, abs=1e-8), name


def test_the_implicit_gradient_keeps_nothing_of_earlier_inner_steps(monkeypatch):
    """Of all gradients that were made, no more than the last two are alive at any time before the end."""
    config = small_config(algo="imaml", inner_steps=12)
    net, state = build(config, IMAGE, CPU)
    real = fastest(net)
    made, alive = [], []

    class Watched:
        net = real.net
        prepare, logits, product = real.prepare, real.logits, real.product

        def gradient(self, fast, prepared, norm, *, keep=False):
            found = real.gradient(fast, prepared, norm, keep=keep)
            made.append(weakref.ref(found.fast["conv1.weight"]))
            alive.append(sum(ref() is not None for ref in made))
            return found

    monkeypatch.setattr(relatives, "derivatives_of", lambda *args: Watched())
    MetaStep(config, net, state).measure(random_episodes(config), 0, measure_all=False)
    assert len(alive) == 12 + 2
    assert max(alive) <= 2


def test_reptile_with_one_step_of_sgd_is_gradient_descent_on_the_support_loss():
    settings = {"inner_steps": 1, "inner_optimizer": "sgd", "inner_lr": 0.3, "train_shots": None}
    step, found = measured("reptile", uneven=False, inner_batch=None, **settings)
    slow = {name: tensor.detach().clone().requires_grad_() for name, tensor in step.state.slow.items()}
    episodes, losses = random_episodes(step.config), []
    norm = {name: tensor.unsqueeze(0) for name, tensor in slow.items() if name.startswith("norm")}
    for x, y in zip(episodes.support_x_TECHW, episodes.support_y_TE, strict=True):
        losses.append(F.cross_entropy(slow_forward(slow, norm, 0, x), y))
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(slow.values()))
    for name, grad in zip(slow, grads, strict=True):
        assert close(found.grads[name], 0.3 * grad), name


def test_reptile_equals_a_serial_loop_with_torchs_adam_on_mini_batches():
    """One task after another with the moments kept, as the published code does (a meta-batch of 1)."""
    config = small_config(algo="reptile", meta_batch_size=1, inner_steps=4, inner_batch=2, train_shots=None)
    net, state = build(config, IMAGE, CPU)
    step = MetaStep(config, net, state)
    slow = {name: tensor.detach().clone().requires_grad_() for name, tensor in state.slow.items()}
    adam = torch.optim.Adam(slow.values(), lr=config.inner_lr, betas=(0.0, 0.999), eps=1e-8)
    for number in range(3):
        batches_TIB = torch.tensor([[[0, 3], [5, 1], [2, 4], [1, 0]]])
        episodes = random_episodes(config, seed=number)
        episodes = Episodes(*episodes.sets, None, batches_TIB)
        before = {name: tensor.detach().clone() for name, tensor in slow.items()}
        for batch in batches_TIB[0]:
            norm = {name: tensor.unsqueeze(0) for name, tensor in slow.items() if "norm" in name}
            x, y = episodes.support_x_TECHW[0, batch], episodes.support_y_TE[0, batch]
            adam.zero_grad()
            F.cross_entropy(slow_forward(slow, norm, 0, x), y).backward()
            adam.step()
        found = step.measure(episodes, 0, measure_all=False)
        for name, tensor in slow.items():
            assert close(found.grads[name], before[name] - tensor.detach(), 1e-6), name
        # Half of the way, as an outer rate of 0.5 goes.
        step.optimizer.set_lr(0.5)
        step.move(found)
        with torch.no_grad():
            for name, tensor in slow.items():
                tensor.copy_(before[name] + 0.5 * (tensor - before[name]))
                assert close(step.state.slow[name].detach(), tensor), name


def test_reptiles_outer_rate_goes_down_to_nothing_in_a_straight_line():
    config = small_config(algo="reptile", epochs=2, steps_per_epoch=5)
    step = MetaStep(config, *build(config, IMAGE, CPU))
    assert isinstance(step.optimizer, Sgd)
    rates = []
    for number in range(config.total_steps):
        step.set_meta_lr(number // 5, number / config.total_steps)
        rates.append(step.optimizer.lr_now())
    assert rates == pytest.approx([1 - number / 10 for number in range(10)])


def test_mini_batches_go_through_shuffles_without_repeating_an_example():
    stream = CurveStream(family=FAMILIES["line"], split="train", seed=3, shots=5, queries=1, device=CPU)
    batched = MiniBatches(stream, steps=5, size=2)
    found = batched.episodes(7, 4).batches_TIB
    assert found.shape == (4, 5, 2)
    for task, order in enumerate(found.flatten(1).tolist()):
        assert sorted(order[:5]) == sorted(order[5:]) == list(range(5)), task
    assert torch.equal(batched.episodes(9, 1).batches_TIB[0], found[2])  # task 9 whenever it is asked
    assert len({tuple(order) for order in found.flatten(1).tolist()}) > 1
    assert not torch.equal(
        MiniBatches(
            CurveStream(family=FAMILIES["line"], split="val", seed=3, shots=5, queries=1, device=CPU), 5, 2
        )
        .episodes(7, 4)
        .batches_TIB,
        found,
    )


ANIL = [
    {},
    {"msl": True, "msl_epochs": 5},
    {"lslr": True},
    {"first_order": True},
    {"lslr": True, "first_order": True},
]


@pytest.mark.parametrize("settings", ANIL, ids=str)
def test_anils_gradient_is_that_of_the_loop_over_the_whole_net(settings):
    """The body passed once against the unrolled loop that passes it at every step."""
    _, fast = measured("anil", **settings)
    _, plain = measured("anil", engine="plain", **settings)
    assert fast.grads.keys() == plain.grads.keys()
    for name, grad in plain.grads.items():
        assert close(fast.grads[name], grad, 1e-8), name
    for part in ("query_losses", "query_scores"):
        one, two = getattr(fast, part), getattr(plain, part)
        assert one.keys() == two.keys()
        assert all(float(one[step]) == pytest.approx(float(two[step])) for step in one)


def test_anil_is_maml_with_the_bodys_rates_at_nothing():
    step, anil = measured("anil")
    config = small_config(algo="maml")
    net, state = build_uneven(config)
    for name, rate in state.rates.items():
        rate.copy_(step.state.rates[name] if name in HEAD else torch.zeros_like(rate))
    state.slow, state.norm = step.state.slow, step.state.norm
    maml = MetaStep(config, net, state).measure(random_episodes(config), 0, measure_all=False)
    for name, grad in maml.grads.items():
        assert close(anil.grads[name], grad, 1e-8), name


def test_boil_is_maml_with_the_heads_rates_at_nothing():
    step, boil = measured("boil")
    config = small_config(algo="maml")
    net, state = build_uneven(config)
    for name, rate in state.rates.items():
        rate.copy_(torch.zeros_like(rate) if name in HEAD else step.state.rates[name])
    state.slow, state.norm = step.state.slow, step.state.norm
    maml = MetaStep(config, net, state).measure(random_episodes(config), 0, measure_all=False)
    for name, grad in maml.grads.items():
        assert close(boil.grads[name], grad), name
    assert float(boil.grads["linear.weight"].abs().max()) > 0  # not adapted, but learnt


@pytest.mark.parametrize("engine", ["adjoint", "plain"])
def test_meta_sgd_with_equal_rates_is_maml_and_its_rates_add_up(engine):
    """The gradients by a tensor's rates, one a weight, add up to that by one rate for the tensor."""
    _, found = measured("meta-sgd", uneven=False, engine=engine)
    config = small_config(algo="maml", lslr=True)
    net, state = build(config, IMAGE, CPU)
    maml = MetaStep(config, net, state).measure(random_episodes(config), 0, measure_all=False)
    for name in state.slow:
        assert close(found.grads[name], maml.grads[name]), name
        by_weight, by_step = found.grads[f"rate.{name}"], maml.grads[f"rate.{name}"]
        assert by_weight.shape == (1, *state.slow[name].shape)
        assert float(by_weight.sum()) == pytest.approx(float(by_step.sum()), rel=1e-8)


def test_meta_sgds_rates_are_held_to_central_differences_and_may_be_negative():
    step, found = measured("meta-sgd")
    episodes, rate = random_episodes(step.config), step.learnable["rate.conv2.weight"]
    with torch.no_grad():
        rate[0, 1, 2, 0, 0] = -0.03
    found = step.measure(episodes, 0, measure_all=False)
    losses = []
    for change in (1e-5, -2e-5):
        with torch.no_grad():
            rate[0, 1, 2, 0, 0] += change
        losses.append(float(step.measure(episodes, 0, measure_all=False).meta_loss))
    wanted = (losses[0] - losses[1]) / 2e-5
    assert float(found.grads["rate.conv2.weight"][0, 1, 2, 0, 0]) == pytest.approx(wanted, rel=1e-5)


def test_a_hypergradient_is_the_change_of_the_loss_along_both_rates():
    """In the logs: rate x derivative by the rate, and -rate x (this gradient . last direction)."""
    weights = {"w": torch.tensor([1.0, 2.0]).double(), "rate.w": torch.tensor([0.5]).double()}
    optimizer = Hypergradient(weights, 0.1, (0.9, 0.999), 0.02)
    seen = []
    optimizer.hyper.step = lambda grads: seen.append({name: float(grad) for name, grad in grads.items()})
    grad = torch.tensor([3.0, -4.0]).double()
    optimizer.step({"w": grad, "rate.w": torch.tensor([7.0]).double()})
    direction = (torch.tensor([1.0, 2.0]).double() - weights["w"]) / 0.1
    assert torch.allclose(direction, torch.sign(grad).double(), atol=1e-6)  # Adam's first step
    assert seen == [{"inner": pytest.approx(0.5 * 7), "meta": pytest.approx(0.0)}]
    later = torch.tensor([1.0, 1.0]).double()
    optimizer.step({"w": later, "rate.w": torch.tensor([0.0]).double()})
    assert seen[1] == {"inner": pytest.approx(0.0), "meta": pytest.approx(-0.1 * float(later @ direction))}


@pytest.mark.parametrize("start", [0.1, 10.0])
def test_hypergradients_find_the_way_from_a_bad_start(start):
    """A steady slope makes the meta rate grow, an oscillation makes it shrink, hyper_lr a step."""
    weights = {"w": torch.zeros(1).double(), "rate.w": torch.ones(1).double()}
    optimizer = Hypergradient(weights, start, (0.9, 0.999), 0.05)
    for number in range(40):
        sign = 1.0 if start < 1 else (-1.0) ** number
        optimizer.step({"w": torch.full((1,), sign).double(), "rate.w": torch.full((1,), -1.0).double()})
    moved = np.log(optimizer.lr_now() / start)
    assert (1.5 < moved < 3) if start < 1 else (moved < -0.3), moved
    assert 1.9 < np.log(float(weights["rate.w"])) < 2.5


def test_prototypical_networks_equal_a_direct_computation():
    step, found = measured("protonet")
    episodes = random_episodes(step.config)
    ways = step.config.ways
    slow = {name: tensor.detach().clone().requires_grad_() for name, tensor in step.state.slow.items()}
    norm = {name: tensor.detach().clone().requires_grad_() for name, tensor in step.state.norm.items()}
    eye = {"linear.weight": torch.eye(4).double(), "linear.bias": torch.zeros(4).double()}
    losses, right = [], []
    for x, y, qx, qy in zip(*episodes.sets, strict=True):
        support, query = (slow_forward(slow | eye, norm, 0, images) for images in (x, qx))
        centres = torch.stack([support[y == label].mean(0) for label in range(ways)])
        distances = torch.cdist(query, centres).square()
        losses.append(F.cross_entropy(-distances, qy))
        right.append((distances.argmin(1) == qy).double().mean())
    wanted = dict(slow | norm)
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(wanted.values()))
    for name, grad in zip(wanted, grads, strict=True):
        assert close(found.grads[name], grad, 1e-8), name
    assert float(found.query_scores[0]) == pytest.approx(torch.stack(right).mean().item())
    outputs = by_prototypes(
        fastest(step.net), step.state.frozen(), episodes, inner_steps=0, statistics=Statistics.OWN
    )
    assert outputs.shape[:2] == (1, 2)
    assert float(CLASSIFICATION.loss(outputs[0], episodes.query_y_TE).mean()) == pytest.approx(
        torch.stack(losses).mean().item()
    )


def test_the_nearest_neighbour_is_the_nearest():
    config = small_config(algo="nearest")
    net, state = build(config, IMAGE, CPU)
    episodes = random_episodes(config)
    outputs = by_neighbours(fastest(net), state, episodes, inner_steps=0, statistics=Statistics.OWN)
    eye = {"linear.weight": torch.eye(4).double(), "linear.bias": torch.zeros(4).double()}
    for task in range(2):
        support, query = (
            slow_forward(state.slow | eye, state.norm, 0, part[task])
            for part in (episodes.support_x_TECHW, episodes.query_x_TECHW)
        )
        nearest = episodes.support_y_TE[task][torch.cdist(query, support).argmin(1)]
        assert torch.equal(outputs[0, task].argmax(1), nearest)


def test_pre_training_is_one_classifier_of_all_classes():
    config = small_config(algo="transfer")
    net, state = build(config, IMAGE, CPU, classes=9)
    assert net.outputs == 9
    step = MetaStep(config, net, state)
    episodes = random_episodes(config)
    class_TN = torch.tensor([[8, 0, 3], [2, 8, 1]])
    episodes = Episodes(*episodes.sets, class_TN)
    found = step.measure(episodes, 0, measure_all=False)
    slow = {name: tensor.detach().clone().requires_grad_() for name, tensor in state.slow.items()}
    norm = {name: tensor.unsqueeze(0) for name, tensor in slow.items() if name.startswith("norm")}
    x = torch.cat([episodes.support_x_TECHW, episodes.query_x_TECHW], 1).flatten(0, 1)
    y = torch.cat([class_TN.repeat_interleave(2, 1)] * 2, 1).flatten()
    loss = F.cross_entropy(slow_forward(slow, norm, 0, x), y)
    grads = torch.autograd.grad(loss, list(slow.values()))
    assert float(found.meta_loss) == pytest.approx(loss.item())
    for name, grad in zip(slow, grads, strict=True):
        assert close(found.grads[name], grad), name


@pytest.mark.parametrize("adapts", ["all", "head"])
def test_fine_tuning_begins_with_a_head_of_zeros_and_follows_the_support_loss(adapts):
    config = small_config(algo="transfer", adapts=adapts, inner_lr=0.3)
    net, _ = build(config, IMAGE, CPU)
    _, state = build(config, IMAGE, CPU, classes=9)
    episodes = random_episodes(config)
    outputs = fine_tuned(fastest(net), state, episodes, inner_steps=3, statistics=Statistics.OWN)
    assert (outputs[0] == 0).all()
    for task in range(2):
        fast = {name: tensor.clone() for name, tensor in state.slow.items()}
        fast |= {"linear.weight": torch.zeros(3, 4).double(), "linear.bias": torch.zeros(3).double()}
        for _ in range(3):
            leaves = {name: tensor.requires_grad_() for name, tensor in fast.items()}
            norm = {name: tensor.unsqueeze(0) for name, tensor in leaves.items() if "norm" in name}
            logits = slow_forward(leaves, norm, 0, episodes.support_x_TECHW[task])
            loss = F.cross_entropy(logits, episodes.support_y_TE[task])
            grads = torch.autograd.grad(loss, list(leaves.values()))
            fast = {
                name: (tensor - 0.3 * grad if adapts == "all" or name in HEAD else tensor).detach()
                for (name, tensor), grad in zip(leaves.items(), grads, strict=True)
            }
        norm = {name: tensor.unsqueeze(0) for name, tensor in fast.items() if "norm" in name}
        wanted = slow_forward(fast, norm, 0, episodes.query_x_TECHW[task])
        assert close(outputs[3, task], wanted, 1e-8)


@pytest.mark.parametrize("statistics", list(Statistics))
def test_adapting_the_head_alone_on_features_equals_passing_the_whole_net(statistics):
    """`adapted` passes the body once where it may; two rows of norm keep it from doing so."""
    config = small_config(algo="anil")
    net, state = build_uneven(config)
    for rows in state.running.values():
        rows.add_(0.3)
    twice = copy.copy(state)
    twice.norm = {name: rows.repeat(2, 1) for name, rows in state.norm.items()}
    episodes = random_episodes(config)
    named = {"inner_steps": 4, "statistics": statistics}
    one, two = (adapted(fastest(net), which.frozen(), episodes, **named) for which in (state, twice))
    assert close(one, two)


def test_scratch_learns_nothing():
    step, found = measured("scratch")
    before = {name: tensor.detach().clone() for name, tensor in step.learnable.items()}
    step.apply(found, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in step.learnable.items())
    assert all((grad == 0).all() for grad in found.grads.values())


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_every_algorithm_gives_the_same_in_chunks_and_by_either_engine(algo):
    """Two tasks at a time or one, derivatives by hand or torch's own."""
    classes = torch.tensor([[4, 0, 3], [2, 1, 0]])
    found = {}
    for engine, chunk in itertools.product(("adjoint", "plain"), ("auto", "1")):
        if ALGORITHMS[algo].whole_batches and chunk == "1":
            continue
        config = small_config(algo=algo, engine=engine, task_chunk=chunk, train_shots=None)
        episodes = Episodes(*random_episodes(config).sets, classes)
        net, state = build(config, IMAGE, CPU, classes=5)
        found[engine, chunk] = MetaStep(config, net, state).measure(episodes, 0, measure_all=True)
    first = found["adjoint", "auto"]
    for other in found.values():
        assert first.grads.keys() == other.grads.keys()
        for name, grad in first.grads.items():
            assert close(other.grads[name], grad, 1e-7), (algo, name)
        assert first.query_losses.keys() == other.query_losses.keys()
        for steps, loss in first.query_losses.items():
            assert close(other.query_losses[steps], loss, 1e-9), (algo, steps)
        for name, moment in first.moments.items():
            assert close(other.moments[name], moment, 1e-9), (algo, name)


@pytest.mark.parametrize(
    "algo", ["maml", "fomaml", "anil", "boil", "meta-sgd", "alpha-maml", "imaml", "reptile", "transfer"]
)
def test_curves_are_learnt_by_either_engine(algo):
    """Squared errors instead of classes: the same meta-gradient by the adjoint and by double backward."""
    grads = {}
    for engine in ("adjoint", "plain"):
        config = small_config(algo=algo, engine=engine, net="mlp", ways=1, train_shots=None, inner_lr=0.01)
        net, state = build(config, (1,), CPU)
        stream = CurveStream(
            family=FAMILIES["sinusoid"],
            split="train",
            seed=0,
            shots=5,
            queries=4,
            device=CPU,
            dtype=torch.float64,
        )
        found = MetaStep(config, net, state).measure(stream.episodes(0, 3), 0, measure_all=True)
        assert all(found.query_scores[step] == found.query_losses[step] for step in found.query_losses)
        grads[engine] = found.grads
    for name, grad in grads["plain"].items():
        assert close(grads["adjoint"][name], grad, 1e-9), name
    assert any(float(grad.abs().max()) > 0 for grad in grads["plain"].values())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_reptiles_head_alone_on_features_equals_passing_the_whole_net(optimizer):
    config = small_config(algo="reptile", adapts="head", inner_optimizer=optimizer, train_shots=None)
    net, state = build(config, IMAGE, CPU)
    for name, moment in state.moments.items():
        moment.add_(2.0 if name == "steps" else 0.01)
    twice = copy.copy(state)
    twice.running = {name: rows.repeat(2, 1) for name, rows in state.running.items()}
    named = {"inner_steps": 3, "statistics": Statistics.OWN, "inner_optimizer": optimizer}
    one, two = (
        adapted(fastest(net), which.frozen(), random_episodes(config), **named) for which in (state, twice)
    )
    assert close(one, two)
    assert not close(one[3], one[0], 1e-3)


@pytest.mark.parametrize("predict", [by_prototypes, by_neighbours])
def test_running_statistics_normalise_both_sets_that_are_compared(predict):
    """A query that is a support image lies on its own features then."""
    config = small_config(algo="nearest", shots=1, queries=1)
    net, state = build(config, IMAGE, CPU)
    for rows in state.running.values():
        rows.add_(0.3)
    x, y, _, _ = random_episodes(config).sets
    outputs = predict(fastest(net), state, Episodes(x, y, x, y), inner_steps=0, statistics=Statistics.RUNNING)
    assert float(outputs[0].amax(-1).abs().max()) < 1e-9  # the distance to itself
