"""The epochs that train only the body, compared with ANIL and with a direct computation."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.algorithm_cases import CPU, close, measured
from helpers.engine_cases import IMAGE, random_episodes, slow_forward
from helpers.trainer_cases import config_of, make_run, trainer_of

from mamlctl.core.metrics_rows import rows_of
from mamlctl.engine.algorithms.body_start import as_one_task
from mamlctl.engine.nets.base import HEAD
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep

BODY = {"body_epochs": 2}


def test_the_gradient_for_one_task_is_that_of_anil_with_a_head_of_zeros():
    settings = {"meta_batch_size": 1, "inner_steps": 4}
    step, result = measured("maml", uneven=False, **BODY, **settings)
    assert not any(step.state.slow[name].any() for name in HEAD)
    _, expected = measured("anil", uneven=False, epoch=2, **BODY, **settings)
    for name in set(result.grads) - set(HEAD):
        assert close(result.grads[name], expected.grads[name], 1e-8), name
        assert float(result.grads[name].abs().max()) > 0
    assert len(result.query_losses) == 5
    for number, loss in result.query_losses.items():
        assert float(loss) == pytest.approx(float(expected.query_losses[number]))


def test_a_meta_batch_is_one_problem_with_the_classes_of_all_its_tasks():
    step, result = measured("maml++", uneven=False, **BODY)
    config, episodes = step.config, random_episodes(step.config)
    slow = {name: tensor.detach().clone().requires_grad_() for name, tensor in step.state.slow.items()}
    norm = {name: tensor.detach().clone().requires_grad_() for name, tensor in step.state.norm.items()}
    eye = {"linear.weight": torch.eye(4).double(), "linear.bias": torch.zeros(4).double()}
    support, query = (
        slow_forward(slow | eye, norm, 0, images.flatten(0, 1))
        for images in (episodes.support_x_TECHW, episodes.query_x_TECHW)
    )
    classes = config.meta_batch_size * config.ways
    of_support, of_query = (
        torch.arange(classes).repeat_interleave(number) for number in (config.shots, config.queries)
    )
    weight = torch.zeros(classes, 4).double().requires_grad_()
    bias = torch.zeros(classes).double().requires_grad_()
    for _ in range(config.inner_steps):
        # As in a task of N classes, the loss is a sum over examples, divided by N * shots.
        loss = F.cross_entropy(support @ weight.T + bias, of_support, reduction="sum")
        grads = torch.autograd.grad(loss / (config.ways * config.shots), (weight, bias), create_graph=True)
        weight, bias = weight - config.inner_lr * grads[0], bias - config.inner_lr * grads[1]
    logits = query @ weight.T + bias
    loss = F.cross_entropy(logits, of_query)
    body = {name: tensor for name, tensor in slow.items() if name not in HEAD}
    grads = torch.autograd.grad(loss, [*body.values(), *norm.values()])
    logits, loss = logits.detach(), loss.detach()
    for name, grad in zip([*body, *norm], grads, strict=True):
        expected = grad[:1].expand_as(grad) if name in norm else grad  # all inner steps share the pass
        assert close(result.grads[name], expected, 1e-8), name
    others = result.grads.keys() - {*body, *norm}
    assert others == {*HEAD, *(f"rate.{name}" for name in slow)}
    assert not any(result.grads[name].any() for name in others)
    assert float(result.meta_loss) == pytest.approx(float(loss))
    score = float((logits.argmax(1) == of_query).double().mean())
    assert float(result.query_scores[config.inner_steps]) == pytest.approx(score)


def test_one_task_of_all_classes_keeps_the_order_of_the_examples():
    config = config_of(meta_batch_size=3)
    episodes = random_episodes(config)
    one = as_one_task(episodes, config.ways)
    assert one.support_y_TE.shape == (1, 3 * config.ways * config.shots)
    assert torch.equal(one.support_x_TECHW[0], episodes.support_x_TECHW.flatten(0, 1))
    assert one.query_y_TE[0].tolist() == [label for label in range(9) for _ in range(config.queries)]


def test_msl_and_da_begin_after_the_body_and_cosine_annealing_spans_the_run():
    config = config_of(body_epochs=4, epochs=10, msl_epochs=3, da_epochs=2, meta_lr=0.01, min_meta_lr=0.0)
    plain = replace(config, body_epochs=0, epochs=6)
    schedule, expected = (MetaStep(each, *build(each, IMAGE, CPU)).schedule for each in (config, plain))
    assert [schedule(4 + epoch)[:2] for epoch in range(6)] == [expected(epoch)[:2] for epoch in range(6)]
    assert [schedule(epoch)[:2] for epoch in range(4)] == [((0.0, 0.0, 1.0), False)] * 4
    assert [schedule(epoch)[2] for epoch in range(10)] == pytest.approx(
        [0.005 * (1 + math.cos(math.pi * epoch / 10)) for epoch in range(10)]
    )


@pytest.fixture
def finished(tmp_path):
    """A finished run with two epochs of the body and one of the inner loop."""
    config = config_of(**BODY)
    run = make_run(tmp_path / "run", config)
    trainer = trainer_of(run, config)
    assert trainer.train() == ""
    return trainer, run


def test_reports_have_the_losses_of_the_large_problem_until_the_inner_loop_begins(finished):
    trainer, run = finished
    classes = trainer.config.meta_batch_size * trainer.config.ways
    for row in rows_of(run.metrics(), "report"):
        assert len(row["query_losses"]) == len(row["query_accuracies"]) == 4
        body_only = row["epoch"] < 2
        before = row["query_losses"][0]  # with a head of zeros: the loss of a guess among all classes
        assert (before == pytest.approx(math.log(classes), rel=1e-5)) == body_only
        assert row["msl_weights"] == [0, 0, 1] if body_only else min(row["msl_weights"]) > 0
        assert not (row["first_order"] and body_only)
    assert [row["epoch"] for row in rows_of(run.metrics(), "validation")] == [1, 2, 3]


def test_until_then_the_head_and_the_rates_stay_and_the_norm_rows_are_equal(tmp_path):
    config = config_of(**BODY)
    trainer = trainer_of(make_run(tmp_path / "run", config), config, stop_at=2 * config.steps_per_epoch)
    before = {name: tensor.detach().clone() for name, tensor in trainer.state.slow.items()}
    assert trainer.train() == "asked"
    for name, tensor in trainer.state.slow.items():
        assert torch.equal(tensor, before[name]) == (name in HEAD or name.endswith("bias")), name
    assert all(bool((rate == config.inner_lr).all()) for rate in trainer.state.rates.values())
    for rows_RC in trainer.state.norm.values():
        assert torch.equal(rows_RC, rows_RC[:1].expand_as(rows_RC))
