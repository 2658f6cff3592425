"""Parameter counts, equivalent settings, batch-norm modes, and evaluation without side effects."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.engine_cases import IMAGE, build_uneven, fastest, random_episodes, slow_forward, small_config

from mamlctl.engine.evaluation.measured_loop import TaskSets
from mamlctl.engine.evaluation.prediction import PredictRequest, adapted
from mamlctl.engine.inner_loop import adapt
from mamlctl.engine.nets.batch_norm import MOMENTUM, NormPass, Statistics, accumulate
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep
from mamlctl.settings.schema import IMPROVEMENTS, TrainConfig

CPU = torch.device("cpu")
# Parameter counts of the published code on Omniglot: adapted, per-step norm, learnt rates (10 x 6).
PUBLISHED = {
    5: (111_749, 2_560, 60),
    20: (112_724, 2_560, 60),
}
INERT_BIASES = 4 * 64  # biases of its convolutions, which batch norm cancels


@pytest.mark.parametrize("ways", [5, 20])
def test_parameter_counts_are_the_published_ones_without_inert_biases(ways):
    config = TrainConfig(ways=ways, **dict.fromkeys(IMPROVEMENTS, True))
    _, state = build(config, (1, 28, 28), CPU)
    adapted, norm, rates = PUBLISHED[ways]
    assert sum(w.numel() for w in state.slow.values()) + INERT_BIASES == adapted
    assert sum(w.numel() for w in state.norm.values()) == norm
    # Of its 10 vectors of 6 rates, 4 belong to the inert biases, and the last rate of each is never used.
    assert sum(w.numel() for w in state.rates.values()) == rates - 4 * 6 - 6
    assert {tuple(rate.shape) for rate in state.rates.values()} == {(5,)}


def test_a_convolution_bias_before_batch_norm_changes_nothing():
    x = torch.randn(6, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shifted = x + torch.tensor([3.0, -1.0, 0.5, 9.0], dtype=torch.float64)[:, None, None]
    normed = [F.batch_norm(c, None, None, training=True) for c in (x, shifted)]
    assert torch.allclose(*normed, atol=1e-12)


def test_initial_weights_depend_only_on_the_init_seed():
    first = build(small_config(seed=3), IMAGE, CPU)[1].slow
    again = build(small_config(seed=9, init_seed=3), IMAGE, CPU)[1].slow
    other = build(small_config(seed=9), IMAGE, CPU)[1].slow
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def trained(config, meta_steps=3, epoch=0):
    net, state = build(config, IMAGE, CPU)
    step = MetaStep(config, net, state)
    for number in range(meta_steps):
        step.apply(step.measure(random_episodes(config, seed=number), epoch, measure_all=False), epoch)
    return net, state


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


def test_maml_plus_plus_with_all_six_off_is_maml():
    off = dict.fromkeys(IMPROVEMENTS, False)
    assert same(trained(small_config(algo="maml++", **off))[1].stored(), trained(small_config())[1].stored())


def test_fomaml_is_first_order_maml():
    fomaml = trained(small_config(algo="fomaml"))[1].stored()
    assert same(fomaml, trained(small_config(first_order=True))[1].stored())
    assert not same(fomaml, trained(small_config())[1].stored())


def test_annealed_derivatives_are_first_order_and_then_second_order():
    config = small_config(da=True, da_epochs=2)
    assert same(trained(config, epoch=1)[1].slow, trained(small_config(first_order=True), epoch=1)[1].slow)
    assert same(trained(config, epoch=2)[1].slow, trained(small_config(), epoch=2)[1].slow)


def test_multi_step_loss_is_the_plain_loss_after_msl_epochs():
    assert same(
        trained(small_config(msl=True, msl_epochs=1), epoch=1)[1].slow,
        trained(small_config(), epoch=1)[1].slow,
    )


def test_learnt_rates_that_never_change_equal_a_fixed_rate():
    config = small_config(lslr=True)
    net, state = build(config, IMAGE, CPU)
    with_rates = MetaStep(config, net, state).measure(random_episodes(config), 0, measure_all=False).grads
    plain = small_config()
    net, state = build(plain, IMAGE, CPU)
    without = MetaStep(plain, net, state).measure(random_episodes(plain), 0, measure_all=False).grads
    assert all(torch.allclose(with_rates[name], without[name], rtol=1e-12, atol=0) for name in without)


def test_adam_equals_torch_bit_for_bit():
    config = small_config(algo="maml++", da=False, adam_beta1=0.8, adam_beta2=0.99, meta_lr=0.01, ca=False)
    (net, state), (_, other) = (build(config, IMAGE, CPU) for _ in range(2))
    step = MetaStep(config, net, state)
    theirs = {name: tensor.requires_grad_() for name, tensor in other.learnable().items()}
    adam = torch.optim.Adam(list(theirs.values()), lr=0.01, betas=(0.8, 0.99))
    for number in range(4):
        measured = step.measure(random_episodes(config, seed=number), 0, measure_all=False)
        for name, tensor in theirs.items():
            tensor.grad = measured.grads[name].clone()
        adam.step()
        step.apply(measured, 0)
    for name, tensor in theirs.items():
        assert torch.equal(step.learnable[name], tensor), name


def test_cosine_annealing_sets_the_rate_of_adam():
    config = small_config(ca=True, epochs=100)
    net, state = build(config, IMAGE, CPU)
    step = MetaStep(config, net, state)
    step.apply(step.measure(random_episodes(config), 50, measure_all=False), 50)
    assert step.optimizer.lr == pytest.approx(5.05e-4)


def test_measuring_every_query_loss_does_not_change_training():
    config = small_config(bnrs=True)
    net, state = build_uneven(config)
    step = MetaStep(config, net, state)
    episodes = random_episodes(config)
    few, all_ = (step.measure(episodes, 0, measure_all=flag) for flag in (False, True))
    assert list(few.query_losses) == [3]
    assert list(all_.query_losses) == [0, 1, 2, 3]
    assert same(few.grads, all_.grads)
    assert len(few.norm_passes) == len(all_.norm_passes)
    assert torch.equal(few.query_losses[3], all_.query_losses[3])


def test_clipping_limits_the_gradients_of_weights_but_not_of_rates():
    config = small_config(lslr=True, clip_value=1e-4)
    net, state = build_uneven(config)
    grads = MetaStep(config, net, state).measure(random_episodes(config), 0, measure_all=False).grads
    for name, grad in grads.items():
        assert (float(grad.abs().max()) > 1e-4) == name.startswith("rate."), name
    config = small_config(clip_norm=0.5)
    grads = (
        MetaStep(config, *build_uneven(config)).measure(random_episodes(config), 0, measure_all=False).grads
    )
    assert float(torch.cat([grad.flatten() for grad in grads.values()]).norm()) == pytest.approx(0.5)


def norm_pass_of(tensor_ETCHW, statistics, running=None, support=0):
    channels = tensor_ETCHW.shape[2]
    params = {
        "n.weight": torch.full((1, channels), 2.0).double(),
        "n.bias": torch.full((1, channels), 0.5).double(),
    }
    norm = NormPass(params, running or {}, 0, statistics, support_examples=support)
    return norm("n", tensor_ETCHW, {}), norm


def random_ETCHW(*shape, seed=0):
    return 3 + 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_own_statistics_equal_torch_batch_norm_for_each_task():
    x = random_ETCHW(6, 2, 3, 4, 4)
    out, norm = norm_pass_of(x, Statistics.OWN)
    for task in range(2):
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        weights = torch.full((3,), 2.0).double(), torch.full((3,), 0.5).double()
        expected = F.batch_norm(x[:, task], mean, var, *weights, training=True, momentum=1.0)
        assert torch.allclose(out[:, task], expected, atol=1e-12)
        assert torch.allclose(norm.seen["n"][0][task], mean, atol=1e-12)
        assert torch.allclose(norm.seen["n"][1][task], var, atol=1e-12)


def test_support_statistics_ignore_the_queries():
    x = random_ETCHW(6, 2, 3, 4, 4)
    disturbed = x.clone()
    disturbed[4:] *= 7
    out, other = (norm_pass_of(tensor, Statistics.SUPPORT, support=4)[0] for tensor in (x, disturbed))
    assert torch.equal(out[:4], other[:4])
    assert torch.allclose(out[:4], norm_pass_of(x[:4], Statistics.OWN)[0], atol=1e-12)


def test_running_statistics_equal_torch_batch_norm_in_evaluation_mode():
    x = random_ETCHW(6, 2, 3, 4, 4)
    mean, var = random_ETCHW(1, 3), random_ETCHW(1, 3, seed=1).abs() + 0.1
    out, norm = norm_pass_of(x, Statistics.RUNNING, {"n.mean": mean, "n.var": var})
    weights = torch.full((3,), 2.0).double(), torch.full((3,), 0.5).double()
    expected = F.batch_norm(x.flatten(0, 1), mean[0], var[0], *weights, training=False)
    assert torch.allclose(out.flatten(0, 1), expected, atol=1e-12)
    assert not norm.seen, "a pass with running statistics must not feed them"


def test_running_statistics_average_over_the_tasks_and_passes_of_each_row():
    passes = []
    for step, seed in ((0, 0), (1, 1), (1, 2), (5, 3)):
        norm = NormPass({"n.weight": torch.ones(1, 3), "n.bias": torch.zeros(1, 3)}, {}, step)
        norm("n", random_ETCHW(6, 2, 3, 4, 4, seed=seed), {})
        passes.append(norm)
    running = {"n.mean": torch.zeros(3, 3).double(), "n.var": torch.ones(3, 3).double()}
    accumulate(running, passes)
    means = [norm.seen["n"][0].mean(0) for norm in passes]
    expected = torch.stack([means[0], (means[1] + means[2]) / 2, means[3]]) * MOMENTUM
    assert torch.allclose(running["n.mean"], expected, atol=1e-12)
    untouched = {"n.mean": torch.zeros(3, 3).double(), "n.var": torch.ones(3, 3).double()}
    accumulate(untouched, passes[:1])
    assert float(untouched["n.mean"][1:].abs().sum()) == 0


def test_bnrs_trains_one_row_per_inner_step():
    for bnrs, rows in ((True, 3), (False, 1)):
        _, state = trained(small_config(bnrs=bnrs))
        assert state.running["norm1.mean"].shape == (rows, 4)
        assert float(state.running["norm2.mean"].abs().min()) > 0
    _, state = trained(small_config(bnrs=True))
    rows = state.running["norm3.mean"]
    assert not torch.allclose(rows[0], rows[2]), "steps see different weights, so their statistics differ"


@pytest.mark.parametrize("statistics", list(Statistics))
def test_evaluation_does_not_change_the_state(statistics):
    config = small_config(algo="maml++")
    net, state = trained(config)
    before = {name: tensor.clone() for name, tensor in state.stored().items()}
    for _ in range(2):
        episodes = random_episodes(config)
        adapted(PredictRequest(TaskSets(fastest(net), episodes), state.frozen(), 4, statistics))
    assert same(before, state.stored())


def test_bn_modes_give_different_predictions_and_running_uses_the_row_of_the_step():
    config = small_config(algo="maml++")
    net, state = trained(config)
    episodes = random_episodes(config, seed=7)
    logits = {
        mode: adapted(PredictRequest(TaskSets(fastest(net), episodes), state.frozen(), 3, mode))
        for mode in Statistics
    }
    assert not torch.allclose(logits[Statistics.OWN], logits[Statistics.RUNNING])
    assert not torch.allclose(logits[Statistics.OWN], logits[Statistics.SUPPORT])
    state.running["norm1.mean"][2] += 0.3  # row of the third inner step only
    moved = adapted(PredictRequest(TaskSets(fastest(net), episodes), state.frozen(), 3, Statistics.RUNNING))
    assert torch.equal(moved[:3], logits[Statistics.RUNNING][:3])
    assert not torch.allclose(moved[3], logits[Statistics.RUNNING][3])


@pytest.mark.parametrize("statistics", [Statistics.RUNNING, Statistics.SUPPORT])
def test_only_transductive_predictions_depend_on_the_other_queries(statistics):
    config = small_config(algo="maml++")
    net, state = trained(config)
    episodes = random_episodes(config, seed=7)
    disturbed = random_episodes(config, seed=7)
    disturbed.query_x_TECHW[:, 1:] = random_episodes(config, seed=8).query_x_TECHW[:, 1:]

    def first_query(which, mode):
        return adapted(PredictRequest(TaskSets(fastest(net), which), state.frozen(), 3, mode))[:, :, 0]

    assert torch.allclose(first_query(episodes, statistics), first_query(disturbed, statistics), atol=1e-10)
    mode = Statistics.OWN
    assert not torch.allclose(first_query(episodes, mode), first_query(disturbed, mode), atol=1e-3)


def test_extra_inner_steps_use_the_last_row():
    config = small_config(algo="maml++")
    net, state = build_uneven(config)
    episodes = random_episodes(config)
    support = episodes.support_x_TECHW, episodes.support_y_TE
    points = list(adapt(net, state.frozen(), *support, steps=5, first_order=True))
    fewer = list(adapt(net, state.frozen(), *support, steps=2, first_order=True))
    assert same(points[2].fast, fewer[2].fast)
    for step, (before, after) in enumerate(itertools.pairwise(points[3:]), start=3):
        for task in range(config.meta_batch_size):
            fast = {name: weight[task].detach().requires_grad_() for name, weight in before.fast.items()}
            logits = slow_forward(fast, state.norm, 2, episodes.support_x_TECHW[task])
            grads = torch.autograd.grad(
                F.cross_entropy(logits, episodes.support_y_TE[task]), list(fast.values())
            )
            for (name, weight), grad in zip(fast.items(), grads, strict=True):
                expected = weight - state.rates[name][2] * grad
                assert torch.allclose(after.fast[name][task], expected, atol=1e-10), (step, name)


def test_bfloat16_products_stay_near_float32():
    """The meta-gradients have the same direction; bfloat16 has 8 bits, so its rounding is about 1 or 2 %."""
    grads = {}
    for precision in ("float32", "bf16"):
        config = small_config(precision=precision, inner_steps=1, inner_lr=0.01)
        net, state = build(config, IMAGE, CPU)
        episodes = random_episodes(config)
        single = type(episodes)(
            episodes.support_x_TECHW.float(),
            episodes.support_y_TE,
            episodes.query_x_TECHW.float(),
            episodes.query_y_TE,
        )
        grads[precision] = MetaStep(config, net, state).measure(single, 0, measure_all=False).grads
    flat = {key: torch.cat([grad.flatten() for grad in value.values()]) for key, value in grads.items()}
    cosine = F.cosine_similarity(flat["float32"], flat["bf16"], dim=0)
    assert float(cosine) > 0.98
    assert not torch.equal(flat["float32"], flat["bf16"]), "bf16 must compute in another dtype"


def test_adaptation_uses_the_statistics_of_the_support_set_in_every_mode():
    """`--bn` changes only the pass of the query set."""
    config = small_config(algo="maml++")
    net, state = trained(config)
    episodes = random_episodes(config, seed=7)
    same_set = type(episodes)(
        episodes.support_x_TECHW, episodes.support_y_TE, episodes.support_x_TECHW, episodes.support_y_TE
    )
    transductive, support = (
        adapted(PredictRequest(TaskSets(fastest(net), same_set), state.frozen(), 3, mode))
        for mode in (Statistics.OWN, Statistics.SUPPORT)
    )
    assert torch.allclose(transductive, support, atol=1e-10)
    state.running["norm1.mean"][:2] += 0.3  # rows of the first two steps; the last prediction uses the third
    before, after = (
        adapted(PredictRequest(TaskSets(fastest(net), episodes), which.frozen(), 3, Statistics.RUNNING))[3]
        for which in (trained(config)[1], state)
    )
    assert torch.equal(before, after)
