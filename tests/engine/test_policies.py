"""Policies compared with loops, torch.distributions, numpy's least squares, and closed forms of bandits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import policy_reference
from helpers.data_cases import stream_settings
from helpers.policy_reference import distributions

from mamlctl.data.counter_rng import random_words, random_words_of_keys
from mamlctl.data.tasks.navigation import NavigationStream, action_noise
from mamlctl.data.worlds import WORLDS, World
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest
from mamlctl.engine.algorithms.policy_search import PolicySearch, Trial, flat, reptile_of_policies, walk
from mamlctl.engine.inner_loop import RATE, MetaState, expanded
from mamlctl.engine.nets.base import REGRESSION
from mamlctl.engine.nets.mlp import DEVIATION, GaussianPolicy, Mlp
from mamlctl.engine.reinforcement import rollouts, task_policy
from mamlctl.engine.reinforcement.advantages import RIDGE, advantages, baseline, discounted
from mamlctl.engine.reinforcement.jacobian import AdaptedPolicies
from mamlctl.engine.reinforcement.policy_gradient import PolicyPoint, Sampling
from mamlctl.engine.reinforcement.rollouts import LEAST_LOG, rollout
from mamlctl.engine.reinforcement.trpo import BACKTRACK, DAMPING, conjugate_gradients, trust_region_step

SHORT = replace(WORLDS["navigation"], horizon=7)
# One action, whose square distance to the goal is the reward.
BANDIT = World("bandit", "", squared=True, horizon=1, scale=1.0, limit=math.inf, near=0.0)


def close(a, b, tolerance=1e-10):
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def a_policy(hidden=(6, 5), inputs=2, activation="relu"):
    return GaussianPolicy(Mlp((inputs,), 2, hidden, REGRESSION, activation))


def a_state(policy, *, rate=0.3, rows=1, learnt=False, seed=0):
    """A state whose deviations and rates differ from each other."""
    slow = policy.init(torch.Generator().manual_seed(seed), torch.float64)
    slow[DEVIATION] = torch.tensor([-0.3, 0.2], dtype=torch.float64)
    rates = {
        name: rate * torch.linspace(1, 1.5, rows, dtype=torch.float64) * (1 + 0.1 * place)
        for place, name in enumerate(slow)
    }
    return MetaState(slow, {}, rates, rates_learnt=learnt)


def tasks_of(world, count=3, *, shots=4, queries=4, first=0):
    settings = stream_settings(split="train", seed=5, shots=shots, queries=queries, dtype=torch.float64)
    return NavigationStream(world, settings).episodes(first, count)


def sampling(world=SHORT, discount=0.9, gae=1.0):
    return Sampling(world, discount, gae)


def request(steps, weights=None, *, first_order=False):
    return MetaStepRequest(steps, weights or (0.0,) * (steps - 1) + (1.0,), first_order, measure_all=True)


def test_goals_and_noise_depend_on_neither_the_batch_nor_the_number_of_trajectories():
    whole = tasks_of(SHORT, 5)
    part = tasks_of(SHORT, 2, shots=9, queries=1, first=3)
    assert torch.equal(whole.query_y_TE[3:], part.query_y_TE)
    assert torch.equal(whole.keys_T[3:], part.keys_T)
    assert len(set(whole.keys_T.tolist())) == 5
    noise = action_noise(whole.keys_T, 2, 6, 7)
    assert noise.shape == (5, 6, 7, 2)
    assert torch.equal(noise[3:, :4], action_noise(part.keys_T, 2, 4, 7))
    assert not torch.equal(noise, action_noise(whole.keys_T, 1, 6, 7))


def test_noise_is_standard_normal_and_goals_are_uniform():
    noise = action_noise(tasks_of(SHORT, 20).keys_T, 0, 20, 100)
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.var()) - 1) < 0.02  # 80,000 numbers
    assert abs(float((noise[..., 0] * noise[..., 1]).mean())) < 0.02
    goals = tasks_of(SHORT, 4000).query_y_TE
    assert goals.abs().max() <= 0.5
    assert abs(float(goals.mean())) < 0.01 and abs(float(goals.var()) - 1 / 12) < 0.003


def test_words_of_keys_are_those_of_the_keys_as_seeds():
    keys = np.array([3, 2**63 - 1, 77], np.uint64)
    words = random_words_of_keys(keys, "action noise", 2, 11)
    for key, row in zip(keys.tolist(), words, strict=True):
        assert (row == random_words(key, "action noise", 2, 11)).all()


@pytest.mark.parametrize("squared", [True, False])
def test_a_rollout_equals_a_loop_over_trajectories_and_times(squared):
    world = replace(SHORT, squared=squared, near=0.25)  # near enough that some trajectories end early
    policy, episodes = a_policy(), tasks_of(world, 4)
    state = a_state(policy)
    fast = {name: part + 0.1 * torch.randn(4, *part.shape).double() for name, part in state.slow.items()}
    done = rollout(policy, fast, episodes, world, inner_step=1, trajectories=3)
    noise = action_noise(episodes.keys_T, 1, 3, world.horizon)
    ended = 0
    for task in range(4):
        own = {name: part[task] for name, part in fast.items()}
        for trajectory in range(3):
            x, total, alive = np.zeros(2), 0.0, True
            for time in range(world.horizon):
                assert bool(done.alive_TEH[task, trajectory, time]) == alive
                if not alive:
                    ended += 1
                    continue
                f = torch.from_numpy(x)
                for layer in (1, 2):
                    f = torch.relu(own[f"hidden{layer}.weight"] @ f + own[f"hidden{layer}.bias"])
                mean = own["linear.weight"] @ f + own["linear.bias"]
                action = mean + own[DEVIATION].exp() * noise[task, trajectory, time]
                assert close(action, done.action_TEHA[task, trajectory, time])
                x = x + np.clip(0.1 * action.numpy(), -0.1, 0.1)
                distance = math.dist(x, episodes.query_y_TE[task].tolist())
                total -= distance**2 if squared else distance
                alive = distance >= 0.25
            assert float(done.return_TE[task, trajectory]) == pytest.approx(total, rel=1e-12)
    assert ended


@pytest.mark.parametrize("least", [LEAST_LOG, 0.0])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("hidden", [(), (4,), (6, 5), (5, 4, 3)])
def test_derivatives_of_a_policy_equal_double_backward(monkeypatch, hidden, activation, least):
    """At other weights than those that drew the actions, with free deviations and with clamped ones."""
    for module in (task_policy, policy_reference):
        monkeypatch.setattr(module, "LEAST_LOG", least)
    policy, world = a_policy(hidden, activation=activation), replace(SHORT, near=0.3)
    episodes = tasks_of(world)
    (drawn,) = walk(sampling(world), policy, a_state(policy).frozen(), episodes, 0)
    experience = drawn.experience
    assert (experience.trained.alive_TEH == 0).any()  # some trajectories end early
    generator = torch.Generator().manual_seed(2)
    random = {name: torch.randn(2, *part.shape, generator=generator) for name, part in drawn.fast.items()}
    fast = {name: part + 0.2 * random[name][0] for name, part in drawn.fast.items()}
    tangent = {name: pair[1].double() for name, pair in random.items()}
    tasks = PolicyPoint(policy, fast, experience).tasks

    leaf = {name: part.clone().requires_grad_() for name, part in fast.items()}
    loss_T, divergence_T = (
        of(policy, leaf, experience) for of in (policy_reference.loss, policy_reference.divergence)
    )
    grads = torch.autograd.grad(loss_T.sum(), leaf.values(), create_graph=True, materialize_grads=True)
    along = sum((grad * part).sum() for grad, part in zip(grads, tangent.values(), strict=True))
    products = torch.autograd.grad(along, leaf.values(), materialize_grads=True)
    for number, task in enumerate(tasks):
        assert close(task.loss, loss_T[number]) and close(task.divergence, divergence_T[number])
        own = {name: part[number] for name, part in tangent.items()}
        both = task.loss_product(own), task.loss_product(own, once=True)
        for name, grad, expected in zip(leaf, grads, products, strict=True):
            assert close(task.gradient[name], grad[number]), name
            assert all(close(product[name], expected[number], 1e-9) for product in both), name


@pytest.mark.parametrize("gae", [1.0, 0.7])
def test_advantages_equal_slow_loops_and_numpys_least_squares(gae):
    world = replace(SHORT, near=0.25)
    policy, episodes = a_policy(), tasks_of(world, 3, shots=5)
    walked = rollout(policy, expanded(a_state(policy).slow, 3), episodes, world, inner_step=0, trajectories=5)
    ours = advantages(walked, 0.9, gae).view(3, 5, -1)
    for task in range(3):
        rewards, alive = walked.reward_TEH[task].numpy(), walked.alive_TEH[task].numpy() > 0
        returns, rows, values = np.zeros((5, 8)), [], []
        for time in range(6, -1, -1):
            returns[:, time] = rewards[:, time] + 0.9 * returns[:, time + 1]
        for trajectory, time in np.argwhere(alive):
            s, t = walked.state_TEHD[task, trajectory, time].numpy(), time / 100
            rows.append([*s, *(s**2), t, t**2, t**3, 1.0])
            values.append(returns[trajectory, time])
        x, y = np.array(rows), np.array(values)
        ridge = math.sqrt(RIDGE) * np.eye(x.shape[1])
        weights = np.linalg.lstsq(np.r_[x, ridge], np.r_[y, np.zeros(len(ridge))], rcond=None)[0]
        b = np.zeros((5, 8))
        b[:, :7][alive] = x @ weights
        delta, advantage = rewards + 0.9 * b[:, 1:] - b[:, :7], np.zeros((5, 8))
        for time in range(6, -1, -1):
            advantage[:, time] = delta[:, time] + 0.9 * gae * advantage[:, time + 1]
        kept = advantage[:, :7][alive]
        kept = (kept - kept.mean()) / kept.std()
        assert np.allclose(ours[task].numpy()[alive], kept, atol=1e-6), task


def test_discounted_sums():
    values = torch.tensor([1.0, 2.0, 4.0])
    assert discounted(values, 0.5).tolist() == [3.0, 4.0, 4.0]
    assert discounted(values, 1).tolist() == [7.0, 6.0, 4.0]


def test_the_baseline_is_zero_after_the_end_of_a_trajectory():
    world = replace(SHORT, near=0.3)
    policy = a_policy()
    walked = rollout(
        policy, expanded(a_state(policy).slow, 4), tasks_of(world, 4), world, inner_step=0, trajectories=4
    )
    b = baseline(walked, discounted(walked.reward_TEH, 0.9))
    assert (walked.alive_TEH == 0).any() and bool((b[walked.alive_TEH == 0] == 0).all())


# The Gauss-Hermite rule with the nodes 0 and ± sqrt 3: its means of polynomials up to degree 5 are exact.
NODES = torch.tensor([0.0, 0.0, 0.0, 0.0, math.sqrt(3), -math.sqrt(3)], dtype=torch.float64)


def exact_noise(keys_T, inner_step, trajectories, horizon):
    pairs = torch.cartesian_prod(NODES, NODES)
    assert (trajectories, horizon) == (len(pairs), 1)
    return pairs.view(1, -1, 1, 2).expand(len(keys_T), -1, -1, -1)


def test_the_meta_gradient_of_a_gaussian_bandit_is_the_closed_form(monkeypatch):
    """An action a ~ N(m, s^2 I) has the reward -|a - g|^2, so that R(m) = -|m - g|^2 - 2 s^2.

    Advantages are divided by the deviation d(m) of the reward, d^2 = 4 s^2 |m - g|^2 + 4 s^4. Therefore
    m' = m + a grad R / d, and the meta-gradient is -(1 - 2 a / d) grad R(m') / d(m').
    """
    monkeypatch.setattr(rollouts, "action_noise", exact_noise)
    policy, s, rate = a_policy(hidden=()), 0.7, 0.4
    slow = policy.init(torch.Generator().manual_seed(0), torch.float64)
    m = slow["linear.bias"] = torch.tensor([0.2, -0.3], dtype=torch.float64)
    slow[DEVIATION] = torch.full((2,), math.log(s), dtype=torch.float64)
    state = MetaState(slow, {}, {"linear.bias": torch.full((1,), rate, dtype=torch.float64)})
    episodes = tasks_of(BANDIT, 3, shots=36, queries=36)
    g = episodes.query_y_TE

    def deviation(mean):
        return (4 * s**2 * (mean - g).square().sum(-1, keepdim=True) + 4 * s**4).sqrt()

    moved = m - rate * 2 * (m - g) / deviation(m)
    slope = 2 * (moved - g) / deviation(moved)
    exact = ((1 - 2 * rate / deviation(m)) * slope).mean(0)
    search = PolicySearch(sampling(BANDIT), None)
    ours = search(policy, state, episodes, request(1))
    assert close(ours.grads["linear.bias"], exact, 1e-6)
    of_return = (moved - g).square().sum(-1) + 2 * s**2
    assert float(ours.query_losses[1]) == pytest.approx(float(of_return.mean()))

    # Without the likelihood of the sampled actions (a loss of -A log pi) the Jacobian of the inner step is 1.
    naive = slope.mean(0)
    points = list(walk(sampling(BANDIT), policy, state.frozen(), episodes, 1))
    leaf = {name: part.clone().requires_grad_() for name, part in slow.items()}
    first, second = (point.experience for point in points)
    fast = {name: part.expand(3, *part.shape) for name, part in leaf.items()}
    log_TE = distributions(policy, fast, first.trained.states).log_prob(first.trained.actions)
    loss = -(log_TE * first.advantage_TE).mean(1).sum()
    (grad,) = torch.autograd.grad(loss, fast["linear.bias"], create_graph=True)
    fast["linear.bias"] = fast["linear.bias"] - rate * grad
    outer = policy_reference.loss(policy, fast, second).mean()
    assert close(torch.autograd.grad(outer, leaf["linear.bias"])[0], naive, 1e-6)
    assert float((naive - exact).abs().min()) > 0.04  # of 0.07

    first_order = search(policy, state, episodes, request(1, first_order=True))
    assert close(first_order.grads["linear.bias"], naive, 1e-6)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    ("steps", "rows", "learnt"), [(0, 1, False), (1, 1, False), (2, 2, True), (3, 1, True)]
)
def test_products_along_the_inner_loop_equal_double_backward(first_order, steps, rows, learnt):
    policy = a_policy()
    state = a_state(policy, rows=rows, learnt=learnt)
    episodes, weights = tasks_of(SHORT), [0.0, 0.2, 0.3, 0.5][: steps + 1] if steps else [1.0]
    points = list(walk(sampling(), policy, state.frozen(), episodes, steps))
    adapted = AdaptedPolicies(state, points, weights, first_order=first_order)

    leaf = {name: part.clone().requires_grad_() for name, part in state.learnable().items()}
    slow = {name: leaf.get(name, part) for name, part in state.slow.items()}
    rates = {name: leaf.get(f"{RATE}{name}", rate) for name, rate in state.rates.items()}
    experiences = [point.experience for point in points]
    graph = policy_reference.adapt(
        policy, replace(state, slow=slow, rates=rates), experiences, tasks=3, first_order=first_order
    )
    loss = divergence = torch.zeros((), dtype=torch.float64)
    for fast, experience, weight in zip(graph, experiences, weights, strict=True):
        loss = loss + weight * policy_reference.loss(policy, fast, experience).mean()
        divergence = divergence + weight * policy_reference.divergence(policy, fast, experience).mean()
    inputs = list(leaf.values())
    expected = torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)
    assert list(adapted.gradient()) == list(leaf)
    for name, grad in zip(leaf, expected, strict=True):
        assert close(adapted.gradient()[name], grad), name

    assert abs(divergence.item()) < 1e-12
    slope = torch.autograd.grad(divergence, inputs, create_graph=True, materialize_grads=True)
    generator = torch.Generator().manual_seed(1)
    tangent = {name: torch.randn(part.shape, generator=generator).double() for name, part in leaf.items()}
    along = sum((part * tangent[name]).sum() for name, part in zip(leaf, slope, strict=True))
    expected = torch.autograd.grad(along, inputs, materialize_grads=True)
    product = adapted.divergence_product(tangent)
    for name, part in zip(leaf, expected, strict=True):
        assert close(product[name], part), name


def test_the_gradient_is_that_of_the_trials_of_the_line_search():
    """Central differences: trials compute the meta-loss for other weights without any derivative of ours."""
    policy = a_policy()
    state = a_state(policy, rows=2, learnt=True)
    episodes, weights = tasks_of(SHORT), [0.0, 0.4, 0.6]
    points = list(walk(sampling(), policy, state.frozen(), episodes, 2))
    trial = Trial(policy, state.frozen(), [point.experience for point in points], weights)
    grads = AdaptedPolicies(state, points, weights, first_order=False).gradient()
    for name, part in state.learnable().items():
        for place in range(min(part.numel(), 3)):
            change = torch.zeros(part.numel(), dtype=torch.float64)
            change[place] = 1e-6
            above, below = (
                trial({**state.learnable(), name: part + sign * change.view_as(part)})[0] for sign in (1, -1)
            )
            found = (above - below) / 2e-6
            assert found == pytest.approx(float(grads[name].flatten()[place]), abs=1e-7), name


def test_conjugate_gradients_solve_a_linear_system():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    matrix, b = root @ root.T + torch.eye(8), torch.randn(8, generator=generator, dtype=torch.float64)
    assert close(conjugate_gradients(matrix.mv, b, 20)[0], torch.linalg.solve(matrix, b), 1e-6)
    for steps in (1, 3, 20):
        x, image = conjugate_gradients(matrix.mv, b, steps)
        assert close(image, matrix @ x)


def quadratic(slope):
    """A loss with a known trust-region step: slope . w + steepness |w|^2, and the divergence w^T H w / 2."""
    matrix = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))

    def step(steepness=0.0, larger=1.0):
        return trust_region_step(
            torch.zeros(3, dtype=torch.float64),
            slope,
            matrix.mv,
            0.0,
            lambda w: (
                float(slope.dot(w) + steepness * w.square().sum()),
                larger * float(w.dot(matrix.mv(w)) / 2),
            ),
            0.01,
        )

    best = torch.linalg.solve(matrix + DAMPING * torch.eye(3), slope)
    return step, -best * math.sqrt(0.02 / max(float(slope.dot(best)), 1e-300))


def test_a_step_inside_a_trust_region_is_the_closed_form_and_backtracks():
    step, longest = quadratic(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    # With the damping the longest step has a divergence just below the limit.
    assert close(step(), longest, 1e-6)
    # A divergence that is twice as large as the model of it: the first trial with b^2j <= 1/2.
    trials = math.ceil(math.log(0.5) / math.log(BACKTRACK) / 2)
    assert close(step(larger=2.0), BACKTRACK**trials * longest, 1e-6)
    # A loss that rises in every trial: nothing changes.
    assert close(step(steepness=1e9), torch.zeros(3, dtype=torch.float64))
    no_slope, _ = quadratic(torch.zeros(3, dtype=torch.float64))
    assert close(no_slope(), torch.zeros(3, dtype=torch.float64))
    not_finite, _ = quadratic(torch.tensor([1.0, math.nan, 0.5], dtype=torch.float64))
    assert bool(not_finite().isnan().all())


@pytest.mark.parametrize(("learnt", "frozen"), [(False, ""), (True, ""), (True, "hidden1.weight")])
def test_a_meta_step_inside_the_trust_region_lowers_the_loss_of_its_trajectories(learnt, frozen):
    policy = a_policy()
    state, episodes = a_state(policy, learnt=learnt), tasks_of(SHORT, 4)
    state.frozen_names = frozenset({frozen})
    result = PolicySearch(sampling(), 0.01)(policy, state, episodes, request(2))
    points = list(walk(sampling(), policy, state.frozen(), episodes, 2))
    trial = Trial(policy, state.frozen(), [point.experience for point in points], [0.0, 0.0, 1.0])
    new = {name: part - result.grads[name] for name, part in state.learnable().items()}
    loss, divergence = trial(new)
    assert loss < trial(state.learnable())[0]
    assert 0 < divergence <= 0.01
    assert {*result.query_losses} == {0, 1, 2} and len(result.support_losses_I) == 2
    assert float(result.meta_loss) == float(result.query_losses[2]) == -float(result.query_scores[2])


def test_meta_steps_do_not_depend_on_how_tasks_are_divided():
    policy = a_policy()
    state, search = a_state(policy), PolicySearch(sampling(), None)
    whole = search(policy, state, tasks_of(SHORT, 4), request(2)).grads
    parts = [search(policy, state, tasks_of(SHORT, 2, first=first), request(2)).grads for first in (0, 2)]
    for name, grad in whole.items():
        assert close(grad, (parts[0][name] + parts[1][name]) / 2), name


def test_support_and_query_trajectories_are_the_same_ones():
    """The return after k steps is measured on the first trajectories that also train step k + 1."""
    policy = a_policy()
    few, many = (
        list(walk(sampling(), policy, a_state(policy).frozen(), tasks_of(SHORT, queries=count), 1))
        for count in (2, 7)
    )
    assert [point.experience.measured.return_TE.shape[1] for point in (*few, *many)] == [2, 2, 7, 7]
    for a, b in zip(few, many, strict=True):
        assert torch.equal(a.experience.measured.return_TE, b.experience.measured.return_TE[:, :2])
    assert torch.equal(flat(few[1].fast), flat(many[1].fast))


def test_reptile_with_one_step_moves_along_the_policy_gradient():
    policy = a_policy()
    state, episodes = a_state(policy), tasks_of(SHORT)
    result = reptile_of_policies(
        policy, state, episodes, request(1), sampling=sampling(), inner_optimizer="sgd"
    )
    experience = next(walk(sampling(), policy, state.frozen(), episodes, 1)).experience
    leaf = {name: part.clone().requires_grad_() for name, part in state.slow.items()}
    fast = {name: part.expand(3, *part.shape) for name, part in leaf.items()}
    loss = policy_reference.loss(policy, fast, experience)
    for name, grad in zip(leaf, torch.autograd.grad(loss.mean(), list(leaf.values())), strict=True):
        assert close(result.grads[name], state.rates[name] * grad), name


def test_an_oracle_sees_the_goal_behind_the_position():
    policy = a_policy(inputs=4)
    episodes = tasks_of(SHORT)
    walked = walk(replace(sampling(), sees_goal=True), policy, a_state(policy).frozen(), episodes, 0)
    seen = next(walked).experience.trained
    assert seen.state_TEHD.shape[-1] == 4
    assert torch.equal(
        seen.state_TEHD[..., 2:],
        episodes.query_y_TE[:, None, None].expand(-1, *seen.reward_TEH.shape[1:], -1),
    )
