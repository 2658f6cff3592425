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


def test_the_gradient_for_one_task_is_anil_with_one_step_from_a_head_of_zeros():
    # With this inner rate the factor is 1 / sqrt(F): 3 classes, 4 features.
    settings = {"meta_batch_size": 1, "inner_steps": 1, "inner_lr": 3 / 4**0.5}
    step, result = measured("maml", uneven=False, **BODY, **settings)
    assert not any(step.state.slow[name].any() for name in HEAD)
    _, later = measured("anil", uneven=False, epoch=2, **BODY, **settings)
    for name in set(result.grads) - set(HEAD):
        assert close(result.grads[name], later.grads[name], 1e-8), name
        assert float(result.grads[name].abs().max()) > 0
    assert float(result.query_losses[0]) == pytest.approx(float(later.query_losses[1]))


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
    shots, tasks = config.shots, config.meta_batch_size
    means = torch.stack([support[first : first + shots].mean(0) for first in range(0, len(support), shots)])
    assert len(means) == tasks * config.ways
    logits = query @ (means - means.mean(0)).T / 4**0.5
    labels = torch.arange(len(means)).repeat_interleave(config.queries)
    loss = F.cross_entropy(logits, labels)
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
    assert float(result.query_scores[0]) == pytest.approx(float((logits.argmax(1) == labels).double().mean()))


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
    assert [schedule(epoch)[0] for epoch in range(4)] == [()] * 4
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


def test_reports_have_one_loss_until_the_inner_loop_begins(finished):
    _, run = finished
    reports = rows_of(run.metrics(), "report")
    for row in reports:
        body_only = row["epoch"] < 2
        assert len(row["query_losses"]) == len(row["query_accuracies"]) == (1 if body_only else 4)
        assert len(row["msl_weights"]) == (0 if body_only else 3)
        assert (row["first_order"] is None) == (row["support_loss"] is None) == body_only
    assert [row["epoch"] for row in rows_of(run.metrics(), "validation")] == [1, 2, 3]


def test_until_then_the_head_and_the_rates_stay_and_all_batch_norm_rows_are_equal(tmp_path):
    config = config_of(**BODY)
    trainer = trainer_of(make_run(tmp_path / "run", config), config, stop_at=2 * config.steps_per_epoch)
    before = {name: tensor.detach().clone() for name, tensor in trainer.state.slow.items()}
    assert trainer.train() == "asked"
    for name, tensor in trainer.state.slow.items():
        assert torch.equal(tensor, before[name]) == (name in HEAD or name.endswith("bias")), name
    assert all(bool((rate == config.inner_lr).all()) for rate in trainer.state.rates.values())
    assert {len(rows_RC) for rows_RC in trainer.state.running.values()} == {config.inner_steps}
    for rows_RC in (trainer.state.norm | trainer.state.running).values():
        assert torch.equal(rows_RC, rows_RC[:1].expand_as(rows_RC))
